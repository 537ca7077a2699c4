"""When a slider acts: on which tokens of a text, and while which other projection is high or low.

Reply token `i` is written by the pass over the position before it, so that is the position which is moved for it:
"the first 5 tokens of the reply" are the 5 that are chosen under the slider. Positions are absolute, whatever a
KV cache leaves out of a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import Feature

Part = Literal["text", "reply"]
"""The whole text, prompt included, or the tokens of the reply alone."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Open on tokens where another direction or feature reads above, or below, a value."""

    on: Direction | Feature
    """What is read, at its own site and before anything is moved there. A feature of several latents: their mean."""
    above: float | None = None
    """In amounts: 0 is a direction's mean without its trait, 1 the mean with it; for a feature, 1 is its unit."""
    below: float | None = None

    def __post_init__(self) -> None:
        limits = [x for x in (self.above, self.below) if x is not None]
        if not limits or not all(isinstance(x, int | float) and math.isfinite(x) for x in limits):
            raise UsageError(
                f"gate on {self.on.name!r}: expected a number for above, below or both, "
                f"found above={self.above!r}, below={self.below!r}"
            )
        if len(limits) == 2 and not limits[0] < limits[1]:
            raise UsageError(f"gate on {self.on.name!r}: expected above < below, found {limits[0]} and {limits[1]}")
        if isinstance(self.on, Direction) and not self.on.gap:
            raise UsageError(
                f"gate on {self.on.name!r}: expected a direction with a gap, which is the unit of above and below, "
                "found a gap of 0; find it again with steer find"
            )

    @property
    def site(self) -> int:
        """Where it reads."""
        return self.on.site

    @property
    def key(self) -> tuple[int, float | None, float | None]:
        """Equal for gates that open on the same tokens."""
        return id(self.on), self.above, self.below

    def excludes(self, other: Gate) -> bool:
        """Whether no token can open both."""
        if self.on is not other.on:
            return False
        low = max(-math.inf if g.above is None else g.above for g in (self, other))
        high = min(math.inf if g.below is None else g.below for g in (self, other))
        return low >= high

    def open(self, amount: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
        """1 where it is open, else 0."""
        is_open = torch.ones_like(amount, dtype=torch.bool)
        if self.above is not None:
            is_open = is_open & (amount > self.above)
        if self.below is not None:
            is_open = is_open & (amount < self.below)
        return is_open.to(amount.dtype)


@dataclass(frozen=True, eq=False)
class When:
    """On which tokens a slider acts, and how much of it. The default is all of it, everywhere."""

    part: Part = "text"
    first: int | None = None
    """Only while the first n tokens of the reply are written."""
    after: int | None = None
    """Only once n tokens of the reply are written."""
    ramp: int | None = None
    """It grows evenly over n tokens of the reply (those from `after` on) until all of it acts."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.part not in ("text", "reply"):
            raise UsageError(f"when: expected part text or reply, found {self.part!r}")
        for name, least in (("first", 1), ("after", 0), ("ramp", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"when: {name}: expected a whole number of tokens from {least}, found {value!r}")
        if self.first is not None and self.after is not None and self.first <= self.after:
            raise UsageError(f"when: expected first > after, found first {self.first} and after {self.after}")

    @property
    def timed(self) -> bool:
        """Whether it depends on the position."""
        return self.part == "reply" or any(x is not None for x in (self.first, self.after, self.ramp))

    @property
    def always(self) -> bool:
        """Whether it acts on every token alike."""
        return not self.timed and self.gate is None

    @property
    def window(self) -> tuple[float, float, float]:
        """(start, end, ramp) in reply tokens: the share that acts on reply token `i` is
        `clamp((i - start + 1) / ramp, 0, 1)` where `i < end`, else 0. Tokens of the prompt are negative."""
        if not self.timed:
            return -math.inf, math.inf, 1.0
        end = math.inf if self.first is None else float(self.first)
        return float(self.after or 0), end, float(self.ramp or 1)

    def excludes(self, other: When) -> bool:
        """Whether no token can have both."""
        if self.gate is not None and other.gate is not None and self.gate.excludes(other.gate):
            return True
        (start, end, _), (other_start, other_end, _) = self.window, other.window
        return max(start, other_start) >= min(end, other_end)

    def share(self, index: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
        """The share of the slider that acts on reply tokens, gates left out."""
        start, end, ramp = self.window
        index = index.to(torch.get_default_dtype())
        return ((index - start + 1) / ramp).clamp(0, 1) * (index < end)


ALWAYS = When()

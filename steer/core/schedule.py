"""When a slider acts: on which tokens of a text, and while another projection is above or below a value.

Reply token `i` is computed by the pass over the position before it, so that position is the one that is moved: "the
first 5 tokens of the reply" are the 5 tokens that are chosen while the slider acts. Positions are absolute, no matter
which positions a KV cache leaves out of a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.errors import UsageError

PARALLEL = 1e-6
"""Singular values of a set of unit vectors below this share of the largest count as 0: vectors that are parallel except
for rounding are one direction."""
Part = Literal["text", "reply", "thoughts", "answer"]
"""`text`: the whole text, prompt included. `reply`: only the tokens of the reply. `thoughts`: its tokens up to the mark
that ends the thoughts, both marks included. `answer`: its tokens after that mark, and all of them where a model has no
thoughts. Whether a reply begins with thoughts is known once its first token is written. So that token, or all of a mark
that takes several, counts as thoughts wherever the model's template or vocabulary has such marks and the prompt has not
closed the thoughts already."""
PARTS: tuple[Part, ...] = get_args(Part)
THOUGHTS, ANSWER = PARTS.index("thoughts"), PARTS.index("answer")


@dataclass(frozen=True, eq=False)
class Gate:
    """Open on tokens where another direction or feature has a value above `above` and below `below`.

    Example:
        steer.Gate(anger, above=0.5)
    """

    on: Direction | Feature
    """The direction or feature that is read, at its own site and before anything is moved there. For a feature of
    several latents the mean is read."""
    above: float | None = None
    """In amounts: 0 is a direction's mean without its trait, 1 the mean with it; for a feature, 1 is its unit. None: no
    bound."""
    below: float | None = None
    """In the same unit. None: no bound."""

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
        """The gate reads the residual stream after this block."""
        return self.on.site

    @property
    def key(self) -> tuple[int, float | None, float | None]:
        """Equal for two gates on the same object that open on the same tokens."""
        return id(self.on), self.above, self.below

    def excludes(self, other: Gate) -> bool:
        """Whether no token can open both gates."""
        if not _alike(self.on, other.on):
            return False
        low = max(-math.inf if g.above is None else g.above for g in (self, other))
        high = min(math.inf if g.below is None else g.below for g in (self, other))
        return low >= high

    def open(self, amount: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
        """1 for the amounts at which the gate is open, else 0."""
        is_open = torch.ones_like(amount, dtype=torch.bool)
        if self.above is not None:
            is_open = is_open & (amount > self.above)
        if self.below is not None:
            is_open = is_open & (amount < self.below)
        return is_open.to(amount.dtype)


@dataclass(frozen=True, eq=False)
class Schedule:
    """On which tokens a slider acts, and with how much of its effect. By default fully, on every token.

    Example:
        opening = steer.Schedule(part="reply", first=20)
        with model.steered({steer.Slider(moral, when=opening): -1.0}):
            print(model.chat("My friend lied to me."))
    """

    part: Part = "text"
    first: int | None = None
    """Only while the first n tokens of the reply, or of that part of it, are written."""
    after: int | None = None
    """Only once n tokens of the reply, or of that part of it, are written."""
    ramp: int | None = None
    """The effect grows evenly over n tokens of the reply or part (counted from `after`) until all of it acts."""
    gate: Gate | None = None
    """Acts only on tokens on which this gate is open. None: on all."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UsageError(f"when: expected part {', '.join(PARTS[:-1])} or {PARTS[-1]}, found {self.part!r}")
        for name, least in (("first", 1), ("after", 0), ("ramp", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"when: {name}: expected a whole number of tokens from {least}, found {value!r}")
        if self.first is not None and self.after is not None and self.first <= self.after:
            raise UsageError(f"when: expected first > after, found first {self.first} and after {self.after}")

    @property
    def timed(self) -> bool:
        """Whether the effect depends on the token's position."""
        return self.part != "text" or any(x is not None for x in (self.first, self.after, self.ramp))

    @property
    def always(self) -> bool:
        """Whether it acts on every token alike."""
        return not self.timed and self.gate is None

    @property
    def window(self) -> tuple[float, float, float, int]:
        """(start, end, ramp, part) in reply tokens: the share that acts on reply token `i` is
        `clamp((i - start + 1) / ramp, 0, 1)` where `i < end`, else 0. Tokens of the prompt are negative. `part`:
        `THOUGHTS` if it acts on thoughts alone, `ANSWER` if on the answer, from whose first token `i` is counted then,
        else 0."""
        if not self.timed:
            return -math.inf, math.inf, 1.0, 0
        end = math.inf if self.first is None else float(self.first)
        part = PARTS.index(self.part) if self.part in ("thoughts", "answer") else 0
        return float(self.after or 0), end, float(self.ramp or 1), part

    def excludes(self, other: Schedule) -> bool:
        """Whether no token can be in both schedules."""
        if self.gate is not None and other.gate is not None and self.gate.excludes(other.gate):
            return True
        (start, end, _, part), (other_start, other_end, _, other_part) = self.window, other.window
        if part != other_part and ANSWER in (part, other_part):
            # Token `i` of the answer is token `i` of the reply or a later one.
            answer_start, reply_end = (start, other_end) if part == ANSWER else (other_start, end)
            return THOUGHTS in (part, other_part) or answer_start >= reply_end
        return max(start, other_start) >= min(end, other_end)


ALWAYS = Schedule()


def same_vector(a: Direction, b: Direction) -> bool:
    """Whether two directions are equal up to rounding, at the same site."""
    return a is b or (a.site == b.site and a.width == b.width and float(torch.dist(a.vector, b.vector)) < PARALLEL)


def _alike(a: Direction | Feature, b: Direction | Feature) -> bool:
    """Whether both give the same amounts when they are read; one file may have been loaded twice."""
    if isinstance(a, Direction) and isinstance(b, Direction):
        return same_vector(a, b) and (a.without_mean, a.gap) == (b.without_mean, b.gap)
    if isinstance(a, Feature) and isinstance(b, Feature):
        return a.dictionary is b.dictionary and (a.indices, a.units) == (b.indices, b.units)
    return False

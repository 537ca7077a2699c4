"""What calibrating finds: for each slider of a profile, the amounts between which replies hold together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from steer.errors import UsageError
from steer.values.move import Operation
from steer.values.profile import Profile

MAX_KL = 0.5
"""Nats per token. On the default merge's moralizing replies still answer their questions here (amounts -1.6 and 1.4);
at 0.7 below they ramble, at 1.1 above they preach instead of answering."""
REPETITION = 0.05
"""Share of repeated trigrams beyond the untouched replies'. One of the 24 replies that runs in circles is within it, as
chance may have it, two are not; replies that come apart are 0.2 beyond."""

End = Literal["KL", "repetition", "share", "distance", "operation"]
"""What ends a range: a limit that was passed, the share of the residual norm, the furthest amount tried, or that the
operation knows no amount beyond, for a cap none that caps anything."""


@dataclass(frozen=True)
class Limits:
    """What an amount may cost. Errors: UsageError for a limit that nothing can keep to."""

    kl: float = MAX_KL
    """KL(untouched || steered) in nats per token, on neutral chat and on plain prose alike."""
    repetition: float = REPETITION
    """Share of trigrams seen before in the same reply, beyond the untouched replies'."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}: expected a limit above 0, found {value}; give one such as {MAX_KL}")


@dataclass(frozen=True)
class TriedAmount:
    """One amount of one slider, the others off."""

    amount: float
    share: float | None
    """The move as a share of the site's median residual norm; None where that is not known."""
    kl_chat: float
    """KL(untouched || steered), nats per token of the untouched model's replies to neutral prompts."""
    kl_prose: float
    """The same on plain prose."""
    repetition: float | None = None
    """Of the replies at this amount; None where the KL divergence sufficed and none were written."""
    passed: bool = False
    """Whether it is within every limit it was held against."""

    @property
    def kl(self) -> float:
        """The larger of the two; nan, which is within no limit, where one of them is."""
        return math.nan if math.isnan(self.kl_chat) else max(self.kl_prose, self.kl_chat)

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result, which has no infinity and no nan."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class SliderCalibration:
    """What was found for one slider."""

    name: str
    place: int
    """In the profile's list."""
    operation: Operation
    stands: float
    """Its amount in the profile."""
    centre: float
    """Where it does nothing, or least."""
    tested: tuple[TriedAmount, ...]
    """By amount."""
    range: tuple[float, float] | None
    """The largest interval around the centre, from one tested amount to another, in which every tested amount passed.
    None where the centre did not: a clamp or a cap can cost more than the limit wherever it stands."""
    ends: tuple[End, End] | None
    """What ends it below and above."""

    @property
    def inside(self) -> bool:
        """Whether the profile's amount is within the range."""
        return self.range is not None and self.range[0] <= self.stands <= self.range[1]

    def at(self, amount: float) -> TriedAmount:
        """What was found at a tested amount."""
        return next(t for t in self.tested if t.amount == amount)

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        return {**asdict(self), "tested": [t.as_json() for t in self.tested], "inside": self.inside}


@dataclass(frozen=True)
class Calibration:
    """The safe ranges of a profile's sliders, each moved alone."""

    profile: str
    limits: Limits
    repetition: float
    """Of the untouched replies, drawn as the profile draws."""
    sliders: tuple[SliderCalibration, ...]
    seed: int
    tokens: int
    """That went through the model, prompts included."""

    def applied(self, profile: Profile) -> Profile:
        """The profile with the ranges in place of those it had."""
        ranges = {s.place: s.range for s in self.sliders}
        cleared = tuple(replace(s, range=None) if i in ranges else s for i, s in enumerate(profile.sliders))
        return replace(profile, sliders=cleared).with_ranges({i: r for i, r in ranges.items() if r is not None})

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        return {**asdict(self), "sliders": [s.as_json() for s in self.sliders]}

"""`steer calibrate`: how far each slider of a profile can be moved before the text falls apart.

For each slider alone, `Trial` measures KL divergence and repetition (`neutral_costs`) at several amounts; the amounts
within the `Limits` become the slider's range in the profile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.core.slider import Operation, Slider
from steer.errors import UsageError
from steer.measure.neutral_costs import PASSAGES, PROMPTS, REPLY_TOKENS, TEXT_TOKENS, TEXTS, NeutralCosts
from steer.model.profiles import sliders_in
from steer.model.sliders import BUDGET, as_edit
from steer.model.steered import SteeredModel

MAX_KL = 0.5
"""Nats per token. With the default merge's slider `moralizing`, replies at this KL still answer their questions
(amounts -1.6 and 1.4); at 0.7 on the negative side they ramble, at 1.1 on the positive side they preach instead of
answering."""
REPETITION = 0.05
"""Share of repeated trigrams beyond that of the untouched replies. It allows one of the 24 replies to repeat itself
endlessly, which may be chance, but not two; replies that fall apart are 0.2 beyond."""

End = Literal["KL", "repetition", "share", "distance", "operation"]
"""Why a range ends where it does.

"KL", "repetition": the next amount exceeds this limit.
"share": the displacement reached `BUDGET`, a share of the residual norm.
"distance": this is the furthest amount tried, `LONGEST`.
"operation": the operation has no amount beyond; a cap beyond it would cap nothing.
"""


@dataclass(frozen=True)
class Limits:
    """The highest cost that an amount may have. Errors: UsageError for a limit that is not a finite number above 0."""

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
    """One amount of one slider, measured with all other sliders off."""

    amount: float
    share: float | None
    """Displacement as a share of the site's median residual norm; None if the norm is not known."""
    kl_chat: float
    """KL(untouched || steered), nats per token of the untouched model's replies to neutral prompts."""
    kl_prose: float
    """KL(untouched || steered), nats per token of plain prose."""
    repetition: float | None = None
    """Mean repetition of replies at this amount; None if no replies were generated, as KL alone decided."""
    passed: bool = False
    """Whether the amount is within every limit that it was compared with."""

    @property
    def kl(self) -> float:
        """The larger of the two divergences. It is nan, which is within no limit, if one of them is nan."""
        return math.nan if math.isnan(self.kl_chat) else max(self.kl_prose, self.kl_chat)

    def as_json(self) -> dict[str, Any]:
        """The amount as JSON; infinity and nan, which JSON does not have, become null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class SliderCalibration:
    """The measured range of one slider."""

    name: str
    place: int
    """Index of the slider in the profile's list."""
    operation: Operation
    stands: float
    """The slider's amount in the profile."""
    centre: float
    """The amount at which the slider does nothing, or least."""
    tested: tuple[TriedAmount, ...]
    """All amounts tested, in ascending order."""
    range: tuple[float, float] | None
    """The largest interval around the centre, from one tested amount to another, in which every tested amount passed.
    None if the centre did not pass: a clamp or a cap can exceed the limit at every amount."""
    ends: tuple[End, End] | None
    """Why the range ends below and above."""

    @property
    def inside(self) -> bool:
        """Whether the profile's amount is within the range."""
        return self.range is not None and self.range[0] <= self.stands <= self.range[1]

    def at(self, amount: float) -> TriedAmount:
        """The measurement at one of the tested amounts."""
        return next(t for t in self.tested if t.amount == amount)

    def as_json(self) -> dict[str, Any]:
        """The slider's entry in the machine-readable result."""
        return {**asdict(self), "tested": [t.as_json() for t in self.tested], "inside": self.inside}


@dataclass(frozen=True)
class Calibration:
    """The safe ranges of a profile's sliders, each moved alone."""

    profile: str
    limits: Limits
    repetition: float
    """Mean repetition of the untouched replies, sampled with the profile's sampler."""
    sliders: tuple[SliderCalibration, ...]
    seed: int
    tokens: int
    """Tokens that went through the model, prompts included."""

    def applied(self, profile: Profile) -> Profile:
        """`profile` with the measured ranges in place of its old ones. A slider without a measured range has none."""
        ranges = {s.place: s.range for s in self.sliders}
        cleared = tuple(replace(s, range=None) if i in ranges else s for i, s in enumerate(profile.sliders))
        return replace(profile, sliders=cleared).with_ranges({i: r for i, r in ranges.items() if r is not None})

    def as_json(self) -> dict[str, Any]:
        """The calibration as JSON, for the machine-readable result."""
        return {**asdict(self), "sliders": [s.as_json() for s in self.sliders]}


LONGEST = 16.0
"""The furthest amount tried if the displacement of the residual stream is not known or stays within `BUDGET`."""
LADDER = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""The first amounts tried on each side, as shares of the distance from the centre to the end of the axis."""
ROUNDS = 4
"""Largest number of steps towards the amount where the KL divergence reaches its limit."""
CLOSE = 0.95
"""No further step is made once the KL reaches this share of the limit."""
AIM = 0.97
"""Share of the KL limit that a step aims at; below 1, so that most steps land inside the limit."""


def calibrate(
    model: SteeredModel,
    profile: Profile,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure the range of every slider of a profile, including those that are switched off.

    The first stage measures KL divergence on text that `steer find` never saw: a ladder of amounts in one pass, then
    steps towards the amount where KL reaches its limit. The second stage generates replies to held-out prompts at the
    amounts within that limit, in one batch, with the profile's sampler and the same random numbers for every amount,
    and measures their repetition.

    No amount is tried that moves the residual stream by more than `BUDGET` of its norm, where the chat begins to warn.
    Every slider acts on all tokens here, whatever its `when`: an amount that is safe on all tokens is safe on some.
    `on_tokens` is called with the number of tokens that went through the model since its last call.

        calibration = calibrate(model, profile, limits=Limits(kl=0.3))
        calibration.applied(profile).save("calibrated.yaml")

    Errors: those of `sliders_in`; UsageError for a profile without sliders; MismatchError for a slider that does not
    fit the model.
    """
    found = sliders_in(model, profile)
    if not found:
        raise UsageError(f"profile {profile.name!r}: expected a slider to calibrate, found none; add one")
    limits = limits or Limits()
    sliders = [Slider(slider.target, slider.operation, label=slider.name) for slider, _ in found]
    for slider in sliders:
        # A slider that does not fit the model raises here, before minutes of work.
        as_edit(model, [(slider, 1.0 if slider.neutral == 0.0 else 0.0)])
    costs = NeutralCosts(model, replace(profile.sampler, seed=seed), on_tokens)
    out = [
        _calibrated(Trial(costs, slider, limits), place, entry.amount)
        for place, (slider, (_, entry)) in enumerate(zip(sliders, found, strict=True))
    ]
    return Calibration(profile.name, limits, costs.repetition, tuple(out), seed, costs.tokens)


def expected_tokens(sliders: int) -> int:
    """An estimate of the number of tokens that `calibrate` runs through the model, for a progress bar."""
    prompt, replies = 40, PROMPTS * REPLY_TOKENS
    texts = TEXTS * (prompt + TEXT_TOKENS) + PASSAGES * (1 + TEXT_TOKENS)
    # Per slider: on both sides the ladder and one step, then replies at three amounts per side.
    return (1 + 6 * sliders) * (PROMPTS * prompt + replies) + (2 * len(LADDER) + 1 + 3) * texts * sliders


# One slider


@dataclass(frozen=True)
class Axis:
    """The interval of amounts within which a slider is tried."""

    centre: float
    """The amount at which the slider does nothing, or least."""
    below: float
    """Distance from the centre to the lowest amount; 0 if no lower amount makes sense."""
    above: float
    """Distance from the centre to the highest amount."""
    ends: tuple[End, End]
    """Why the interval ends below and above."""

    def reach(self, side: int) -> float:
        """Distance from the centre to the end on a side, -1 or 1."""
        return self.below if side < 0 else self.above

    def ladder(self, side: int) -> list[float]:
        """The first amounts tried on a side, from the centre outwards; empty if the side has no amounts."""
        reach = self.reach(side)
        return [self.rounded(self.centre + side * f * reach) for f in LADDER] if reach else []

    def rounded(self, amount: float) -> float:
        """`amount` rounded to two decimals, or to more if the axis is short."""
        scale = min(r for r in (self.below, self.above) if r > 0)
        return round(amount, max(2, 2 - math.floor(math.log10(scale)))) + 0.0


def axis_of(slider: Slider) -> Axis:
    """The interval to try a slider in: up to the amount that moves the residual stream by `BUDGET` of its norm, and
    never further than `LONGEST`."""
    target, operation = slider.target, slider.operation
    if operation == "ablate":
        return Axis(0.0, 0.0, 1.0, ("operation", "operation"))
    step = slider.share(2.0) if operation == "scale" else target.share(1.0)
    known = step > 0 and BUDGET / step < LONGEST  # false if step is nan
    # Rounded down, so that no amount exceeds the budget.
    reach, end = _rounded_down(BUDGET / step if known else LONGEST), "share" if known else "distance"
    if operation in ("add", "scale"):
        return Axis(slider.neutral or 0.0, reach, reach, (end, end))
    least, top = _least_and_top(slider)
    if operation == "clamp":
        return Axis(least, reach, reach, (end, end))
    # A higher cap does less (a lower one, if the gap is negative), until it caps nothing.
    far = abs(top - least) + reach
    return Axis(top, far, 0.0, (end, "operation")) if top >= least else Axis(top, 0.0, far, ("operation", end))


def _least_and_top(slider: Slider) -> tuple[float, float]:
    """(the target's value on an average token of neutral chat, a value that almost no token exceeds), as amounts."""
    d = slider.target
    if not isinstance(d, Direction):
        return 0.0, 2.0  # a feature is inactive, or at twice the 0.99 quantile of its positive activations
    if not d.gap:
        return 0.0, 0.0
    highest = max(d.mean, d.with_mean, d.without_mean) + 4 * d.std
    least, top = ((x - d.without_mean) / d.gap for x in (d.mean, highest))
    return round(least, 2), round(top, 2)


def _rounded_down(x: float) -> float:
    digits = max(2, 2 - math.floor(math.log10(x)))
    return math.floor(x * 10**digits) / 10**digits


def _calibrated(trial: Trial, place: int, stands: float) -> SliderCalibration:
    slider, axis = trial.slider, trial.axis
    trial.try_kl([*axis.ladder(-1), axis.centre, *axis.ladder(1)])
    if slider.operation == "clamp":
        # Clamping at the mean moves tokens least, but another amount may change the predictions less.
        trial.centre = min(trial.tested.values(), key=lambda t: t.kl).amount
    if not trial.fails(trial.centre):
        for _ in range(ROUNDS):
            trial.try_kl([a for s in trial.sides if (a := trial.step(s)) is not None])
        trial.try_replies([trial.centre, *(a for s in trial.sides for a in trial.rungs(s))])
    if not trial.fails(trial.centre):
        finer = [a for s in trial.sides for a in trial.between(s)]
        trial.try_kl(finer)
        trial.try_replies(finer)
    reached = None if trial.fails(trial.centre) else [trial.end(-1), trial.end(1)]
    return SliderCalibration(
        name=slider.name,
        place=place,
        operation=slider.operation,
        stands=stands,
        centre=trial.centre,
        tested=tuple(replace(t, passed=not trial.fails(a)) for a, t in sorted(trial.tested.items())),
        range=(reached[0][0], reached[1][0]) if reached else None,
        ends=(reached[0][1], reached[1][1]) if reached else None,
    )


class Trial:
    """The measurements of one slider so far, and the choice of the next amounts."""

    def __init__(self, costs: NeutralCosts, slider: Slider, limits: Limits) -> None:
        self.costs, self.slider, self.limits = costs, slider, limits
        self.axis = axis_of(slider)
        self.centre = self.axis.centre
        self.sides = [s for s in (-1, 1) if self.axis.reach(s) > 0]
        self.tested: dict[float, TriedAmount] = {}

    def try_kl(self, amounts: Sequence[float]) -> None:
        """Measure the KL divergence at those amounts that were not measured yet, in one pass."""
        new = [a for a in dict.fromkeys(amounts) if a not in self.tested]
        found = self.costs.divergences([self._edit(a) for a in new]) if new else []
        for amount, (chat, prose) in zip(new, found, strict=True):
            share = self.slider.share(amount)
            self.tested[amount] = TriedAmount(amount, None if math.isnan(share) else share, chat, prose)

    def try_replies(self, amounts: Sequence[float]) -> None:
        """Generate replies at those amounts that are within the limits so far, in one batch, and measure repetition."""
        within = [a for a in dict.fromkeys(amounts) if not self.fails(a)]
        for amount, again in zip(within, self.costs.repetitions([self._edit(a) for a in within]), strict=True):
            self.tested[amount] = replace(self.tested[amount], repetition=again)

    def fails(self, amount: float) -> End | None:
        """The limit that a measured amount exceeds; None if it exceeds none."""
        t = self.tested[amount]
        if not t.kl <= self.limits.kl:
            return "KL"
        beyond = (t.repetition or 0.0) - self.costs.repetition
        return None if beyond <= self.limits.repetition else "repetition"

    def bracket(self, side: int) -> tuple[list[float], float | None]:
        """(the amounts on a side before the first that fails, from the centre outwards; the first that fails, or
        None)."""
        inside: list[float] = []
        for a in sorted((a for a in self.tested if (a - self.centre) * side >= 0), key=lambda a: a * side):
            if self.fails(a):
                return inside, a
            inside.append(a)
        return inside, None

    def step(self, side: int) -> float | None:
        """The next amount to try on a side, where KL should come close to its limit; None if it is close already."""
        inside, beyond = self.bracket(side)
        if beyond is None or self._kl(inside[-1]) >= CLOSE * self.limits.kl:
            return None
        # KL grows about as the square of the amount, so its root is close to linear.
        low, high, aim = (math.sqrt(x) for x in (self._kl(inside[-1]), self._kl(beyond), AIM * self.limits.kl))
        share = (aim - low) / (high - low) if math.isfinite(high) else 0.5
        return self.axis.rounded(inside[-1] + (beyond - inside[-1]) * min(max(share, 0.02), 0.98))

    def rungs(self, side: int) -> list[float]:
        """The amounts on a side to generate replies at: the last one within the limits, and the ladder's amounts before
        it except the first, which moves little."""
        inside, _ = self.bracket(side)
        ladder = {*self.axis.ladder(-1)[1:], *self.axis.ladder(1)[1:]}
        return [a for a in inside if a in ladder or a == inside[-1]]

    def between(self, side: int) -> list[float]:
        """If the first amount that fails does so by repetition: three amounts between the last that passed and it."""
        inside, beyond = self.bracket(side)
        if beyond is None or self.fails(beyond) != "repetition":
            return []
        near = self._complete(inside)[-1]
        return [self.axis.rounded(near + f * (beyond - near)) for f in (0.25, 0.5, 0.75)]

    def end(self, side: int) -> tuple[float, End]:
        """(the last amount on a side such that it and all before it passed both limits; why the range ends there)."""
        inside, beyond = self.bracket(side)
        why = None if beyond is None else self.fails(beyond)
        return self._complete(inside)[-1], why or self.axis.ends[side > 0]

    def _complete(self, amounts: Sequence[float]) -> list[float]:
        return [a for a in amounts if self.tested[a].repetition is not None]

    def _kl(self, amount: float) -> float:
        return max(self.tested[amount].kl, 0.0)  # rounding can make a KL of 0 slightly negative

    def _edit(self, amount: float) -> Edit | None:
        return as_edit(self.costs.model, [(self.slider, amount)])

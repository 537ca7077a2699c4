"""Safe ranges: how far each slider of a profile can be moved before replies come apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steer.errors import UsageError
from steer.live.model import SteeredModel
from steer.live.profiles import sliders_in
from steer.live.sliders import BUDGET, as_edit
from steer.measure.calibration import Calibration, End, Limits, SliderCalibration, TriedAmount
from steer.measure.neutral_costs import PASSAGES, PROMPTS, REPLY_TOKENS, TEXT_TOKENS, TEXTS, NeutralCosts
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.profile import Profile
from steer.values.slider import Slider

LONGEST = 16.0
"""The furthest amount tried where no displacement of the residual stream says when to stop."""
LADDER = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of an axis that are tried on each side first."""
ROUNDS = 4
"""Steps at most towards the amount where the KL divergence reaches its limit."""
CLOSE = 0.95
"""Share of the limit from which no further step is made."""
AIM = 0.97
"""Share of the limit that a step aims at: it lands inside more often than not."""


def calibrate(
    model: SteeredModel,
    profile: Profile,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> Calibration:
    """Find the range of every slider of a profile, those that are switched off included.

    First the KL divergence, on text that finding never saw: a ladder of amounts in one pass, then steps towards the
    amount where it reaches its limit. Then replies to held-out prompts at the amounts within it, in one batch, drawn
    with the profile's sampler and for every amount with the same random numbers, and their repetition.

    No amount is tried that moves the residual stream by more than `BUDGET` of its norm, from which the chat warns.
    A slider is held to act on every token, whatever its `when`: what is safe always is safe at times.
    `on_tokens` is told how many more tokens went through the model.

    Errors: those of `sliders_in`; UsageError for a profile without sliders; MismatchError for a slider that does not
    fit the model.
    """
    found = sliders_in(model, profile)
    if not found:
        raise UsageError(f"profile {profile.name!r}: expected a slider to calibrate, found none; add one")
    limits = limits or Limits()
    sliders = [Slider(slider.target, slider.operation, label=slider.name) for slider, _ in found]
    for slider in sliders:
        # What does not fit the model is told before minutes of work.
        as_edit(model, [(slider, 1.0 if slider.neutral == 0.0 else 0.0)])
    costs = NeutralCosts(model, replace(profile.sampler, seed=seed), on_tokens)
    out = [
        _calibrated(Trial(costs, slider, limits), place, entry.amount)
        for place, (slider, (_, entry)) in enumerate(zip(sliders, found, strict=True))
    ]
    return Calibration(profile.name, limits, costs.repetition, tuple(out), seed, costs.tokens)


def expected_tokens(sliders: int) -> int:
    """About how many tokens `calibrate` lets through the model, for a progress bar."""
    prompt, replies = 40, PROMPTS * REPLY_TOKENS
    texts = TEXTS * (prompt + TEXT_TOKENS) + PASSAGES * (1 + TEXT_TOKENS)
    # On both sides the ladder and one step, and replies at three amounts.
    return (1 + 6 * sliders) * (PROMPTS * prompt + replies) + (2 * len(LADDER) + 1 + 3) * texts * sliders


# One slider


@dataclass(frozen=True)
class Axis:
    """The amounts of a slider that are tried."""

    centre: float
    """Where it does nothing, or least."""
    below: float
    """How far from the centre down, 0 where there is nothing."""
    above: float
    ends: tuple[End, End]
    """What stops it there."""

    def reach(self, side: int) -> float:
        """How far on a side, -1 or 1."""
        return self.below if side < 0 else self.above

    def ladder(self, side: int) -> list[float]:
        """The amounts that are tried on a side first, outwards; none where there are none."""
        reach = self.reach(side)
        return [self.rounded(self.centre + side * f * reach) for f in LADDER] if reach else []

    def rounded(self, amount: float) -> float:
        """In as many digits as say something."""
        scale = min(r for r in (self.below, self.above) if r > 0)
        return round(amount, max(2, 2 - math.floor(math.log10(scale)))) + 0.0


def axis_of(slider: Slider) -> Axis:
    """Where a slider is tried: as far as it moves the residual stream by `BUDGET` of its norm, at most `LONGEST`."""
    target, operation = slider.target, slider.operation
    if operation == "ablate":
        return Axis(0.0, 0.0, 1.0, ("operation", "operation"))
    step = slider.share(2.0) if operation == "scale" else target.share(1.0)
    known = step > 0 and BUDGET / step < LONGEST  # false where it is nan
    # Rounded down, so that no amount is beyond the budget.
    reach, end = _rounded_down(BUDGET / step if known else LONGEST), "share" if known else "distance"
    if operation in ("add", "scale"):
        return Axis(slider.neutral or 0.0, reach, reach, (end, end))
    least, top = _least_and_top(slider)
    if operation == "clamp":
        return Axis(least, reach, reach, (end, end))
    # A cap does ever less upwards, or downwards where the gap is negative, until it caps nothing.
    far = abs(top - least) + reach
    return Axis(top, far, 0.0, (end, "operation")) if top >= least else Axis(top, 0.0, far, ("operation", end))


def _least_and_top(slider: Slider) -> tuple[float, float]:
    """The amounts of what is read on an ordinary token of neutral chat, and on hardly any token."""
    d = slider.target
    if not isinstance(d, Direction):
        return 0.0, 2.0  # silent; twice the 0.99 quantile of the positive activations
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
        # The mean is where it moves tokens least, and not always where the model feels it least.
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
    """The amounts of one slider that were tried so far."""

    def __init__(self, costs: NeutralCosts, slider: Slider, limits: Limits) -> None:
        self.costs, self.slider, self.limits = costs, slider, limits
        self.axis = axis_of(slider)
        self.centre = self.axis.centre
        self.sides = [s for s in (-1, 1) if self.axis.reach(s) > 0]
        self.tested: dict[float, TriedAmount] = {}

    def try_kl(self, amounts: Sequence[float]) -> None:
        """Measure the divergence at amounts that are new, in one pass."""
        new = [a for a in dict.fromkeys(amounts) if a not in self.tested]
        found = self.costs.divergences([self._edit(a) for a in new]) if new else []
        for amount, (chat, prose) in zip(new, found, strict=True):
            share = self.slider.share(amount)
            self.tested[amount] = TriedAmount(amount, None if math.isnan(share) else share, chat, prose)

    def try_replies(self, amounts: Sequence[float]) -> None:
        """Write replies at amounts within the limit of the divergence, in one batch."""
        within = [a for a in dict.fromkeys(amounts) if not self.fails(a)]
        for amount, again in zip(within, self.costs.repetitions([self._edit(a) for a in within]), strict=True):
            self.tested[amount] = replace(self.tested[amount], repetition=again)

    def fails(self, amount: float) -> End | None:
        """Which limit an amount is beyond."""
        t = self.tested[amount]
        if not t.kl <= self.limits.kl:
            return "KL"
        beyond = (t.repetition or 0.0) - self.costs.repetition
        return None if beyond <= self.limits.repetition else "repetition"

    def bracket(self, side: int) -> tuple[list[float], float | None]:
        """The amounts on a side before the first that fails, outwards from the centre, and that one."""
        inside: list[float] = []
        for a in sorted((a for a in self.tested if (a - self.centre) * side >= 0), key=lambda a: a * side):
            if self.fails(a):
                return inside, a
            inside.append(a)
        return inside, None

    def step(self, side: int) -> float | None:
        """The next amount to try on a side: where the divergence should come near its limit. None when it has."""
        inside, beyond = self.bracket(side)
        if beyond is None or self._kl(inside[-1]) >= CLOSE * self.limits.kl:
            return None
        # What an amount costs grows as its square, or near that, so its root is close to a line.
        low, high, aim = (math.sqrt(x) for x in (self._kl(inside[-1]), self._kl(beyond), AIM * self.limits.kl))
        share = (aim - low) / (high - low) if math.isfinite(high) else 0.5
        return self.axis.rounded(inside[-1] + (beyond - inside[-1]) * min(max(share, 0.02), 0.98))

    def rungs(self, side: int) -> list[float]:
        """The amounts on a side to write replies at: the last one within the limit, and the ladder's before it but for
        the first, whose move is small."""
        inside, _ = self.bracket(side)
        ladder = {*self.axis.ladder(-1)[1:], *self.axis.ladder(1)[1:]}
        return [a for a in inside if a in ladder or a == inside[-1]]

    def between(self, side: int) -> list[float]:
        """Where replies repeat themselves too much: amounts between the last that passed and that one."""
        inside, beyond = self.bracket(side)
        if beyond is None or self.fails(beyond) != "repetition":
            return []
        near = self._complete(inside)[-1]
        return [self.axis.rounded(near + f * (beyond - near)) for f in (0.25, 0.5, 0.75)]

    def end(self, side: int) -> tuple[float, End]:
        """The last amount on a side that passed both limits with all before it, and what ended it."""
        inside, beyond = self.bracket(side)
        why = None if beyond is None else self.fails(beyond)
        return self._complete(inside)[-1], why or self.axis.ends[side > 0]

    def _complete(self, amounts: Sequence[float]) -> list[float]:
        return [a for a in amounts if self.tested[a].repetition is not None]

    def _kl(self, amount: float) -> float:
        return max(self.tested[amount].kl, 0.0)  # rounding may leave it below

    def _edit(self, amount: float) -> Edit | None:
        return as_edit(self.costs.model, [(self.slider, amount)])

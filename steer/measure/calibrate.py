"""`steer calibrate`: how far each slider of a profile can be moved before the text falls apart.

For each slider alone, `Trial` measures KL divergence and repetition at several amounts; the amounts within the `Limits`
become the slider's range in the profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.profile import Profile
from steer.core.sampler import PRESETS, Sampler
from steer.core.slider import Operation, Slider
from steer.core.trait import NeutralPrompts
from steer.errors import UsageError
from steer.files import without_nan
from steer.measure.contrast import Reply
from steer.measure.harness import (
    Text,
    answered,
    mean_repetition,
    plain_paragraphs,
    prose_texts,
    replies_under,
    row_costs,
)
from steer.model.loaded import as_messages
from steer.model.profiles import sliders_in
from steer.model.sliders import BUDGET, as_edit
from steer.model.steered import SteeredModel
from steer.progress import Advance

PROMPTS, REPLY_TOKENS = 24, 48
"""Number of prompts answered, the last ones of the held-out neutral prompts, and length of the replies that repetition
is measured on, tokens."""
TEXTS, PASSAGES, TEXT_TOKENS = 12, 6, 32
"""Number of untouched replies and of passages of plain prose that KL is computed on, and number of tokens of each."""
LONGEST = 16.0
"""The furthest amount tried if the displacement of the residual stream is not known or stays within `BUDGET`."""
LADDER = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""The first amounts tried on each side, as shares of the distance from the centre to the end."""
ROUNDS = 4
"""Largest number of steps towards the amount where the KL divergence reaches its limit."""
CLOSE, AIM = 0.95, 0.97
"""Shares of the KL limit. No further step is made once the KL reaches the first; a step aims at the second, so that
most steps land inside the limit."""

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

    kl: float = 0.5
    """KL(untouched || steered) in nats per token, on neutral chat and on plain prose alike. With the default merge's
    slider `moralizing`, replies at 0.5 still answer their questions (amounts -1.6 and 1.4); at 0.7 on the negative side
    they ramble, at 1.1 on the positive side they preach instead of answering."""
    repetition: float = 0.05
    """Share of trigrams seen before in the same reply, beyond the untouched replies'. 0.05 allows one of the 24 replies
    to repeat itself endlessly, which may be chance, but not two; replies that fall apart are 0.2 beyond."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}: expected a limit above 0, found {value}; give one such as 0.5")


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
        return without_nan(asdict(self))


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
        sliders = [asdict(s) | {"tested": [t.as_json() for t in s.tested], "inside": s.inside} for s in self.sliders]
        return asdict(self) | {"sliders": sliders}


def calibrate(
    model: SteeredModel,
    profile: Profile,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    on_tokens: Advance | None = None,
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
        Trial(costs, slider, limits).calibrated(place, entry.amount)
        for place, (slider, (_, entry)) in enumerate(zip(sliders, found, strict=True))
    ]
    return Calibration(profile.name, limits, costs.repetition, tuple(out), seed, costs.tokens)


def calibrate_direction(
    model: SteeredModel, direction: Direction, *, seed: int = 0, on_tokens: Advance | None = None
) -> SliderCalibration:
    """Measure the range of a direction's slider that adds it, as `calibrate` does for the sliders of a profile.

    `seed`: that of the replies. `on_tokens`: as for `calibrate`. Errors: MismatchError for a direction that does not
    fit the model.

        calibrate_direction(model, direction).range  # (-1.6, 1.4)
    """
    with model.untouched():
        costs = NeutralCosts(model, replace(PRESETS["plain"], seed=seed), on_tokens)
        return Trial(costs, Slider(direction), Limits()).calibrated(0, 0.0)


def expected_tokens(sliders: int) -> int:
    """An estimate of the number of tokens that `calibrate` runs through the model, for a progress bar."""
    prompt = 40
    texts = TEXTS * (prompt + TEXT_TOKENS) + PASSAGES * (1 + TEXT_TOKENS)
    # Per slider: on both sides the ladder and one step, then replies at three amounts per side.
    return (1 + 6 * sliders) * PROMPTS * (prompt + REPLY_TOKENS) + (2 * len(LADDER) + 1 + 3) * texts * sliders


class NeutralCosts:
    """Measures edits on text where they should change nothing: the untouched model's replies to held-out neutral
    prompts, which are generated with `sampler` here, and passages of prose. `steer find` never saw either.

    `on_tokens` is called with the number of tokens that went through the model since its last call.
    """

    def __init__(self, model: SteeredModel, sampler: Sampler, on_tokens: Advance | None = None) -> None:
        self.model, self._on_tokens = model, on_tokens
        self.sampler = replace(sampler, max_new_tokens=REPLY_TOKENS)
        self.tokens = 0
        """Tokens that went through the model so far, prompts included."""
        self.prompts = NeutralPrompts.load().held_out[-PROMPTS:]
        self._contexts = [model.prompt_ids(as_messages(p), thoughts=False) for p in self.prompts]
        untouched = self._replies([None])[0]
        self.repetition = mean_repetition([r.ids for r in untouched])
        """Mean repetition of the untouched replies."""
        texts = [(r.prompt_ids(model), r.ids[:TEXT_TOKENS]) for r in answered(model, untouched)[-TEXTS:]]
        self.replies: Sequence[Text] = texts
        # The second half of the prose: searches for bakes use the first.
        self.prose = prose_texts(model, plain_paragraphs()[1][:PASSAGES], TEXT_TOKENS)

    def repetitions(self, edits: Sequence[Edit | None]) -> list[float]:
        """The mean repetition of replies under each edit. For None that of the untouched replies is returned."""
        replies = self._replies([e for e in edits if e is not None])
        made = (mean_repetition([r.ids for r in group]) for group in replies)
        return [self.repetition if e is None else next(made) for e in edits]

    def divergences(self, edits: Sequence[Edit | None]) -> list[tuple[float, float]]:
        """KL(untouched || edited) under each edit: (on chat, on prose), nats per token; inf where a logit is not a
        number, and 0 for None."""
        moving = [e for e in edits if e is not None]
        chat, prose = (row_costs(self.model, t, moving, self._count)[1:] for t in (self.replies, self.prose))
        found = iter([(a, b) for (a, _), (b, _) in zip(chat, prose, strict=True)])
        return [(0.0, 0.0) if e is None else next(found) for e in edits]

    def _replies(self, edits: Sequence[Edit | None]) -> list[list[Reply]]:
        self._count(len(edits) * sum(map(len, self._contexts)))
        return replies_under(self.model, self.prompts, edits, self.sampler, on_tokens=self._count)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._on_tokens is not None:
            self._on_tokens(tokens)


class Trial:
    """The measurements of one slider so far, and the choice of the next amounts. A side is -1, below the centre, or
    1."""

    def __init__(self, costs: NeutralCosts, slider: Slider, limits: Limits) -> None:
        self.costs, self.slider, self.limits = costs, slider, limits
        self.centre, below, above, self._outermost = _axis(slider)
        self._reach = {side: reach for side, reach in ((-1, below), (1, above)) if reach > 0}
        self._ladder = {s: [self._rounded(self.centre + s * f * r) for f in LADDER] for s, r in self._reach.items()}
        self.tested: dict[float, TriedAmount] = {}

    def calibrated(self, place: int, stands: float) -> SliderCalibration:
        """Measure the slider's range."""
        below, above = (self._ladder.get(side, []) for side in (-1, 1))
        self.try_kl([*below, self.centre, *above])
        if self.slider.operation == "clamp":
            # Clamping at the mean moves tokens least, but another amount may change the predictions less.
            self.centre = min(self.tested.values(), key=lambda t: t.kl).amount
        if not self.fails(self.centre):
            for _ in range(ROUNDS):
                self.try_kl([a for s in self._reach if (a := self.step(s)) is not None])
            self.try_replies([self.centre, *(a for s in self._reach for a in self.rungs(s))])
        if not self.fails(self.centre):
            finer = [a for s in self._reach for a in self.between(s)]
            self.try_kl(finer)
            self.try_replies(finer)
        ends = None if self.fails(self.centre) else (self.end(-1), self.end(1))
        return SliderCalibration(
            name=self.slider.name,
            place=place,
            operation=self.slider.operation,
            stands=stands,
            centre=self.centre,
            tested=tuple(replace(t, passed=not self.fails(a)) for a, t in sorted(self.tested.items())),
            range=ends and (ends[0][0], ends[1][0]),
            ends=ends and (ends[0][1], ends[1][1]),
        )

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
        return self._rounded(inside[-1] + (beyond - inside[-1]) * min(max(share, 0.02), 0.98))

    def rungs(self, side: int) -> list[float]:
        """The amounts on a side to generate replies at: the last one within the limits, and the ladder's amounts before
        it except the first, which moves little."""
        inside, _ = self.bracket(side)
        ladder = {a for amounts in self._ladder.values() for a in amounts[1:]}
        return [a for a in inside if a in ladder or a == inside[-1]]

    def between(self, side: int) -> list[float]:
        """If the first amount that fails does so by repetition: three amounts between the last that passed and it."""
        inside, beyond = self.bracket(side)
        if beyond is None or self.fails(beyond) != "repetition":
            return []
        near = self._complete(inside)[-1]
        return [self._rounded(near + f * (beyond - near)) for f in (0.25, 0.5, 0.75)]

    def end(self, side: int) -> tuple[float, End]:
        """(the last amount on a side such that it and all before it passed both limits; why the range ends there)."""
        inside, beyond = self.bracket(side)
        why = None if beyond is None else self.fails(beyond)
        return self._complete(inside)[-1], why or self._outermost[side > 0]

    def _complete(self, amounts: Sequence[float]) -> list[float]:
        return [a for a in amounts if self.tested[a].repetition is not None]

    def _kl(self, amount: float) -> float:
        return max(self.tested[amount].kl, 0.0)  # rounding can make a KL of 0 slightly negative

    def _edit(self, amount: float) -> Edit | None:
        return as_edit(self.costs.model, [(self.slider, amount)])

    def _rounded(self, amount: float) -> float:
        """`amount` rounded to two decimals, or to more if the interval of amounts is short."""
        return round(amount, _decimals(min(self._reach.values()))) + 0.0


def _axis(slider: Slider) -> tuple[float, float, float, tuple[End, End]]:
    """(centre, distance to the lowest amount to try, to the highest, why these are the outermost).

    A slider is tried up to the amount that moves the residual stream by `BUDGET` of its norm, and never further than
    `LONGEST`. The distance is 0 on a side where no amount makes sense."""
    target, operation = slider.target, slider.operation
    if operation == "ablate":
        return 0.0, 0.0, 1.0, ("operation", "operation")
    step = slider.share(2.0) if operation == "scale" else target.share(1.0)
    known = step > 0 and BUDGET / step < LONGEST  # false if step is nan
    reach, end = BUDGET / step if known else LONGEST, "share" if known else "distance"
    scale = 10 ** _decimals(reach)
    reach = math.floor(reach * scale) / scale  # down, so that no amount exceeds the budget
    if operation in ("add", "scale"):
        return slider.neutral or 0.0, reach, reach, (end, end)
    least, top = _least_and_top(slider)
    if operation == "clamp":
        return least, reach, reach, (end, end)
    # A higher cap does less (a lower one, if the gap is negative), until it caps nothing.
    far = abs(top - least) + reach
    return (top, far, 0.0, (end, "operation")) if top >= least else (top, 0.0, far, ("operation", end))


def _decimals(scale: float) -> int:
    return max(2, 2 - math.floor(math.log10(scale)))


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

"""Whether features steer: latents and sets of latents compared with the difference-of-means direction.

The last step of `steer find --dictionary`. All candidates displace the residual stream by the same length. `screen`
chooses the best ones on fit topics, `dose_response` measures those on held-out topics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import MEASURE
from steer.core.slider import Slider
from steer.finding.choosing import displaced
from steer.finding.sites import KL_COST, NEUTRAL, REPETITION_COST
from steer.measure.contrast import Reply
from steer.measure.dose import AMOUNTS as DOSES
from steer.measure.dose import Point, Setting, measure_settings
from steer.measure.fluency import Reference, mean_repetition
from steer.measure.scorer import Scorer
from steer.model.loaded import Message
from steer.model.steered import SteeredModel

AMOUNTS = (-2.0, -1.0, 1.0)
"""Amounts that candidates are tried at; 1 is the displacement of the direction at amount 1."""
SETS = (2, 3, 5)
"""Sizes of the sets made of the first latents of the ranking."""
BEST_TOGETHER = 3
"""Size of the set made of the latents that steer best alone."""
TOPICS = 14
"""Number of fit topics of the screening, one reply each."""
SCREEN_TOKENS, DOSE_TOKENS = 48, 64
"""Lengths of the replies of the screening and of the dose response, tokens."""

Kind = Literal["latent", "set", "direction", "random"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A feature or direction to steer with. Amount 1 of every candidate displaces the residual stream by the same
    length, towards the trait."""

    name: str
    kind: Kind
    what: Feature | Direction

    def edit(self, amount: float) -> Edit:
        """The edit that adds the candidate at an amount."""
        if isinstance(self.what, Feature):
            return Edit(moves=(Slider(self.what, "add", amount),))
        return Edit(add=((self.what, amount),))

    def ablation(self) -> Edit | None:
        """The edit that ablates the candidate's latents that speak for the trait (clamps them to 0 and keeps the
        reconstruction error); None if it has no such latents. Latents that speak against the trait are left, as
        ablating them would raise it."""
        f = self.what
        positive = {i: u for i, u in zip(f.indices, f.units, strict=True) if u > 0} if isinstance(f, Feature) else {}
        if not positive or not isinstance(f, Feature):
            return None
        ablated = replace(f, indices=tuple(positive), units=tuple(positive.values()))
        return Edit(moves=(Slider(ablated, "ablate", 1.0),))


@dataclass(frozen=True)
class Tried:
    """The measurements of one amount on fit topics."""

    amount: float
    rate: float
    """Share of the replies that the text scorer calls the trait."""
    probability: float
    """The scorer's mean probability."""
    kl: float
    """KL to the untouched model on neutral replies, nats per token."""
    repetition: float
    """Share of trigrams seen before in the same reply."""


@dataclass(frozen=True, eq=False)
class Screened:
    """A candidate and its measurements on fit topics."""

    candidate: Candidate
    tried: tuple[Tried, ...]
    """The measurements at `AMOUNTS`."""
    ablated: Tried | None = None
    """The measurement with its latents ablated, amount 1; for sets and for the best single latent. Not in the merit."""

    @property
    def merit(self) -> float:
        """Mean probability at positive amounts, minus that at negative ones, minus the costs weighted as for sites."""
        below = np.mean([t.probability for t in self.tried if t.amount < 0])
        above = np.mean([t.probability for t in self.tried if t.amount > 0])
        kl, again = (np.mean([getattr(t, f) for t in self.tried]) for f in ("kl", "repetition"))
        return float(above - below - KL_COST * kl - REPETITION_COST * again)

    def as_json(self) -> dict[str, Any]:
        """The candidate's entry in the machine-readable result."""
        return _described(self.candidate) | {
            "merit": self.merit,
            "tried": [asdict(t) for t in self.tried],
            "ablated": asdict(self.ablated) if self.ablated else None,
        }


@dataclass(frozen=True, eq=False)
class Dose:
    """A dose response on held-out topics."""

    candidate: Candidate
    points: tuple[Point, ...]
    """One point per amount from -2 to 2; at 0 all candidates share the untouched model's."""

    @property
    def monotone(self) -> bool:
        """Whether the rate never falls from one amount to the next; equal rates are allowed."""
        rates = [p.rate for p in self.points]
        return rates == sorted(rates)

    def at(self, amount: float) -> Point:
        """The point at an amount."""
        return next(p for p in self.points if p.amount == amount)

    def as_json(self) -> dict[str, Any]:
        """The dose response as JSON, for the machine-readable result."""
        return _described(self.candidate) | {"monotone": self.monotone, "points": [p.as_json() for p in self.points]}


@dataclass(frozen=True, eq=False)
class SteeringCheck:
    """Which features steer, and which steer better than the difference-of-means direction."""

    share: float
    """Displacement at amount 1 of every candidate, as a share of the site's median residual norm."""
    untouched: Tried
    """The untouched model, on the topics of the screening."""
    screened: tuple[Screened, ...]
    """All candidates that were screened."""
    latent: Screened
    """The single latent of highest merit."""
    set: Screened | None
    """The set of highest merit; None if there are too few latents for a set."""
    doses: tuple[Dose, ...]
    """Dose responses on held-out topics: of that latent, that set, the direction, the random latent."""
    ablated: Point | None
    """On held-out topics: the set's latents ablated, or the single latent if there is no set."""

    def dose(self, kind: Kind) -> Dose | None:
        """The dose response of a kind of candidate; None if it has none."""
        return next((d for d in self.doses if d.candidate.kind == kind), None)

    def wins(self, dose: Dose) -> dict[float, bool]:
        """Per negative amount: whether the candidate lowers the rate further than the direction at the same
        displacement, at no more KL."""
        direction = self.dose("direction")
        assert direction is not None
        pairs = [(dose.at(a), direction.at(a)) for a in DOSES if a < 0]
        return {p.amount or 0.0: p.rate < d.rate and (p.kl or 0.0) <= (d.kl or 0.0) for p, d in pairs}

    def as_json(self) -> dict[str, Any]:
        """The check as JSON, for the machine-readable result."""
        return {
            "share_at_1": self.share,
            "untouched": asdict(self.untouched),
            "screened": [s.as_json() for s in self.screened],
            "best_latent": self.latent.candidate.name,
            "best_set": self.set.candidate.name if self.set else None,
            "doses": [d.as_json() for d in self.doses],
            "ablated": self.ablated.as_json() if self.ablated else None,
            "wins_over_direction": {
                d.candidate.name: {f"{a:g}": won for a, won in self.wins(d).items()}
                for d in self.doses
                if d.candidate.kind != "direction"
            },
        }


def screening_tokens(latents: int, topics: int = TOPICS) -> int:
    """Largest number of tokens that `screen` generates, for a progress bar."""
    moved = latents + 2 + len(SETS) + 1
    return (moved * len(AMOUNTS) + 1 + len(SETS) + 2) * topics * SCREEN_TOKENS


def dose_tokens(topics: int, samples: int = 2) -> int:
    """Largest number of tokens that `dose_response` generates, for a progress bar."""
    return (4 * (len(DOSES) - 1) + 2) * topics * samples * DOSE_TOKENS


def together(features: Sequence[Feature], length: float) -> Feature:
    """Join features into one, each latent in its own unit, scaled to displace by `length`. The name `L14/12-33` means
    latents 12 and 33 of site 14, 33 with negative sign."""
    first = features[0]
    indices = tuple(i for f in features for i in f.indices)
    units = tuple(u for f in features for u in f.units)
    signed = "".join(f"{'-' if u < 0 else '+'}{i}" for i, u in zip(indices, units, strict=True))
    joined = replace(first, name=f"L{first.site}/{signed.removeprefix('+')}", indices=indices, units=units)
    return displaced(joined, length)


def screen(
    model: SteeredModel,
    scorer: Scorer,
    direction: Direction,
    latents: Sequence[Feature],
    random: Feature,
    neutral: Sequence[Reply],
    *,
    topics: int = TOPICS,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[Tried, list[Screened]]:
    """Try single latents, sets of them, the direction and a random latent at three amounts on fit topics; see
    `AMOUNTS`, `SETS`, `BEST_TOGETHER`.

    `latents` are in the order of their rank, their units signed so that amount 1 raises the trait. Every candidate is
    scaled to the displacement of the direction at amount 1. `neutral` are neutral replies for KL. Each topic draws the
    same random numbers under every edit. `on_tokens` is called with the number of tokens written since its last call.
    Returns (the untouched model's measurements, the candidates).
    """
    length = abs(direction.gap)
    trial = _Trial(model, scorer, Reference.of(model, neutral[:NEUTRAL]), scorer.trait.fit[:topics], on_tokens)
    singles = [Candidate(f.name, "latent", displaced(f, length)) for f in latents]
    others = [
        Candidate(f"difference of means ({direction.name})", "direction", direction),
        Candidate(f"random ({random.name})", "random", displaced(random, length)),
    ]
    untouched = trial.tried([None], [0.0])[0]
    first = trial.screened([*singles, *others])
    by_merit = sorted(range(len(singles)), key=lambda i: -first[i].merit)
    groups = [list(range(n)) for n in SETS if n <= len(latents)]
    if len(latents) >= BEST_TOGETHER:
        groups.append(sorted(by_merit[:BEST_TOGETHER]))
    unique = [g for i, g in enumerate(groups) if g not in groups[:i]]
    joint = [together([latents[i] for i in group], length) for group in unique]
    sets = trial.screened([Candidate(f.name, "set", f) for f in joint])
    ablations = {s.candidate.name: s.candidate.ablation() for s in [*(first[i] for i in by_merit[:1]), *sets]}
    edits = {name: e for name, e in ablations.items() if e is not None}
    ablated = dict(zip(edits, trial.tried(list(edits.values()), [1.0] * len(edits)), strict=True))
    out = [*first[: len(singles)], *sets, *first[len(singles) :]]
    return untouched, [replace(s, ablated=ablated.get(s.candidate.name)) for s in out]


def best(screened: Sequence[Screened], kind: Kind) -> Screened | None:
    """The candidate of a kind with the highest merit on fit topics; None if there is no such candidate."""
    return max((s for s in screened if s.candidate.kind == kind), key=lambda s: s.merit, default=None)


def dose_response(
    model: SteeredModel,
    scorer: Scorer,
    untouched: Tried,
    screened: Sequence[Screened],
    reference: Reference,
    *,
    samples: int = 2,
    on_tokens: Callable[[int], None] | None = None,
) -> SteeringCheck:
    """Measure the best latent and set of the screening, the direction and the random latent on every held-out topic.

    `reference` holds the untouched model's replies to neutral prompts that the screening did not use. `samples` is the
    number of replies per topic.
    """
    latent, joint, direction, random = (best(screened, k) for k in ("latent", "set", "direction", "random"))
    assert latent is not None
    assert direction is not None
    candidates = [s.candidate for s in (latent, joint, direction, random) if s is not None]
    share = direction.candidate.what.share(1)
    settings = [Setting("untouched", amount=0.0)]
    for c in candidates:
        settings += [Setting(f"{c.name} {a:+g}", c.edit(a), a, abs(a) * share) for a in DOSES if a]
    removal = (joint or latent).candidate
    edit = removal.ablation()
    if edit is not None:
        settings.append(Setting(f"{removal.name} ablated", edit))
    points = measure_settings(
        model,
        scorer,
        settings,
        scorer.trait.held_out,
        reference,
        sampler=replace(MEASURE, max_new_tokens=DOSE_TOKENS),
        samples=samples,
        on_tokens=on_tokens,
    )
    doses, per = [], len(DOSES) - 1
    for i, c in enumerate(candidates):
        moved = points[1 + i * per : 1 + (i + 1) * per]
        doses.append(Dose(c, tuple(sorted([points[0], *moved], key=lambda p: p.amount or 0.0))))
    ablated = points[-1] if edit is not None else None
    return SteeringCheck(share, untouched, tuple(screened), latent, joint, tuple(doses), ablated)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Generates and scores replies to a few fit topics under many edits at once."""

    model: SteeredModel
    scorer: Scorer
    reference: Reference
    topics: Sequence[str]
    on_tokens: Callable[[int], None] | None

    def screened(self, candidates: Sequence[Candidate]) -> list[Screened]:
        tried = self.tried([c.edit(a) for c in candidates for a in AMOUNTS], [*AMOUNTS * len(candidates)])
        per = len(AMOUNTS)
        return [Screened(c, tuple(tried[i * per : (i + 1) * per])) for i, c in enumerate(candidates)]

    def tried(self, edits: Sequence[Edit | None], amounts: Sequence[float]) -> list[Tried]:
        chats: list[list[Message]] = [[{"role": "user", "content": t}] for t in self.topics]
        replies = self.model.replies(
            chats * len(edits),
            replace(MEASURE, max_new_tokens=SCREEN_TOKENS),
            [e for e in edits for _ in chats],
            keys=list(range(len(chats))) * len(edits),
            on_tokens=self.on_tokens,
        )
        moving = list(dict.fromkeys(e for e in edits if e is not None))
        costs: dict[Edit | None, float] = {None: 0.0}
        costs |= zip(moving, self.reference.kls(self.model, moving) if moving else (), strict=True)
        out = []
        for i, (edit, amount) in enumerate(zip(edits, amounts, strict=True)):
            ids = replies[i * len(chats) : (i + 1) * len(chats)]
            probabilities = self.scorer.probabilities([self.model.text(r) for r in ids])
            out.append(
                Tried(
                    amount=amount,
                    rate=float((probabilities > 0.5).mean()),
                    probability=float(probabilities.mean()),
                    kl=costs[edit],
                    repetition=mean_repetition(ids),
                )
            )
        return out


def _described(candidate: Candidate) -> dict[str, Any]:
    f = candidate.what
    latents = {"latents": list(f.indices), "units": list(f.units)} if isinstance(f, Feature) else {}
    return {"name": candidate.name, "kind": candidate.kind, **latents}

"""Whether features steer: latents and sets of them, moved as far as the difference-of-means direction is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from steer.features.choosing import displaced
from steer.features.contrast import Reply
from steer.live.model import Message, SteeredModel
from steer.measure.dose import AMOUNTS as DOSES
from steer.measure.dose import Point, Setting, measure_settings
from steer.measure.fluency import Reference, mean_repetition
from steer.measure.scorer import Scorer
from steer.measure.sites import KL_COST, NEUTRAL, REPETITION_COST
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.move import Move
from steer.values.sampler import MEASURE

AMOUNTS = (-2.0, -1.0, 1.0)
"""Amounts that candidates are tried at, in displacements of the direction's amount 1."""
SETS = (2, 3, 5)
"""How many of the first latents of the ranking are moved together."""
BEST_TOGETHER = 3
"""How many of the latents that steered best alone are moved together."""
TOPICS = 14
"""Fit topics of the screening, one reply each."""
SCREEN_TOKENS, DOSE_TOKENS = 48, 64
"""Lengths of the replies of the screening and of the dose response."""

Kind = Literal["latent", "set", "direction", "random"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something to move. Amount 1 of each displaces the residual stream by the same length, towards the trait."""

    name: str
    kind: Kind
    what: Feature | Direction

    def edit(self, amount: float) -> Edit:
        """It, added."""
        if isinstance(self.what, Feature):
            return Edit(moves=(Move(self.what, "add", amount),))
        return Edit(add=((self.what, amount),))

    def ablation(self) -> Edit | None:
        """Its latents that speak for the trait, taken out (clamped to 0), the reconstruction error kept; None where
        there are none. To take out a latent that speaks against the trait would raise it."""
        f = self.what
        mine = {i: u for i, u in zip(f.indices, f.units, strict=True) if u > 0} if isinstance(f, Feature) else {}
        if not mine or not isinstance(f, Feature):
            return None
        taken = replace(f, indices=tuple(mine), units=tuple(mine.values()))
        return Edit(moves=(Move(taken, "ablate", 1.0),))


@dataclass(frozen=True)
class Tried:
    """What one amount did on fit topics."""

    amount: float
    rate: float
    """Share of the replies that the text scorer calls the trait."""
    probability: float
    """The scorer's mean probability."""
    kl: float
    """Nats per token on neutral replies."""
    repetition: float
    """Share of trigrams seen before in the same reply."""


@dataclass(frozen=True, eq=False)
class Screened:
    """A candidate and what its amounts did on fit topics."""

    candidate: Candidate
    tried: tuple[Tried, ...]
    """At `AMOUNTS`."""
    ablated: Tried | None = None
    """Its latents taken out instead, amount 1; for sets and for the best single latent. Not weighed."""

    @property
    def merit(self) -> float:
        """Mean probability above, less that below, less what it costs: as sites are weighed."""
        below = np.mean([t.probability for t in self.tried if t.amount < 0])
        above = np.mean([t.probability for t in self.tried if t.amount > 0])
        kl, again = (np.mean([getattr(t, f) for t in self.tried]) for f in ("kl", "repetition"))
        return float(above - below - KL_COST * kl - REPETITION_COST * again)

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        return _named(self.candidate) | {
            "merit": self.merit,
            "tried": [asdict(t) for t in self.tried],
            "ablated": asdict(self.ablated) if self.ablated else None,
        }


@dataclass(frozen=True, eq=False)
class Dose:
    """A dose response on held-out topics."""

    candidate: Candidate
    points: tuple[Point, ...]
    """At amounts -2 to 2; the untouched model's is shared between candidates."""

    @property
    def monotone(self) -> bool:
        """Whether the rate never falls from one amount to the next; equal rates are allowed."""
        rates = [p.rate for p in self.points]
        return rates == sorted(rates)

    def at(self, amount: float) -> Point:
        """Its point at an amount."""
        return next(p for p in self.points if p.amount == amount)

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        return _named(self.candidate) | {"monotone": self.monotone, "points": [p.as_json() for p in self.points]}


@dataclass(frozen=True, eq=False)
class SteeringCheck:
    """Which features steer, and which win over the difference-of-means direction."""

    share: float
    """Amount 1 of everything here, as a share of the site's median residual norm."""
    untouched: Tried
    """The model as it is, on the topics of the screening."""
    screened: tuple[Screened, ...]
    latent: Screened
    """The single latent of most merit."""
    set: Screened | None
    """The set of most merit; None where there are too few latents for one."""
    doses: tuple[Dose, ...]
    """On held-out topics: that latent, that set, the direction, the random latent."""
    ablated: Point | None
    """On held-out topics: the set's latents taken out, or the single one's where there is no set."""

    def dose(self, kind: Kind) -> Dose | None:
        """The dose response of a kind; None where there is none."""
        return next((d for d in self.doses if d.candidate.kind == kind), None)

    def wins(self, dose: Dose) -> dict[float, bool]:
        """At which amounts below 0 it lowers the rate further than the direction, displaced as far, at no more KL."""
        direction = self.dose("direction")
        assert direction is not None
        pairs = [(dose.at(a), direction.at(a)) for a in DOSES if a < 0]
        return {p.amount or 0.0: p.rate < d.rate and (p.kl or 0.0) <= (d.kl or 0.0) for p, d in pairs}

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
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
    """At most how many tokens `screen` has written, for a progress bar."""
    moved = latents + 2 + len(SETS) + 1
    return (moved * len(AMOUNTS) + 1 + len(SETS) + 2) * topics * SCREEN_TOKENS


def dose_tokens(topics: int, samples: int = 2) -> int:
    """At most how many tokens `dose_response` has written, for a progress bar."""
    return (4 * (len(DOSES) - 1) + 2) * topics * samples * DOSE_TOKENS


def together(features: Sequence[Feature], length: float) -> Feature:
    """One feature of several, each latent by its own unit, scaled to move by `length`: `L14/12-33`, 33 downwards."""
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
    """Try single latents (in the order of their rank, units signed so that amount 1 raises the trait), sets of them,
    the direction and a random latent at three amounts on fit topics; see `AMOUNTS`, `SETS`, `BEST_TOGETHER`.

    Everything is displaced as far as the direction is at amount 1. Each topic draws the same random numbers under
    every edit. Returns what the untouched model does, and the candidates.
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
    """The candidate of a kind that has most merit on fit topics."""
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
    """Measure what was best on fit topics, the direction and the random latent on every held-out topic.

    `reference` is the untouched model on neutral prompts that the screening did not see.
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
    """Replies to a few fit topics under many edits at once."""

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


def _named(candidate: Candidate) -> dict[str, Any]:
    f = candidate.what
    latents = {"latents": list(f.indices), "units": list(f.units)} if isinstance(f, Feature) else {}
    return {"name": candidate.name, "kind": candidate.kind, **latents}

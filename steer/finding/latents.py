"""Which latents of a dictionary to try for a trait, and whether they steer.

`steer.finding.features` ranks all latents first (`steer.sae.ranking`). `choose_latents` reduces them to ten by AUROC,
attribution and output score. Then these, sets of them and the difference-of-means direction displace the residual
stream by the same length: `screen` chooses the best on fit topics, `dose_response` measures those on held-out topics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata

from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.lists import evenly
from steer.core.sampler import MEASURE
from steer.core.slider import Slider
from steer.core.trait import NeutralPrompts
from steer.errors import SteerError
from steer.finding.directions import NEUTRAL, merit
from steer.measure.contrast import Contrast, Reply
from steer.measure.harness import DOSES, SAMPLES, Point, Reference, Setting, measure_settings
from steer.measure.scorer import Scorer
from steer.model.steered import SteeredModel
from steer.progress import Advance, Bar
from steer.sae.attribution import attribution, output_scores
from steer.sae.logit_lens import logit_lens
from steer.sae.pooling import Pooled
from steer.sae.ranking import Ranking, auroc
from steer.sae.records import FeatureRecord

ATTRIBUTED, SCORED, TOP = 1000, 40, 10
"""Number of latents that get an attribution, that get an output score, and that are tried."""
Q = 0.05
"""False discovery rate below which a latent counts as detecting the trait."""
ATTRIBUTION_REPLIES, PROMPTS = 64, 8
"""Number of fit replies per side that attribution is computed on, and of neutral fit prompts for output scores."""
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


@dataclass(frozen=True)
class RankedLatent:
    """One of the latents chosen to be tried, with the numbers it was chosen by."""

    index: int
    sign: int
    """1 for a latent that fires more with the trait, -1 for one that fires less; from the fit replies."""
    fit_auroc: float
    """AUROC on fit replies of the pooled activation, by the pooling that separates the fit replies better."""
    auroc: float
    """AUROC on held-out replies, by the same pooling."""
    pooling: str
    """"max" or "mean"."""
    q: float
    """False discovery rate of the held-out AUROC, over all latents."""
    attribution: float
    """How much more the log-probability of replies with the trait depends on the latent than that of replies without,
    nats per token."""
    output_score: float
    """Gain in log-probability of the latent's own tokens when it is added, displaced as far as the direction is at
    amount 1, nats."""
    score: float
    """The latents are ordered by this; see `choose_latents`."""
    unit: float
    """The 0.99 quantile of its positive activations, from features.jsonl; without that file, the 0.99 quantile of its
    largest activation in each reply."""
    tokens: tuple[str, ...]
    """The tokens whose logits its decoder row raises most."""

    def feature(self, dictionary: Dictionary) -> Feature:
        """The latent as a Feature in its own unit, signed so that adding it raises the trait. The name `L14/-12` means
        latent 12 of site 14 with negative sign."""
        name = f"L{dictionary.site}/{'-' if self.sign < 0 else ''}{self.index}"
        return Feature.latent(dictionary, self.index, self.sign * self.unit, name)


def latent_units(fit: Sequence[Pooled], records: Sequence[FeatureRecord]) -> dict[int, float]:
    """Latent -> unit, for every latent that fires on the fit replies: the unit of its record, or without a record the
    0.99 quantile of its largest activation in each reply that it fires on."""
    highest = torch.cat([g.max for g in fit])
    known = {r.index: r.unit for r in records if r.unit > 0}
    live = (highest > 0).any(0).nonzero()[:, 0].tolist()
    return {j: known[j] if j in known else float((h := highest[:, j])[h > 0].quantile(0.99)) for j in live}


def feature_auroc(feature: Feature, groups: Sequence[Pooled]) -> float:
    """Held-out AUROC of the sum of a feature's activations, each in its unit and with its sign, pooled by largest or by
    mean activation, whichever separates the fit replies better. `groups`: as the arguments of `rank`."""
    weights, aurocs = 1 / torch.tensor(feature.units), []
    for pooling in ("max", "mean"):
        scores = [(getattr(g, pooling)[:, list(feature.indices)] @ weights).numpy()[:, None] for g in groups]
        aurocs.append((float(auroc(*scores[:2])[0]), float(auroc(*scores[2:])[0])))
    return max(aurocs, key=lambda pair: pair[0])[1]


def choose_latents(
    model: SteeredModel,
    d: Dictionary,
    contrast: Contrast,
    ranking: Ranking,
    units: Mapping[int, float],
    length: float,
    progress: Bar,
) -> tuple[RankedLatent, ...]:
    """The latents to try, best first.

    1. The 1,000 latents with the best fit AUROC get an attribution.
    2. The 40 of them with the lowest sum of the ranks by fit AUROC and by attribution get an output score. A latent
       that speaks against the trait is ranked by its attribution with the sign reversed.
    3. Ten of those are returned, those with q below 0.05 before the others, ordered by `score`: the distance of the
       fit AUROC from 0.5 times the share of the 40 that have a lower output score; 0 if the output score is not
       positive.

    `units` has a unit for each live latent. For its output score a latent displaces the residual stream by `length`, as
    it will when it is tried. Errors: SteerError when there is no live latent.
    """
    if not units:
        raise SteerError(
            f"dictionary {d.name}: expected latents that fire on the replies, found none; use a dictionary "
            f"trained on {model.name}"
        )
    first = [j for j in map(int, ranking.order) if j in units][:ATTRIBUTED]
    fit_auroc = np.where(ranking.pooling == "max", ranking.fit_auroc_max, ranking.fit_auroc_mean)
    with_, without = (evenly(side, ATTRIBUTION_REPLIES) for side in (contrast.fit_with, contrast.fit_without))
    with progress(f"{contrast.trait.name}: attribution", len(with_) + len(without), "replies") as advance:
        attributed = attribution(model, d, with_, without, first, on_rows=advance).numpy()
    sense = np.where(fit_auroc[first] >= 0.5, 1, -1)
    distance = np.abs(fit_auroc[first] - 0.5)
    ranks = rankdata(-distance, "ordinal") + rankdata(-sense * attributed, "ordinal")
    chosen = np.argsort(ranks, kind="stable")[:SCORED]
    latents = [first[i] for i in chosen]
    sense, distance, attributed = sense[chosen], distance[chosen], attributed[chosen]

    scored = [displaced(Feature.latent(d, j, units[j]), length) for j in latents]
    prompts = NeutralPrompts.load().fit[:PROMPTS]
    with progress(f"{contrast.trait.name}: output scores", len(scored) * len(prompts), "prompts") as advance:
        output = np.array(output_scores(model, d, scored, prompts, on_rows=advance))
    lower = (output[:, None] > output[None]).mean(1)
    score = np.where(output > 0, distance * lower, 0.0)
    order = np.lexsort((-score, ranking.q[latents] >= Q))[:TOP].tolist()
    top = [latents[k] for k in order]
    tokens = logit_lens(model, d.decoder_rows(top).float())[0]
    return tuple(
        RankedLatent(
            index=j,
            sign=int(sense[k]),
            fit_auroc=float(fit_auroc[j]),
            auroc=float(ranking.auroc[j]),
            pooling=str(ranking.pooling[j]),
            q=float(ranking.q[j]),
            attribution=float(attributed[k]),
            output_score=float(output[k]),
            score=float(score[k]),
            unit=units[j],
            tokens=tuple(text for text, _ in raised),
        )
        for k, j, raised in zip(order, top, tokens, strict=True)
    )


def displaced(feature: Feature, length: float) -> Feature:
    """The feature with its units scaled, so that `add` at amount 1 moves the residual stream by `length`."""
    factor = length / feature.direction.gap
    return replace(feature, units=tuple(u * factor for u in feature.units))


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

    def setting(self, amount: float, share: float = 0.0) -> Setting:
        """The setting that adds the candidate at an amount."""
        return Setting(f"{self.name} {amount:+g}", self.edit(amount), amount, share)

    def ablation(self) -> Edit | None:
        """The edit that ablates the candidate's latents that speak for the trait (clamps them to 0 and keeps the
        reconstruction error); None if it has no such latents. Latents that speak against the trait are left, as
        ablating them would raise it."""
        f = self.what
        if not isinstance(f, Feature) or max(f.units) <= 0:
            return None
        positive = {i: u for i, u in zip(f.indices, f.units, strict=True) if u > 0}
        ablated = replace(f, indices=tuple(positive), units=tuple(positive.values()))
        return Edit(moves=(Slider(ablated, "ablate", 1.0),))

    def as_json(self) -> dict[str, Any]:
        """The candidate as JSON, a feature with its latents."""
        f = self.what
        latents = {"latents": list(f.indices), "units": list(f.units)} if isinstance(f, Feature) else {}
        return {"name": self.name, "kind": self.kind, **latents}


@dataclass(frozen=True, eq=False)
class Response:
    """A candidate and what was measured at several amounts of it."""

    candidate: Candidate
    points: tuple[Point, ...]
    """By ascending amount. On fit topics: at `AMOUNTS`; on held-out ones: from -2 to 2, at 0 the untouched model."""
    ablated: Point | None = None
    """On fit topics, for sets and for the best single latent: with its latents ablated. Not in the merit."""

    @property
    def merit(self) -> float:
        """The figure by which candidates are compared, as sites are."""
        below = np.mean([p.probability for p in self.points if (p.amount or 0.0) < 0])
        above = np.mean([p.probability for p in self.points if (p.amount or 0.0) > 0])
        kl, again = (np.mean([getattr(p, f) for p in self.points]) for f in ("kl", "repetition"))
        return merit(float(below), float(above), float(kl), float(again))

    @property
    def monotone(self) -> bool:
        """Whether the rate never falls from one amount to the next; equal rates are allowed."""
        rates = [p.rate for p in self.points]
        return rates == sorted(rates)

    def at(self, amount: float) -> Point:
        """The point at an amount."""
        return next(p for p in self.points if p.amount == amount)


@dataclass(frozen=True, eq=False)
class SteeringCheck:
    """Which features steer, and which steer better than the difference-of-means direction."""

    share: float
    """Displacement at amount 1 of every candidate, as a share of the site's median residual norm."""
    untouched: Point
    """The untouched model, on the topics of the screening."""
    screened: tuple[Response, ...]
    """All candidates, on fit topics."""
    doses: tuple[Response, ...]
    """On held-out topics: the latent and the set of highest merit, if there is a set, the direction, the random
    latent."""
    ablated: Point | None
    """On held-out topics: the set's latents ablated, or the single latent if there is no set."""

    def dose(self, kind: Kind) -> Response | None:
        """The dose response of a kind of candidate; None if it has none."""
        return next((d for d in self.doses if d.candidate.kind == kind), None)

    def wins(self, dose: Response) -> dict[float, bool]:
        """Per negative amount: whether the candidate lowers the rate further than the direction at the same
        displacement, at no more KL."""
        direction = self.dose("direction")
        assert direction is not None
        pairs = {a: (dose.at(a), direction.at(a)) for a in DOSES if a < 0}
        return {a: p.rate < d.rate and p.kl <= d.kl for a, (p, d) in pairs.items()}

    def as_json(self) -> dict[str, Any]:
        """The check as JSON, for the machine-readable result."""

        def figures(p: Point | None) -> dict[str, Any] | None:
            return p and {f: p.as_json()[f] for f in ("amount", "rate", "probability", "kl", "repetition")}

        best = {kind: d.candidate.name if (d := self.dose(kind)) else None for kind in ("latent", "set")}
        return {
            "share_at_1": self.share,
            "untouched": figures(self.untouched),
            "screened": [
                s.candidate.as_json()
                | {"merit": s.merit, "tried": [figures(p) for p in s.points], "ablated": figures(s.ablated)}
                for s in self.screened
            ],
            "best_latent": best["latent"],
            "best_set": best["set"],
            "doses": [
                d.candidate.as_json() | {"monotone": d.monotone, "points": [p.as_json() for p in d.points]}
                for d in self.doses
            ],
            "ablated": self.ablated.as_json() if self.ablated else None,
            "wins_over_direction": {
                d.candidate.name: {f"{a:g}": won for a, won in self.wins(d).items()}
                for d in self.doses
                if d.candidate.kind != "direction"
            },
        }


def screening_tokens(latents: int) -> int:
    """Largest number of tokens that `screen` generates, for a progress bar."""
    moved = latents + 2 + len(SETS) + 1
    return (moved * len(AMOUNTS) + 1 + len(SETS) + 2) * TOPICS * SCREEN_TOKENS


def dose_tokens(topics: int) -> int:
    """Largest number of tokens that `dose_response` generates, for a progress bar."""
    return (4 * (len(DOSES) - 1) + 2) * topics * SAMPLES * DOSE_TOKENS


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
    on_tokens: Advance | None = None,
) -> tuple[Point, list[Response]]:
    """Try single latents, sets of them, the direction and a random latent at three amounts on fit topics; see
    `AMOUNTS`, `SETS`, `BEST_TOGETHER`.

    `latents` are in the order of their rank, their units signed so that amount 1 raises the trait. Every candidate is
    scaled to the displacement of the direction at amount 1. `neutral` are neutral replies for KL. Returns (the
    untouched model's measurements, the candidates).
    """
    length = abs(direction.gap)
    reference = Reference.of(model, neutral[:NEUTRAL])

    def measured(settings: Sequence[Setting]) -> list[Point]:
        return measure_settings(
            model, scorer, settings, scorer.trait.fit[:topics], reference, samples=1, perplexities=False,
            sampler=replace(MEASURE, max_new_tokens=SCREEN_TOKENS), on_tokens=on_tokens,
        )  # fmt: skip

    def responses(candidates: Sequence[Candidate]) -> list[Response]:
        points, per = measured([c.setting(a) for c in candidates for a in AMOUNTS]), len(AMOUNTS)
        return [Response(c, tuple(points[i * per : (i + 1) * per])) for i, c in enumerate(candidates)]

    (untouched,) = measured([Setting("untouched", amount=0.0)])
    singles = [Candidate(f.name, "latent", displaced(f, length)) for f in latents]
    others = [
        Candidate(f"difference of means ({direction.name})", "direction", direction),
        Candidate(f"random ({random.name})", "random", displaced(random, length)),
    ]
    first = responses([*singles, *others])
    by_merit = sorted(range(len(singles)), key=lambda i: -first[i].merit)
    groups = [tuple(range(n)) for n in SETS if n <= len(latents)]
    if len(latents) >= BEST_TOGETHER:
        groups.append(tuple(sorted(by_merit[:BEST_TOGETHER])))
    joint = [together([latents[i] for i in group], length) for group in dict.fromkeys(groups)]
    sets = responses([Candidate(f.name, "set", f) for f in joint])
    ablations = {s.candidate.name: s.candidate.ablation() for s in [*(first[i] for i in by_merit[:1]), *sets]}
    settings = [Setting(name, edit, 1.0) for name, edit in ablations.items() if edit is not None]
    ablated = {p.label: p for p in measured(settings)}
    out = [*first[: len(singles)], *sets, *first[len(singles) :]]
    return untouched, [replace(s, ablated=ablated.get(s.candidate.name)) for s in out]


def best(screened: Sequence[Response], kind: Kind) -> Candidate | None:
    """The candidate of a kind with the highest merit on fit topics; None if there is no such candidate."""
    of_kind = [s for s in screened if s.candidate.kind == kind]
    return max(of_kind, key=lambda s: s.merit).candidate if of_kind else None


def dose_response(
    model: SteeredModel,
    scorer: Scorer,
    untouched: Point,
    screened: Sequence[Response],
    reference: Reference,
    *,
    on_tokens: Advance | None = None,
) -> SteeringCheck:
    """Measure the best latent and set of the screening, the direction and the random latent on every held-out topic.

    `reference` holds the untouched model's replies to neutral prompts that the screening did not use.
    """
    latent, joint, direction, random = (best(screened, k) for k in ("latent", "set", "direction", "random"))
    assert latent is not None
    assert direction is not None
    candidates = [c for c in (latent, joint, direction, random) if c is not None]
    share = direction.what.share(1)
    settings = [Setting("untouched", amount=0.0)]
    settings += [c.setting(a, abs(a) * share) for c in candidates for a in DOSES if a]
    removal = joint or latent
    if edit := removal.ablation():
        settings.append(Setting(f"{removal.name} ablated", edit))
    points = measure_settings(
        model, scorer, settings, scorer.trait.held_out, reference,
        sampler=replace(MEASURE, max_new_tokens=DOSE_TOKENS), on_tokens=on_tokens,
    )  # fmt: skip
    doses, per = [], len(DOSES) - 1
    for i, c in enumerate(candidates):
        moved = points[1 + i * per : 1 + (i + 1) * per]
        doses.append(Response(c, tuple(sorted([points[0], *moved], key=lambda p: p.amount or 0.0))))
    return SteeringCheck(share, untouched, tuple(screened), tuple(doses), points[-1] if edit else None)

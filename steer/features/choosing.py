"""Which latents to try: those that tell a trait, that the model's words hang on, and that make it speak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.features.attribution import attribution, output_scores
from steer.features.contrast import Contrast, Reply
from steer.features.logit_lens import logit_lens
from steer.features.pooling import Pooled, pooled
from steer.features.ranking import Ranking, auroc
from steer.features.records import FeatureRecord
from steer.live.model import SteeredModel
from steer.progress import Advance
from steer.values.dictionary import Dictionary
from steer.values.feature import Feature
from steer.values.trait import NeutralPrompts

ATTRIBUTED, SCORED, TOP = 1000, 40, 10
"""How many latents are attributed, get an output score, and are tried."""
Q = 0.05
"""False discovery rate up to which a latent counts as telling the trait."""
ATTRIBUTION_REPLIES = 64
"""Fit replies a side that attribution is taken on."""
PROMPTS = 8
"""Neutral fit prompts that output scores are taken on."""


@dataclass(frozen=True)
class RankedLatent:
    """One of the latents that were tried."""

    index: int
    sign: int
    """1 for a latent that fires more with the trait, -1 for one that fires less; from the fit replies."""
    fit_auroc: float
    """Of the activation, by the pooling that told the fit replies apart better."""
    auroc: float
    """The same on held-out replies."""
    pooling: str
    q: float
    """False discovery rate of the held-out AUROC, over all latents."""
    attribution: float
    """How much more the replies with the trait hang on it, nats per token."""
    output_score: float
    """How much its own tokens gain when it is added, displaced as far as the direction is at amount 1, nats."""
    score: float
    """What the order is by; see `choose_latents`."""
    unit: float
    """The 0.99 quantile of its positive activations, from features.jsonl; without one, of its largest activation in
    each reply."""
    tokens: tuple[str, ...]
    """The tokens that its decoder row raises most."""

    def feature(self, dictionary: Dictionary) -> Feature:
        """It in its own unit, signed so that to add it raises the trait; `L14/-12` is latent 12 downwards."""
        name = f"L{dictionary.site}/{'-' if self.sign < 0 else ''}{self.index}"
        return Feature.latent(dictionary, self.index, self.sign * self.unit, name)


@dataclass(frozen=True, eq=False)
class PooledContrast:
    """Every latent's pooled activations on the four kinds of replies of a contrast."""

    fit_with: Pooled
    fit_without: Pooled
    held_with: Pooled
    held_without: Pooled

    @classmethod
    def read(
        cls, model: SteeredModel, d: Dictionary, contrast: Contrast, on_rows: Callable[[int], None] | None = None
    ) -> PooledContrast:
        """Run the replies through the model, as far as the dictionary's site."""
        c = contrast
        sides = (c.fit_with, c.fit_without, c.held_out_with, c.held_out_without)
        return cls(*(pooled(model, d, side, on_rows=on_rows) for side in sides))

    @property
    def all(self) -> tuple[Pooled, Pooled, Pooled, Pooled]:
        """As `rank` takes them."""
        return self.fit_with, self.fit_without, self.held_with, self.held_without

    @property
    def highest(self) -> Float[Tensor, "replies latents"]:
        """The largest activation in each fit reply."""
        return torch.cat([self.fit_with.max, self.fit_without.max])

    def units(self, records: Sequence[FeatureRecord]) -> dict[int, float]:
        """A unit for every latent that fires on the fit replies: the record's, else the 0.99 quantile of its largest
        activation in each reply that it fires on."""
        highest = self.highest
        known = {r.index: r.unit for r in records if r.unit > 0}
        live = (highest > 0).any(0).nonzero()[:, 0].tolist()
        return {j: known[j] if j in known else float(_positive(highest[:, j]).quantile(0.99)) for j in live}

    def auroc(self, feature: Feature) -> float:
        """Held-out AUROC of the sum of a feature's activations, each in its unit and with its sign, pooled by
        largest or by mean activation, whichever tells the fit replies apart better."""
        weights = 1 / torch.tensor(feature.units)
        at = list(feature.indices)
        told = {}
        for pooling in ("max", "mean"):
            scores = [(getattr(g, pooling)[:, at] @ weights).numpy()[:, None] for g in self.all]
            told[pooling] = float(auroc(*scores[:2])[0]), float(auroc(*scores[2:])[0])
        return max(told.values(), key=lambda pair: pair[0])[1]


def choose_latents(
    model: SteeredModel,
    d: Dictionary,
    contrast: Contrast,
    ranking: Ranking,
    units: Mapping[int, float],
    length: float,
    progress: Callable[[str, int | None, str], AbstractContextManager[Advance]],
) -> tuple[RankedLatent, ...]:
    """The latents to try, best first.

    Attribution on the 1,000 best by fit AUROC; output scores of the 40 best by the sum of the ranks of fit AUROC and
    attribution, both in the latent's sense: for the trait, or against it. Ten of them, those with q below 0.05 before
    the others, by `score`: the distance of the fit AUROC from 0.5, times the share of the 40 with a lower output
    score, and 0 for an output score that is not positive.
    `units` has a unit for each live latent; for its output score each displaces the residual stream by `length`, as
    it will when it is tried. Errors: SteerError when there is no live latent.
    """
    if not units:
        raise SteerError(
            f"dictionary {d.name}: expected latents that fire on the replies, found none; use a dictionary "
            f"trained on {model.name}"
        )
    first = [j for j in map(int, ranking.order) if j in units][:ATTRIBUTED]
    by_max = ranking.pooling == "max"
    fit_auroc = np.where(by_max, ranking.fit_auroc_max, ranking.fit_auroc_mean)
    with_, without = (_spread(side, ATTRIBUTION_REPLIES) for side in (contrast.fit_with, contrast.fit_without))
    with progress(f"{contrast.trait.name}: attribution", len(with_) + len(without), "replies") as advance:
        attributed = attribution(model, d, with_, without, first, on_rows=advance).numpy()
    sense = np.where(fit_auroc[first] >= 0.5, 1, -1)
    distance = np.abs(fit_auroc[first] - 0.5)
    ranks = _places(-distance) + _places(-sense * attributed)
    chosen = np.argsort(ranks, kind="stable")[:SCORED]

    scored = [displaced(Feature.latent(d, first[i], units[first[i]]), length) for i in chosen]
    prompts = NeutralPrompts.load().fit[:PROMPTS]
    with progress(f"{contrast.trait.name}: output scores", len(scored) * len(prompts), "prompts") as advance:
        output = np.array(output_scores(model, d, scored, prompts, on_rows=advance))
    lower = (output[:, None] > output[None]).mean(1)
    score = np.where(output > 0, distance[chosen] * lower, 0.0)
    told = ranking.q[[first[i] for i in chosen]] < Q
    order = np.lexsort((-score, ~told))[:TOP].tolist()
    tokens = logit_lens(model, d.decoder_rows([first[chosen[k]] for k in order]).float())[0]
    out = []
    for k, own in zip(order, tokens, strict=True):
        i = chosen[k]
        j = first[i]
        out.append(
            RankedLatent(
                index=j,
                sign=int(sense[i]),
                fit_auroc=float(fit_auroc[j]),
                auroc=float(ranking.auroc[j]),
                pooling=str(ranking.pooling[j]),
                q=float(ranking.q[j]),
                attribution=float(attributed[i]),
                output_score=float(output[k]),
                score=float(score[k]),
                unit=units[j],
                tokens=tuple(text for text, _ in own),
            )
        )
    return tuple(out)


def displaced(feature: Feature, length: float, name: str | None = None) -> Feature:
    """The feature with its units scaled, so that `add` at amount 1 moves the residual stream by `length`."""
    factor = length / feature.direction.gap
    return replace(feature, name=name or feature.name, units=tuple(u * factor for u in feature.units))


def _places(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Each value's place from 0, lowest first."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)


def _positive(values: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    return values[values > 0]


def _spread(replies: Sequence[Reply], most: int) -> list[Reply]:
    """At most so many of them, evenly spread over the topics."""
    return [replies[i] for i in sorted({round(x) for x in np.linspace(0, len(replies) - 1, min(most, len(replies)))})]

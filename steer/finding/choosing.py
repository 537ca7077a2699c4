"""Which latents of a dictionary to try for a trait, chosen by AUROC, attribution and output score.

`steer.finding.features` ranks all latents first (`steer.sae.ranking`); here the best are reduced to ten, which
`steer.finding.latents` then steers with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.feature import Feature
from steer.core.trait import NeutralPrompts
from steer.errors import SteerError
from steer.measure.contrast import Contrast, Reply
from steer.model.steered import SteeredModel
from steer.progress import Advance
from steer.sae.attribution import attribution, output_scores
from steer.sae.logit_lens import logit_lens
from steer.sae.pooling import Pooled, pooled
from steer.sae.ranking import Ranking, auroc
from steer.sae.records import FeatureRecord

ATTRIBUTED, SCORED, TOP = 1000, 40, 10
"""Number of latents that get an attribution, that get an output score, and that are tried."""
Q = 0.05
"""False discovery rate below which a latent counts as detecting the trait."""
ATTRIBUTION_REPLIES = 64
"""Number of fit replies per side that attribution is computed on."""
PROMPTS = 8
"""Number of neutral fit prompts that output scores are computed on."""


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
        """Run the replies through the model up to the dictionary's site and pool the activations. `on_rows` is called
        with the number of replies read since its last call."""
        c = contrast
        sides = (c.fit_with, c.fit_without, c.held_out_with, c.held_out_without)
        return cls(*(pooled(model, d, side, on_rows=on_rows) for side in sides))

    @property
    def all(self) -> tuple[Pooled, Pooled, Pooled, Pooled]:
        """The four groups in the order of the arguments of `steer.sae.ranking.rank`."""
        return self.fit_with, self.fit_without, self.held_with, self.held_without

    @property
    def highest(self) -> Float[Tensor, "replies latents"]:
        """The largest activation in each fit reply."""
        return torch.cat([self.fit_with.max, self.fit_without.max])

    def units(self, records: Sequence[FeatureRecord]) -> dict[int, float]:
        """Latent -> unit, for every latent that fires on the fit replies: the unit of its record, or without a record
        the 0.99 quantile of its largest activation in each reply that it fires on."""
        highest = self.highest
        known = {r.index: r.unit for r in records if r.unit > 0}
        live = (highest > 0).any(0).nonzero()[:, 0].tolist()
        return {j: known[j] if j in known else float(_positive(highest[:, j]).quantile(0.99)) for j in live}

    def auroc(self, feature: Feature) -> float:
        """Held-out AUROC of the sum of a feature's activations, each in its unit and with its sign, pooled by
        largest or by mean activation, whichever separates the fit replies better."""
        weights = 1 / torch.tensor(feature.units)
        indices = list(feature.indices)
        aurocs = {}
        for pooling in ("max", "mean"):
            scores = [(getattr(g, pooling)[:, indices] @ weights).numpy()[:, None] for g in self.all]
            aurocs[pooling] = float(auroc(*scores[:2])[0]), float(auroc(*scores[2:])[0])
        return max(aurocs.values(), key=lambda pair: pair[0])[1]


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
    detects = ranking.q[[first[i] for i in chosen]] < Q
    order = np.lexsort((-score, ~detects))[:TOP].tolist()
    tokens = logit_lens(model, d.decoder_rows([first[chosen[k]] for k in order]).float())[0]
    out = []
    for k, raised in zip(order, tokens, strict=True):
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
                tokens=tuple(text for text, _ in raised),
            )
        )
    return tuple(out)


def displaced(feature: Feature, length: float, name: str | None = None) -> Feature:
    """The feature with its units scaled, so that `add` at amount 1 moves the residual stream by `length`."""
    factor = length / feature.direction.gap
    return replace(feature, name=name or feature.name, units=tuple(u * factor for u in feature.units))


def _places(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The rank of each value, 0 for the lowest."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)


def _positive(values: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    return values[values > 0]


def _spread(replies: Sequence[Reply], most: int) -> list[Reply]:
    """At most `most` of the replies, evenly spread over the topics."""
    return [replies[i] for i in sorted({round(x) for x in np.linspace(0, len(replies) - 1, min(most, len(replies)))})]

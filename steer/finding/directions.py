"""Directions by difference of means at every site, and the choice of the site that steers best.

From contrast replies (`steer.measure.contrast`) `candidates` makes one vector per site. Sites that read the trait
equally well are tried on fit topics (`check_sites`) and one is chosen (`chosen`); `finished_direction` turns it into a
Direction with statistics and provenance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steer.baking.certificate import source_name
from steer.checkpoint.dtypes import dtype_name
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.fit import OUTLIER
from steer.core.lists import evenly
from steer.core.sampler import MEASURE
from steer.measure.contrast import Contrast, Reply, reply_means, reply_tokens
from steer.measure.harness import Reference, answers, mean_repetition
from steer.measure.scorer import Scorer
from steer.model.steered import SteeredModel
from steer.progress import Advance

NEAR_BEST = 0.06
"""Sites whose held-out AUROC is within this distance of the best count as equally good: twice the standard error of
an AUROC over 48 replies."""

BAND = (0.2, 0.8)
"""First and last depth tried, as shares of the model's depth: earlier sites carry words rather than behaviour, later
ones the next word."""
AMOUNTS = (-1.0, 1.0)
"""Amounts tried at each site."""
KL_COST = 2.0
"""Weight of KL in the merit: 0.1 nats at amount -1 cancel an effect of 0.2. A site that costs much at amount 1 falls
apart at 2."""
REPETITION_COST = 4.0
"""Weight of repetition in the merit: repeating a tenth of the trigrams cancels an effect of 0.4."""
SITES, TOPICS, TOKENS, NEUTRAL = 5, 16, 48, 8
"""Number of sites tried, of fit topics answered at each, of tokens per reply, and of the neutral replies that KL is
computed on."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """One difference-of-means vector per site, and how well each separates held-out replies."""

    contrast: Contrast
    vectors: Float[Tensor, "sites d"]
    """Unit norm, orthogonal to the neutral mean of their site."""
    auroc: tuple[float, ...]
    """Held-out AUROC of the mean-pooled projection, per site."""
    with_mean: Float[Tensor, " sites"]
    """Mean projection of the fit replies with the trait."""
    without_mean: Float[Tensor, " sites"]
    """Mean projection of the fit replies without the trait."""
    norm: Float[Tensor, " sites"]
    """Norm of the neutral mean, per site: the scale of the residual stream there."""
    plain: Candidates | None = None
    """The same before other traits' directions were projected out; None if none were."""


def steerable(auroc: Sequence[float]) -> list[int]:
    """Return the sites worth steering at, from the held-out AUROC of every site.

    They are the sites in `BAND` that read the trait as well as the best of all sites or, if none does, as the best of
    `BAND`. A late site may read a trait best, by the words that come next, and steers badly.
    """

    def as_good(sites: Sequence[int]) -> list[int]:
        return [s for s in sites if auroc[s] >= max(auroc[i] for i in sites) - NEAR_BEST]

    everywhere = range(len(auroc))
    band = in_band(everywhere, len(auroc))
    return [s for s in as_good(everywhere) if s in band] or as_good(band)


def in_band(sites: Sequence[int], depth: int) -> list[int]:
    """Return those of the sites that are in `BAND` of a model of `depth` blocks, or all, if none is."""
    return [s for s in sites if BAND[0] <= (s + 1) / depth <= BAND[1]] or list(sites)


def candidates(
    model: SteeredModel,
    contrast: Contrast,
    *,
    keep: Sequence[Float[Tensor, "sites d"]] = (),
    on_rows: Advance | None = None,
) -> Candidates:
    """Difference of means over response tokens (persona vectors, Chen et al. 2025; CAA, Panickssery et al. 2023).

    Each vector is made orthogonal to the neutral mean of its site, so that removing it does not shift ordinary text,
    and to the vectors of other traits in `keep`, so that adding it does not move their projections. `on_rows` is called
    with the number of replies read since its last call.
    """
    groups = [*contrast.sides, contrast.neutral]
    means = reply_means(model, [r for group in groups for r in group], on_rows=on_rows).double()
    fit_with, fit_without, held_with, held_without, neutral = means.split([len(g) for g in groups])
    centre = neutral.mean(0)
    labels = np.array([1] * len(held_with) + [0] * len(held_without))

    def orthogonal_to(*others: Tensor) -> Candidates:
        vectors = orthogonal(fit_with.mean(0) - fit_without.mean(0), *others)

        def project(group: Tensor) -> Tensor:
            return torch.einsum("nsd,sd->ns", group, vectors)

        scores = torch.cat([project(held_with), project(held_without)]).numpy()
        return Candidates(
            contrast=contrast,
            vectors=vectors.float(),
            auroc=tuple(float(roc_auc_score(labels, scores[:, site])) for site in range(scores.shape[1])),
            with_mean=project(fit_with).mean(0).float(),
            without_mean=project(fit_without).mean(0).float(),
            norm=centre.norm(dim=-1).float(),
        )

    plain = orthogonal_to(centre)
    return replace(orthogonal_to(centre, *(k.double() for k in keep)), plain=plain) if keep else plain


def orthogonal(vectors: Float[Tensor, "sites d"], *others: Float[Tensor, "sites d"]) -> Float[Tensor, "sites d"]:
    """The vectors without their components in the span of `others` at their site, scaled to unit norm (Gram-Schmidt).
    Of vectors in that span, rounding error is left, of a norm far below 1."""
    basis: list[Tensor] = []
    for vector in (*others, vectors):
        rest = vector
        for _ in range(2):  # once leaves rounding error
            for unit in basis:
                rest = rest - (rest * unit).sum(-1, keepdim=True) * unit
        basis.append(rest / rest.norm(dim=-1, keepdim=True).clamp_min(1e-9 * float(vector.norm())))
    return basis[-1]


def rough_direction(found: Candidates, site: int) -> Direction:
    """The direction at a site with only those statistics that need no further forward pass."""
    return Direction(
        name=found.contrast.trait.name,
        site=site,
        vector=found.vectors[site],
        with_mean=float(found.with_mean[site]),
        without_mean=float(found.without_mean[site]),
        residual_norm=float(found.norm[site]),
    )


def finished_direction(model: SteeredModel, found: Candidates, site: int, provenance: dict) -> Direction:
    """The direction at a site with its statistics on neutral response tokens and its provenance. `provenance` is added
    to the facts recorded here."""
    trait = found.contrast.trait
    about = {
        "trait": trait.name,
        "with": trait.with_instruction,
        "without": trait.without_instruction,
        "method": "difference of means over response tokens, orthogonal to the neutral mean",
        "auroc": [round(a, 4) for a in found.auroc],
        "fit_topics": len(trait.fit),
        "held_out_topics": len(trait.held_out),
    }
    return with_statistics(model, rough_direction(found, site), found.contrast.neutral, about | provenance)


def with_statistics(model: SteeredModel, rough: Direction, neutral: Sequence[Reply], provenance: dict) -> Direction:
    """The direction with its statistics on the tokens of neutral replies, and with the checkpoint in its provenance.

    Tokens whose norm is over `OUTLIER` times the median are left out of the statistics.
    """
    tokens = reply_tokens(model, neutral, rough.site)
    norms = tokens.norm(dim=-1)
    ordinary = norms <= OUTLIER * norms.median()
    projection = tokens[ordinary] @ rough.vector
    return replace(
        rough,
        mean=float(projection.mean()),
        std=float(projection.std()),
        residual_norm=float(norms[ordinary].median()),
        provenance={
            # Only the folder's name: directions are shared, and must not reveal paths of this machine.
            "checkpoint": source_name(Path(model.name)) if Path(model.name).is_dir() else model.name,
            "sketch": model.sketch().to_header(),
            "dtype": dtype_name(model.hf.dtype),
            "neutral_tokens": int(ordinary.sum()),
            "outlier_tokens_left_out": int((~ordinary).sum()),
            "versions": {p: version(p) for p in ("torch", "transformers")},
            **provenance,
        },
    )


@dataclass(frozen=True)
class SiteCheck:
    """The measured effect of steering at one site."""

    site: int
    auroc: float
    """Held-out AUROC of the site's projection."""
    below: float
    """Mean trait probability of replies at amount -1."""
    above: float
    """Mean trait probability of replies at amount 1."""
    repetition: float
    """Mean repetition of the replies at both amounts."""
    kl: float
    """KL at amount -1 on neutral prompts, nats per token."""
    error: float
    """Standard error over topics of the effect, the mean of `above - below`."""

    @property
    def merit(self) -> float:
        """Effect minus weighted costs, by which sites are compared."""
        return merit(self.below, self.above, self.kl, self.repetition)


def merit(below: float, above: float, kl: float, repetition: float) -> float:
    """Return what steering achieves minus its weighted costs. `below`, `above`: the trait's mean probability at
    negative and at positive amounts."""
    return above - below - KL_COST * kl - REPETITION_COST * repetition


def chosen(checks: Sequence[SiteCheck], depth: int) -> int:
    """The site nearest to the middle of `depth` blocks, of those whose merit is not clearly lower than the best.

    Clearly lower means by more than two standard errors of the difference. A few replies per site leave noise in its
    merit: among sites that cannot be distinguished, which one has the best number is chance and changes with the seed
    and the machine; the middle does not. The rule is the one-standard-error rule (Breiman et al. 1984) with the error
    of the difference in place of that of the best; that directions steer best from the middle of a model is from
    Rimsky et al. 2024.
    """
    best = max(checks, key=lambda c: c.merit)
    return middle([c.site for c in checks if best.merit - c.merit <= 2 * math.hypot(best.error, c.error)], depth)


def middle(sites: Sequence[int], depth: int) -> int:
    """The site nearest to the middle of `depth` blocks, the lower one of two."""
    return min(sites, key=lambda site: (abs(site - (depth - 1) / 2), site))


def check_sites(
    model: SteeredModel, found: Candidates, scorer: Scorer, *, on_tokens: Advance | None = None
) -> list[SiteCheck]:
    """Steer at each of `SITES` sites by amounts -1 and 1, and measure the replies to fit topics.

    The sites are spread evenly over those in `BAND` that read the trait as well as the best. All replies are generated
    in one batch.
    """
    tried = evenly(steerable(found.auroc), SITES)
    edits = [Edit(add=((rough_direction(found, s), a),)) for s in tried for a in AMOUNTS]
    topics, sampler = found.contrast.trait.fit[:TOPICS], replace(MEASURE, max_new_tokens=TOKENS)
    replies = [r for (r,) in answers(model, [scorer], [topics], edits, sampler, on_tokens=on_tokens)]
    costs = Reference.of(model, found.contrast.neutral[:NEUTRAL]).kls(model, edits[::2])
    return [
        SiteCheck(
            site=site,
            auroc=found.auroc[site],
            below=low.scores.probability,
            above=high.scores.probability,
            repetition=mean_repetition([*low.ids, *high.ids]),
            kl=kl,
            error=float((high.probabilities - low.probabilities).std() / np.sqrt(len(topics))),
        )
        for site, low, high, kl in zip(tried, replies[::2], replies[1::2], costs, strict=True)
    ]

"""Directions by difference of means, computed at every site at once.

Takes the contrast replies (`steer.measure.contrast`) and gives `Candidates`; `sites` then chooses one site, and
`finished_direction` turns it into a Direction with statistics and provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from steer.measure.contrast import Contrast
from steer.measure.residuals import reply_means, reply_tokens
from steer.model.steered import SteeredModel

NEAR_BEST = 0.06
"""Sites whose held-out AUROC is within this distance of the best count as equally good: twice the standard error of
an AUROC over 48 replies."""


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

    @property
    def readable(self) -> list[int]:
        """Sites whose AUROC is within `NEAR_BEST` of the best, in order."""
        best = max(self.auroc)
        return [site for site, a in enumerate(self.auroc) if a >= best - NEAR_BEST]


def candidates(model: SteeredModel, contrast: Contrast, *, on_rows: Callable[[int], None] | None = None) -> Candidates:
    """Difference of means over response tokens (persona vectors, Chen et al. 2025; CAA, Panickssery et al. 2023).

    Each vector is made orthogonal to the neutral mean of its site, so that removing it does not shift ordinary text.
    `on_rows` is called with the number of replies read since its last call.
    """
    groups = [
        contrast.fit_with,
        contrast.fit_without,
        contrast.held_out_with,
        contrast.held_out_without,
        contrast.neutral,
    ]
    means = reply_means(model, [r for group in groups for r in group], on_rows=on_rows).double()
    fit_with, fit_without, held_with, held_without, neutral = means.split([len(g) for g in groups])
    centre = neutral.mean(0)
    vectors = orthogonal(fit_with.mean(0) - fit_without.mean(0), centre)

    def project(group: Tensor) -> Tensor:
        return torch.einsum("nsd,sd->ns", group, vectors)

    scores = torch.cat([project(held_with), project(held_without)]).numpy()
    labels = np.array([1] * len(held_with) + [0] * len(held_without))
    return Candidates(
        contrast=contrast,
        vectors=vectors.float(),
        auroc=tuple(float(roc_auc_score(labels, scores[:, site])) for site in range(scores.shape[1])),
        with_mean=project(fit_with).mean(0).float(),
        without_mean=project(fit_without).mean(0).float(),
        norm=centre.norm(dim=-1).float(),
    )


def orthogonal(vectors: Float[Tensor, "sites d"], to: Float[Tensor, "sites d"]) -> Float[Tensor, "sites d"]:
    """The vectors without their component along `to`, scaled to unit norm. The projection is removed twice, as once
    leaves rounding error (Gram-Schmidt)."""
    unit = to / to.norm(dim=-1, keepdim=True)
    for _ in range(2):
        vectors = vectors - (vectors * unit).sum(-1, keepdim=True) * unit
    return vectors / vectors.norm(dim=-1, keepdim=True)


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
    """The direction at a site with its statistics on neutral response tokens and its provenance.

    Tokens whose norm is over 10 times the median are left out of the statistics. `provenance` is added to the facts
    recorded here.
    """
    tokens = reply_tokens(model, found.contrast.neutral, site)
    norms = tokens.norm(dim=-1)
    ordinary = norms <= 10 * norms.median()
    projection = tokens[ordinary] @ found.vectors[site]
    trait = found.contrast.trait
    return Direction(
        name=trait.name,
        site=site,
        vector=found.vectors[site],
        mean=float(projection.mean()),
        std=float(projection.std()),
        with_mean=float(found.with_mean[site]),
        without_mean=float(found.without_mean[site]),
        residual_norm=float(norms[ordinary].median()),
        provenance={
            # Only the folder's name: directions are shared, and must not reveal paths of this machine.
            "checkpoint": source_name(Path(model.name)) if Path(model.name).is_dir() else model.name,
            "sketch": model.sketch().to_header(),
            "dtype": dtype_name(model.hf.dtype),
            "trait": trait.name,
            "method": "difference of means over response tokens, orthogonal to the neutral mean",
            "auroc": [round(a, 4) for a in found.auroc],
            "fit_topics": len(trait.fit),
            "held_out_topics": len(trait.held_out),
            "neutral_tokens": int(ordinary.sum()),
            "outlier_tokens_left_out": int((~ordinary).sum()),
            "versions": {p: version(p) for p in ("torch", "transformers")},
            **provenance,
        },
    )

"""Measures how well a dictionary reconstructs a residual stream. Training and `model.fit_check` use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.errors import UsageError

OUTLIER = 10.0
"""Tokens whose norm is over this many times the median are left out: attention sinks, BOS."""

AT_ONCE = 1 << 24
"""Activations held in memory at a time: 64 MB in fp32."""


@dataclass(frozen=True)
class Fit:
    """Fit of a dictionary, measured on tokens of the residual stream, outliers left out."""

    fvu: float
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, mean over the same tokens."""
    l0: float
    """Mean number of active latents per token."""
    alive: float
    """Share of the latents that fired at least once."""
    tokens: int
    """Number of tokens measured."""
    outliers: int
    """Number of tokens left out because of their norm."""


@torch.no_grad()
def measure_fit(dictionary: Dictionary, batches: Iterable[Float[Tensor, "n d"]]) -> Fit:
    """Measure the fit in one pass over batches of residual vectors; sums are in fp64.

    A token is an outlier if its norm is over ten times the dictionary's `norm`, or over ten times the first batch's
    median where the dictionary has none. Errors: UsageError if no token is left.
    """
    norm = dictionary.norm
    error = squares = active = 0.0
    centre: Tensor | None = None
    total = torch.zeros((), dtype=torch.float64)
    fired = torch.zeros(dictionary.latents, dtype=torch.bool)
    tokens = outliers = 0
    for batch in batches:
        x = batch.to(torch.promote_types(batch.dtype, torch.float32))
        norms = x.norm(dim=-1)
        norm = float(norms.median()) if norm is None else norm
        x = x[norms <= OUTLIER * norm]
        outliers += len(batch) - len(x)
        if not len(x):
            continue
        for part in x.split(max(1, AT_ONCE // dictionary.latents)):
            acts = dictionary.encode(part)
            error += float((part - dictionary.decode(acts, like=part)).double().square().sum())
            active += int((acts > 0).sum())
            fired |= (acts > 0).any(0).cpu()
        wide = x.double()
        # Squares are summed about a point near the mean, so that no digits are lost when the mean's part is subtracted.
        centre = wide.mean(0) if centre is None else centre
        total = total + (wide - centre).sum(0)
        squares += float((wide - centre).square().sum())
        tokens += len(x)
    if centre is None:
        raise UsageError(
            f"dictionary {dictionary.name!r}: its fit wants at least one token with a norm under "
            f"{OUTLIER:g} x {norm if norm is not None else 'the median'}, found none"
        )
    squares -= float(total.square().sum()) / tokens
    fvu = error / squares if squares else float("nan")
    return Fit(fvu, active / tokens, float(fired.double().mean()), tokens, outliers)

"""Exact k-sparse arithmetic: choose the active latents, then run the forward and backward pass over those only.

The kernels of `objectives.SparseObjective`. An inactive latent has zero gradient, so nothing is approximated: per token
a dense step takes `12 d m` FLOPs, this one `2 d m + 10 d k`. The remaining dense product, that of the encoder, is used
only to choose the latents, so it may run in bf16; the chosen values are computed again in fp32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# torch warns once per process whatever part of CSR is used. The one product used here is covered by tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

GROUPS = 16
"""Elements per strided group; the first pass of `top_k` compares the groups' maxima."""


@dataclass(frozen=True, eq=False)
class Active:
    """The active latents of a batch, as the entries of a sparse matrix `[n tokens, m latents]` in row order (CSR)."""

    rows: Int[Tensor, " entries"]
    """The token of each entry, ascending."""
    latents: Int[Tensor, " entries"]
    """The latent of each entry."""
    offsets: Int[Tensor, " n+1"]
    """Index of each token's first entry; the last element is the number of entries."""


def top_k(scores: Float[Tensor, "n m"], k: int) -> Active:
    """The k largest scores of every row, exactly; which of equal scores is taken is not defined.

    The k largest values lie in the k groups with the largest maxima, so two small top-k passes replace a large one.
    """
    n, m = scores.shape
    groups = m // GROUPS
    if m % GROUPS or groups < 2 * k:
        chosen = scores.topk(k, dim=1, sorted=False).indices
    else:
        # Strided groups, so that the maximum over a group reads contiguous memory.
        grouped = scores.view(n, GROUPS, groups)
        best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
        candidates = grouped.gather(2, best[:, None].expand(n, GROUPS, k)).reshape(n, GROUPS * k)
        inside = candidates.topk(k, dim=1, sorted=False).indices
        chosen = (inside // k) * groups + best.gather(1, inside % k)
    rows = torch.arange(n, device=scores.device).repeat_interleave(k)
    offsets = torch.arange(0, n * k + 1, k, device=scores.device)
    return Active(rows, chosen.reshape(-1), offsets)


def above(scores: Float[Tensor, "n m"], floor: float) -> tuple[Int[Tensor, " found"], Float[Tensor, " found"]]:
    """(flat indices, values as fp32) of the scores above `floor`."""
    flat = scores.reshape(-1)
    places = torch.nonzero(flat > floor).squeeze(1)
    return places, flat[places].float()


def largest(scores: Float[Tensor, "n m"], places: Tensor, values: Float[Tensor, " found"], count: int) -> Active:
    """The `count` largest of the values that `above` returned, as entries in row order."""
    n, m = scores.shape
    if len(values) > count:
        places = places[values.topk(count, sorted=False).indices].sort().values
    rows = places // m
    offsets = torch.zeros(n + 1, dtype=torch.long, device=scores.device)
    offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return Active(rows, places - rows * m, offsets)


def products(x: Float[Tensor, "n d"], table: Float[Tensor, "m d"], active: Active) -> Float[Tensor, " entries"]:
    """`x[row] . table[latent]` for every entry."""
    if x.device.type == "cpu" and torch.backends.mkl.is_available() and x.dtype == torch.float32:
        n, m = len(x), len(table)
        zeros = torch.zeros(len(active.latents))
        wanted = torch.sparse_csr_tensor(active.offsets, active.latents, zeros, (n, m), check_invariants=False)
        return torch.sparse.sampled_addmm(wanted, x, table.T, beta=0.0).values()
    chunk = max(1, (1 << 22) // x.shape[1])
    parts = [
        (x[active.rows[a : a + chunk]] * table[active.latents[a : a + chunk]]).sum(1)
        for a in range(0, len(active.rows), chunk)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0)


def weighted_sums(
    values: Float[Tensor, " entries"], picks: Int[Tensor, " entries"], offsets: Tensor, table: Float[Tensor, "rows d"]
) -> Float[Tensor, "bags d"]:
    """For every bag of entries the sum of `value * table[pick]`: a sparse matrix times a dense one. Bag i holds the
    entries from `offsets[i]` to `offsets[i + 1]`."""
    if not len(picks):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(picks, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def decode(values: Float[Tensor, " entries"], active: Active, W_dec: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """The weighted sum of each token's decoder rows, without bias."""
    return weighted_sums(values, active.latents, active.offsets, W_dec)


@dataclass(frozen=True, eq=False)
class ByLatent:
    """The entries of an `Active` in the order of their latents (CSC), in which weight gradients are summed."""

    order: Int[Tensor, " entries"]
    """Index of each entry in the row order of `Active`."""
    rows: Int[Tensor, " entries"]
    """The token of each entry."""
    offsets: Int[Tensor, " m+1"]
    """Index of each latent's first entry; the last element is the number of entries."""

    @classmethod
    def of(cls, active: Active, latents: int) -> ByLatent:
        """Sort the entries once; both weight gradients use the order."""
        # Stable, so that the order of each sum, and with it the rounding, is the same in every run.
        order = torch.sort(active.latents.int(), stable=True).indices
        offsets = torch.zeros(latents + 1, dtype=torch.long, device=order.device)
        offsets[1:] = torch.bincount(active.latents, minlength=latents).cumsum(0)
        return cls(order, active.rows[order], offsets)

    def gradient(self, values: Float[Tensor, " entries"], per_row: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        """`sum over tokens of value[token, latent] * per_row[token]`, for every latent."""
        return weighted_sums(values[self.order], self.rows, self.offsets, per_row)

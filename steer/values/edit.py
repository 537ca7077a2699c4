"""What is to be written into the weights: directions to ablate, and constants to add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import UsageError
from steer.values.direction import Direction


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a checkpoint. The same value drives the bake and the live hooks that try it first."""

    ablate: tuple[Direction, ...] = ()
    """Directions removed from what the writers write: `y - strength * Q (Q^T y)`, Q an orthonormal basis."""
    strength: float = 1.0
    """1 removes the directions, less leaves a share of `1 - strength`."""
    blocks: tuple[int, int] | None = None
    """First and last block whose writers are edited. None: every writer, the embedding included."""
    add: tuple[tuple[Direction, float], ...] = ()
    """(direction, amount): adds `amount * gap * r` to the residual stream at the direction's site,
    as a bias on that block's down projection."""

    def __post_init__(self) -> None:
        if not self.ablate and not self.add:
            raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none")
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"strength: expected a number above 0 and at most 1, found {self.strength}")
        if self.blocks is not None and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise UsageError(
                f"blocks: expected FIRST-LAST with 0 <= FIRST <= LAST, found {self.blocks[0]}-{self.blocks[1]}"
            )

    @property
    def embedding(self) -> bool:
        """Whether the embedding is edited."""
        return bool(self.ablate) and self.blocks is None

    def edits_block(self, block: int) -> bool:
        """Whether the attention and MLP writers of `block` are ablated."""
        return bool(self.ablate) and (self.blocks is None or self.blocks[0] <= block <= self.blocks[1])

    def basis(self) -> Float[Tensor, "d k"]:
        """Orthonormal basis Q of the ablated directions, fp64. Linearly dependent ones collapse."""
        stack = torch.stack([d.vector.double() for d in self.ablate], dim=1)
        u, s, _ = torch.linalg.svd(stack, full_matrices=False)
        return u[:, s > 1e-6 * s[0]].contiguous()

    def biases(self) -> dict[int, Float[Tensor, " d"]]:
        """Site -> the vector added there, fp64; adds at one site are summed."""
        out: dict[int, Tensor] = {}
        for d, amount in self.add:
            shift = amount * d.gap * d.vector.double()
            out[d.site] = out[d.site] + shift if d.site in out else shift
        return out

    def describe(self) -> dict[str, object]:
        """A JSON-able account for certificates and reports."""
        return {
            "ablate": [{"name": d.name, "site": d.site} for d in self.ablate],
            "strength": self.strength if self.ablate else None,
            "blocks": list(self.blocks) if self.blocks else ("all, embedding included" if self.ablate else None),
            "add": [
                {"name": d.name, "site": d.site, "amount": a, "share_of_residual_norm": round(d.share(a), 4)}
                for d, a in self.add
            ],
        }

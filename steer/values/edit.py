"""What is to be done to a model: directions to ablate, constants to add, features to move."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.values.feature import FeatureMove
from steer.values.method import PLAIN, Kind, Method, Strengths


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
    features: tuple[FeatureMove, ...] = ()
    """Latents of dictionaries to move. Weights can hold those that add; the others read the activation."""
    method: Method = PLAIN
    """What is spared and kept when the directions are removed."""
    strengths: Strengths | None = None
    """Strengths that differ between kinds of writers, or from block to block, in place of `strength`."""

    def __post_init__(self) -> None:
        if not self.ablate and not self.add and not self.features:
            raise UsageError("nothing to bake: expected a direction to ablate or an amount to add, found none")
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"strength: expected a number above 0 and at most 1, found {self.strength}")
        if self.blocks is not None and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise UsageError(
                f"blocks: expected FIRST-LAST with 0 <= FIRST <= LAST, found {self.blocks[0]}-{self.blocks[1]}"
            )
        if self.strengths is not None and self.strength != 1.0:
            raise UsageError(f"strength: expected one number or strengths by kind, found {self.strength} and both")
        self._check_latents()

    @property
    def embedding(self) -> bool:
        """Whether the embedding is edited."""
        return self.strength_at(None, "embedding") > 0

    def edits_block(self, block: int) -> bool:
        """Whether the attention or MLP writers of `block` are ablated."""
        return max(self.strength_at(block, "attention"), self.strength_at(block, "mlp")) > 0

    def strength_at(self, block: int | None, kind: Kind) -> float:
        """The strength at the writers of a kind in a block (None: the embedding); 0 where nothing is ablated."""
        if not self.ablate or (self.blocks and (block is None or not self.blocks[0] <= block <= self.blocks[1])):
            return 0.0
        return self.strength if self.strengths is None else self.strengths.at(block, kind)

    def basis(self, block: int | None = None) -> Float[Tensor, "d k"]:
        """Orthonormal basis Q of what is removed from the writers of `block`, fp64; without a block, from the
        embedding. Linearly dependent directions collapse.

        Errors: UsageError when the method leaves nothing of a direction.
        """
        vectors = [self.method.project(d.vector, d.site, block) for d in self.ablate]
        return orthonormal(torch.stack(vectors, dim=1))

    def biases(self) -> dict[int, Float[Tensor, " d"]]:
        """Site -> the vector that `add` adds there, fp64; adds at one site are summed. Features are not in it."""
        out: dict[int, Tensor] = {}
        for d, amount in self.add:
            shift = amount * d.gap * d.vector.double()
            out[d.site] = out[d.site] + shift if d.site in out else shift
        return out

    def with_adds_as_directions(self) -> Edit:
        """The same edit, the features that add told as directions, which weights and biases can hold."""
        adds = tuple((m.feature.direction, m.amount) for m in self.features if not m.reads and not m.neutral)
        rest = tuple(m for m in self.features if m.reads)
        return replace(self, add=(*self.add, *adds), features=rest) if adds else self

    def describe(self) -> dict[str, object]:
        """A JSON-able account for certificates and reports."""
        out: dict[str, object] = {
            "ablate": [{"name": d.name, "site": d.site} for d in self.ablate],
            "strength": self.strength if self.ablate else None,
            "blocks": list(self.blocks) if self.blocks else ("all, embedding included" if self.ablate else None),
            "add": [
                {"name": d.name, "site": d.site, "amount": a, "share_of_residual_norm": _share(d, a)}
                for d, a in self.add
            ],
        }
        if self.method.describe() != PLAIN.describe():
            out["method"] = self.method.describe()
        if self.strengths is not None:
            out |= {"strength": None, "strengths": self.strengths.describe()}
        return out | {"features": [m.describe() for m in self.features]} if self.features else out

    def _check_latents(self) -> None:
        """Raise UsageError when two moves read one latent: each would undo what the other did."""
        taken: dict[tuple[int, int], str] = {}
        for move in self.features:
            for i in move.feature.indices if move.reads and not move.neutral else ():
                key = (id(move.feature.dictionary), i)
                if key in taken:
                    raise UsageError(
                        f"sliders {taken[key]!r} and {move.feature.name!r} clamp, scale or ablate latent {i} of "
                        f"dictionary {move.feature.dictionary.name!r}; expected one of them at most, delete the other"
                    )
                taken[key] = move.feature.name


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """An orthonormal basis of what the columns span, with fewer columns where they are dependent or zero."""
    u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
    return u[:, s > 1e-6 * s[0]].contiguous()


def _share(direction: Direction, amount: float) -> float | None:
    share = direction.share(amount)
    return None if math.isnan(share) else round(share, 4)

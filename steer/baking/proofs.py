"""The proofs in a certificate: what is measured on each tensor that a bake writes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def rounding(dtype: str) -> float:
    """Bound on the error of a projection caused by storing the tensor, as a share of the writer's norm: half a unit in
    the last place of each element would do, and the error of the arithmetic is smaller than the other half.

    fp32 is summed in fp64, narrower dtypes in fp32; directions are stored in fp32.
    """
    return max(_EPSILON[dtype], 1e-6)


@dataclass(frozen=True)
class WriterProof:
    """How much one edited tensor puts into the ablated subspace, measured in the dtype it is stored in."""

    tensor: str
    kind: str
    """embedding, attention or mlp."""
    block: int | None
    """None for the embedding."""
    axis: int
    """The axis that faces the residual stream."""
    bias: bool
    """Whether the tensor is a writer's bias, not its weight."""
    dtype: str
    strength: float
    """Strength of the ablation: a share of `1 - strength` should remain."""
    before: float
    """`||Q^T W||` in the source; `Q` is a basis of the subspace to remove from this writer's output."""
    after: float
    """`||Q^T W'||` in the output, without the vector that `add` put there."""
    norm: float
    """`||W'||`, to which rounding is relative."""
    key: str | None = None
    """Adapters: the tensor that holds `Q^T W`, or the change of a bias."""

    @property
    def remaining(self) -> float:
        """Share of the directions that remains; 0 if there was nothing to remove."""
        return self.after / self.before if self.before else 0.0

    @property
    def holds(self) -> bool:
        """Whether no more remains than the strength allows, up to rounding."""
        return self.after <= (1 - self.strength) * self.before + rounding(self.dtype) * self.norm


@dataclass(frozen=True)
class BiasProof:
    """A tensor that carries an add, or one of the zero biases that have to be created with it."""

    tensor: str
    site: int | None
    """Site of the add; None for a zero bias."""
    created: bool
    """Whether the bake created the tensor."""
    norm: float
    """`||b'||`, the norm of the tensor in the output."""


@dataclass(frozen=True)
class SavedDirection:
    """A direction of the edit, stored in the output so that the proof can be repeated."""

    file: str
    name: str
    site: int
    amount: float | None
    """Amount of an add, in gaps; None for an ablated direction."""
    provenance: dict[str, Any]
    """How the direction was made, from its file."""

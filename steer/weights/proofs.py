"""What is measured on each tensor that a bake writes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def rounding(dtype: str) -> float:
    """Bound on what storing adds to a projection, as a share of the writer's norm: half a unit in the last
    place of each element would do, and the arithmetic's own error is below as much again.

    fp32 is summed in fp64, the narrower dtypes in fp32; directions are stored in fp32.
    """
    return max(_EPSILON[dtype], 1e-6)


@dataclass(frozen=True)
class WriterProof:
    """What one edited tensor puts into the ablated subspace, measured in the dtype it is stored in."""

    tensor: str
    kind: str
    """embedding, attention or mlp."""
    block: int | None
    """None for the embedding."""
    axis: int
    """The axis that faces the residual stream."""
    bias: bool
    """Whether it is the bias of a writer, not its weight."""
    dtype: str
    strength: float
    """Of its ablation: it should keep a share of `1 - strength`."""
    before: float
    """`||Q^T W||` in the source, `Q` a basis of what was to be removed from what this writer puts out."""
    after: float
    """`||Q^T W'||` in the output, without what `add` put there on purpose."""
    norm: float
    """`||W'||`, the scale that rounding is relative to."""
    key: str | None = None
    """In an adapter: the tensor that holds `Q^T W`, or the change of a bias."""

    @property
    def remaining(self) -> float:
        """The share of the directions that is left. 0 where there was nothing to remove."""
        return self.after / self.before if self.before else 0.0

    @property
    def holds(self) -> bool:
        """Whether no more is left than the strength leaves, up to rounding."""
        return self.after <= (1 - self.strength) * self.before + rounding(self.dtype) * self.norm


@dataclass(frozen=True)
class BiasProof:
    """A tensor that carries an add, or one of the zero biases that must come with it."""

    tensor: str
    site: int | None
    """Where it adds. None for the zero biases."""
    created: bool
    """Whether the source lacked it."""
    norm: float
    """`||b'||`."""


@dataclass(frozen=True)
class SavedDirection:
    """A direction that went into the weights, kept in the output so that the proof can be repeated."""

    file: str
    name: str
    site: int
    amount: float | None
    """Of an add, in gaps. None for an ablated direction."""
    provenance: dict[str, Any]
    """Where it came from."""

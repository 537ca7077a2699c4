"""Ablation of a subspace from the weights: which subspace and strength at each writer, for bakes and for live hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.anatomy import Anatomy, LiveWriter, Writer
from steer.checkpoint.projection import read_tensor, through_norm
from steer.checkpoint.reader import CheckpointFiles
from steer.core.edit import Edit


def gain_of(norms: Sequence[str], gain: Callable[[str], Float[Tensor, " d"]]) -> Float[Tensor, " d"] | None:
    """What norms that follow one another multiply by: the product of their gains; None without a norm. `gain`: as in
    `Ablation`."""
    return math.prod(map(gain, norms)) if norms else None  # type: ignore[return-value]


class Ablation:
    """Subspace and strength of an edit's ablation at each writer, on disk or live.

    `gain(name)` returns the gain of a norm, fp64, for the name of its weight: the stored values plus the layout's
    `gain_offset`.
    """

    def __init__(self, edit: Edit, gain: Callable[[str], Float[Tensor, " d"]]) -> None:
        self.edit, self._gain = edit, gain
        self._bases: dict[tuple[int | None, tuple[str, ...]], Tensor] = {}

    @classmethod
    def of(cls, edit: Edit, anatomy: Anatomy, files: CheckpointFiles) -> Ablation:
        """The ablation of an edit, with the gains that a checkpoint stores."""

        def gain(name: str) -> Tensor:
            return read_tensor(files, name).double() + anatomy.layout.gain_offset

        return cls(edit, gain)

    def strength(self, writer: Writer | LiveWriter) -> float:
        """Strength at a writer, from 0 to 1; 0 if the writer is not edited."""
        return self.edit.strength_at(writer.block, writer.kind)

    def subspace(self, writer: Writer | LiveWriter) -> Float[Tensor, "d k"]:
        """Orthonormal basis, fp64, of the subspace to remove from the writer's output."""
        key = (writer.block if self.edit.method.by_block else None, writer.norms)
        if key not in self._bases:
            q, gain = self.edit.basis(writer.block), gain_of(writer.norms, self._gain)
            self._bases[key] = q if gain is None else through_norm(q, gain)
        return self._bases[key]

"""What an edit removes from each writer, and how much of it.

`y = W x + b` is what a writer puts out, `r` a unit vector of the residual stream. Where `y` itself is added to the
stream, `r` is removed from `W` and `b`, and the stream gets nothing along `r`.

Where an RMSNorm with gain `g` stands between (Gemma 2 and 3, OLMo 2), the stream gets `w = g * y / rms(y)`. Its
projection `r . w = (g * r) . y / rms(y)` is zero, whatever rms(y) is, exactly when `y` is orthogonal to `g * r`. So
`u = (g * r) / ||g * r||` is what leaves `W` and `b`, the least change of them that does it. What is left of `y` is
then brought to the norm's own length again. (Taking `r / g` away along `g * r` would take nothing but `r` from `w`;
but a gain near zero makes that huge, and the norm then shrinks all else.) Several directions `Q` become a basis of
`g * Q`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steer.values.edit import Edit, orthonormal
from steer.weights.anatomy import Anatomy, LiveWriter
from steer.weights.arithmetic import as_tensor
from steer.weights.stream import CheckpointFiles
from steer.weights.writers import Writer


class Ablation:
    """An edit's ablation, told for one writer after the other, on disk or live.

    `gain` reads the gain of a norm, fp64, by the name of its weight: what is stored plus the layout's `gain_offset`.
    """

    def __init__(self, edit: Edit, gain: Callable[[str], Float[Tensor, " d"]]) -> None:
        self.edit, self._gain = edit, gain
        self._bases: dict[tuple[int | None, str | None], Tensor] = {}

    @classmethod
    def of(cls, edit: Edit, anatomy: Anatomy, files: CheckpointFiles) -> Ablation:
        """With the gains that a checkpoint stores."""

        def gain(name: str) -> Tensor:
            info = files.tensors[name]
            return as_tensor(files.read(info), info.dtype, info.shape).double() + anatomy.layout.gain_offset

        return cls(edit, gain)

    def strength(self, writer: Writer | LiveWriter) -> float:
        """From 0 to 1; 0 where the writer stays as it is."""
        return self.edit.strength_at(writer.block, writer.kind)

    def subspace(self, writer: Writer | LiveWriter) -> Float[Tensor, "d k"]:
        """Orthonormal basis of what is removed from what the writer puts out, fp64."""
        key = (writer.block if self.edit.method.by_block else None, writer.norm)
        if key not in self._bases:
            q = self.edit.basis(writer.block)
            self._bases[key] = q if writer.norm is None else through_norm(q, self._gain(writer.norm))
        return self._bases[key]


def through_norm(q: Float[Tensor, "d k"], gain: Float[Tensor, " d"]) -> Float[Tensor, "d k"]:
    """The subspace that must leave the input of an RMSNorm with this gain, for `q` to leave its output."""
    return orthonormal(torch.as_tensor(gain).double()[:, None] * q)

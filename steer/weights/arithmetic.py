"""Removing a subspace from stored weights: wide arithmetic, one rounding, a few rows at a time.

With `W` facing the residual stream along axis 0 and `Q [d, k]` orthonormal,
`W' = W - s Q (Q^T W)`; along axis 1, `E' = E - s (E Q) Q^T`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELEMENTS = 1 << 23  # widened at a time: 32 MB in fp32


def as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor on top of the bytes: changing it changes them."""
    return torch.frombuffer(data, dtype=_DTYPES[dtype]).view(shape)


def as_bytes(tensor: Tensor, dtype: str) -> bytes:
    """The bytes of a tensor, rounded once to a stored dtype."""
    return tensor.to(_DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def rounding(dtype: str) -> float:
    """Bound on what storing adds to a projection, as a share of the writer's norm: half a unit in the last
    place of each element would do, and the arithmetic's own error is below as much again.

    fp32 is summed in fp64, the narrower dtypes in fp32; directions are stored in fp32.
    """
    return max(torch.finfo(_DTYPES[dtype]).eps, 1e-6)


def shadow(weight: Float[Tensor, "out in"], q: Float[Tensor, "d k"], axis: int) -> Float[Tensor, "k other"]:
    """What the writer puts into the subspace, `Q^T W`, in the dtype of the arithmetic."""
    q = q.to(_wide(weight))
    if axis == 1:
        return torch.cat([(weight[rows].to(q.dtype) @ q).T for rows in _slices(weight)], dim=1)
    out = q.new_zeros(q.shape[1], weight.shape[1])
    for rows in _slices(weight):
        out.addmm_(q[rows].T, weight[rows].to(q.dtype))
    return out


def remove(
    weight: Float[Tensor, "out in"],
    q: Float[Tensor, "d k"],
    axis: int,
    strength: float,
    cast: Float[Tensor, "k other"],
) -> None:
    """Take `strength` of its shadow `cast` out of the writer, in place."""
    q = q.to(cast.dtype)
    for rows in _slices(weight):
        left, right = (q[rows], cast) if axis == 0 else (cast[:, rows].T, q.T)
        weight[rows] = torch.addmm(weight[rows].to(q.dtype), left, right, alpha=-strength).to(weight.dtype)


def norm(weight: Tensor) -> float:
    """The Frobenius norm, over the whole tensor."""
    return sum(float(weight[rows].to(_wide(weight)).square().sum()) for rows in _slices(weight)) ** 0.5


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype in (torch.float64, torch.float32) else torch.float32


def _slices(weight: Tensor) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, weight[0].numel()))
    return (slice(at, at + step) for at in range(0, weight.shape[0], step))

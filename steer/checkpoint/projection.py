"""Arithmetic on one weight: removing a subspace from what it writes, and measuring what it writes into one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.reader import Buffer, CheckpointFiles
from steer.core.edit import orthonormal

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELEMENTS = 1 << 19  # numbers converted to a wider dtype at a time: 2 MB in fp32, which stay in a core's cache


def as_tensor(data: Buffer, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that shares memory with the bytes: changing it changes them."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)


def read_tensor(files: CheckpointFiles, name: str) -> Tensor:
    """A tensor of a checkpoint, in the dtype that `CheckpointFiles.read` gives it."""
    info = files.tensors[name]
    return as_tensor(files.read(info), info.dtype, info.shape)


def on_accelerator(weight: Tensor) -> Tensor:
    """A copy of the weight on the GPU if there is one with room for it, else the weight itself."""
    if not torch.cuda.is_available():
        return weight
    try:
        return weight.cuda()
    except torch.cuda.OutOfMemoryError:
        return weight


def as_bytes(tensor: Tensor, dtype: str) -> bytes:
    """The bytes of a tensor in a stored dtype, rounded once."""
    return tensor.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def ablate(
    weight: Float[Tensor, "*experts out in"],
    q: Float[Tensor, "d k"],
    axis: int,
    strength: float,
    *,
    norm_preserving: bool = False,
) -> float:
    """Remove the share `strength` of the subspace from a writer's weight, in place. Returns `||Q^T W||` before the
    removal.

    `axis` is the axis of the weight that faces the residual stream. `norm_preserving` scales each written vector back
    to its norm.
    """
    squares = 0.0
    for matrix, facing in _matrices(weight, axis):
        cast = shadow(matrix, q, facing)
        squares += float(cast.double().square().sum())
        basis, removed, alpha, factors = q.to(cast), cast, -strength, None
        if norm_preserving:
            # c w + ((1 - s) - c) q: the part inside the subspace is scaled by 1 - s, the part outside by c.
            factors = growth(matrix, cast, facing, strength)
            removed, alpha = cast * (factors - (1 - strength)), -1.0
        for rows in _slices(matrix):
            wide = matrix[rows].to(cast.dtype)
            if factors is not None:
                wide = wide * (factors if facing == 0 else factors[rows, None])
            left, right = (basis[rows], removed) if facing == 0 else (removed[:, rows].T, basis.T)
            matrix[rows] = wide.addmm_(left, right, alpha=alpha)
    return squares**0.5


def projection(
    tensor: Tensor, q: Float[Tensor, "d k"], axis: int, *, bias: bool, shift: Float[Tensor, " d"] | None = None
) -> tuple[float, float]:
    """(`||Q^T (W - shift)||`, `||W||`) of a weight, or of a bias to which an add has added `shift`."""
    if bias:
        rows = tensor.double().reshape(-1, q.shape[0])
        return float(((rows if shift is None else rows - shift) @ q).norm()), float(rows.norm())
    casts = (shadow(matrix, q, facing) for matrix, facing in _matrices(tensor, axis))
    return sum(float(cast.double().square().sum()) for cast in casts) ** 0.5, norm(tensor)


def shadow(weight: Float[Tensor, "out in"], q: Float[Tensor, "d k"], axis: int) -> Float[Tensor, "k other"]:
    """The writer's output in the subspace, `Q^T W`, in the dtype of the arithmetic."""
    q = q.to(weight.device, _wide(weight))
    # Filled in place: a list of small results would lie between the slices in memory and make the heap grow.
    out = q.new_zeros(q.shape[1], weight.shape[1 - axis])
    for rows in _slices(weight):
        if axis == 1:
            out[:, rows] = (weight[rows].to(q.dtype) @ q).T
        else:
            out.addmm_(q[rows].T, weight[rows].to(q.dtype))
    return out


def growth(
    weight: Float[Tensor, "out in"], cast: Float[Tensor, "k other"], axis: int, strength: float
) -> Float[Tensor, " other"]:
    """For each written vector, the factor on its part outside of the subspace that preserves the vector's length.

    A vector with almost nothing outside would only have its rounding error scaled up; its factor is 1, and it gets
    shorter instead.
    """
    whole = cast.new_zeros(cast.shape[1], dtype=torch.float64)
    for rows in _slices(weight):
        squares = weight[rows].to(_wide(weight)).square().sum(axis, dtype=torch.float64)
        if axis == 1:
            whole[rows] = squares
        else:
            whole += squares
    inside = cast.double().square().sum(0)
    outside = whole - inside
    enough = outside > torch.finfo(cast.dtype).eps ** (2 / 3) * whole
    grown = (whole - (1 - strength) ** 2 * inside) / outside.where(enough, 1.0)
    return grown.where(enough, 1.0).sqrt().to(cast.dtype)


def norm(weight: Tensor) -> float:
    """Frobenius norm of the whole tensor."""
    return sum(float(torch.linalg.vector_norm(weight[rows].to(_wide(weight)))) ** 2 for rows in _slices(weight)) ** 0.5


def _matrices(weight: Tensor, axis: int) -> Iterator[tuple[Tensor, int]]:
    """The weight, or each expert's matrix of a stack, with the axis of the matrix that faces the residual stream."""
    if weight.ndim == 2:
        yield weight, axis
    else:
        for expert in weight:
            yield expert, axis - 1


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype in (torch.float64, torch.float32) else torch.float32


def _slices(weight: Tensor) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, weight[0].numel()))
    return (slice(at, at + step) for at in range(0, weight.shape[0], step))


def through_norm(q: Float[Tensor, "d k"], gain: Float[Tensor, " d"]) -> Float[Tensor, "d k"]:
    """The subspace to remove from the input of an RMSNorm with this gain, so that `q` is removed from its output."""
    return orthonormal(torch.as_tensor(gain).double()[:, None] * q)

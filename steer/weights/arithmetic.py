"""Removing a subspace from stored weights: wide arithmetic, one rounding, a few rows at a time.

With `W` facing the residual stream along axis 0 and `Q [d, k]` orthonormal, `W' = W - s Q (Q^T W)`; along axis 1,
`E' = E - s (E Q) Q^T`. A stack of experts is edited expert by expert.

Norm-preserving: each vector `w` that a weight writes, a column along axis 0, keeps its length. What is outside the
subspace grows for what is taken away inside, `w' = (1 - s) q + c o` with `q` and `o` the two parts of `w`, so that
exactly the share `1 - s` remains at any strength, and nothing at 1. Scaling the whole of `w'` instead would bring
back some of what was removed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from steer.weights.stream import Buffer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELEMENTS = 1 << 19  # widened at a time: 2 MB in fp32, which stay in a core's cache


def as_tensor(data: Buffer, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor on top of the bytes: changing it changes them."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)


def on_accelerator(weight: Tensor) -> Tensor:
    """A copy on the GPU if there is one with room for it, else the weight itself."""
    if not torch.cuda.is_available():
        return weight
    try:
        return weight.cuda()
    except torch.cuda.OutOfMemoryError:
        return weight


def as_bytes(tensor: Tensor, dtype: str) -> bytes:
    """The bytes of a tensor, rounded once to a stored dtype."""
    return tensor.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def ablate(
    weight: Float[Tensor, "*experts out in"],
    q: Float[Tensor, "d k"],
    axis: int,
    strength: float,
    *,
    norm_preserving: bool = False,
) -> float:
    """Take `strength` of the subspace out of a writer, in place; return `||Q^T W||` as it was before.

    `axis` is the one that faces the residual stream.
    """
    squares = 0.0
    for matrix, facing in _matrices(weight, axis):
        cast = shadow(matrix, q, facing)
        squares += float(cast.double().square().sum())
        grown = growth(matrix, cast, facing, strength) if norm_preserving else None
        remove(matrix, q, facing, strength, cast, grown)
    return squares**0.5


def share(weight: Float[Tensor, "*experts out in"], q: Float[Tensor, "d k"], axis: int) -> float:
    """`||Q^T W||`, over all experts."""
    casts = (shadow(matrix, q, facing) for matrix, facing in _matrices(weight, axis))
    return sum(float(cast.double().square().sum()) for cast in casts) ** 0.5


def projection(
    tensor: Tensor, q: Float[Tensor, "d k"], axis: int, *, bias: bool, shift: Float[Tensor, " d"] | None = None
) -> tuple[float, float]:
    """(`||Q^T (W - shift)||`, `||W||`) of a weight, or of a bias, into which an add put a shift."""
    if bias:
        rows = tensor.double().reshape(-1, q.shape[0])
        return float(((rows if shift is None else rows - shift) @ q).norm()), float(rows.norm())
    return share(tensor, q, axis), norm(tensor)


def shadow(weight: Float[Tensor, "out in"], q: Float[Tensor, "d k"], axis: int) -> Float[Tensor, "k other"]:
    """What the writer puts into the subspace, `Q^T W`, in the dtype of the arithmetic."""
    q = q.to(weight.device, _wide(weight))
    # Filled in place: small results kept in a list would stand between the slices' memory and grow the heap.
    out = q.new_zeros(q.shape[1], weight.shape[1 - axis])
    for rows in _slices(weight):
        if axis == 1:
            out[:, rows] = (weight[rows].to(q.dtype) @ q).T
        else:
            out.addmm_(q[rows].T, weight[rows].to(q.dtype))
    return out


def remove(
    weight: Float[Tensor, "out in"],
    q: Float[Tensor, "d k"],
    axis: int,
    strength: float,
    cast: Float[Tensor, "k other"],
    growth: Float[Tensor, " other"] | None = None,
) -> None:
    """Take `strength` of its shadow `cast` out of the writer, in place, and let what is outside grow."""
    q = q.to(cast)
    if growth is not None:
        # c w + ((1 - s) - c) q: the part inside the subspace is scaled by 1 - s, the part outside by c.
        cast, strength = cast * (growth - (1 - strength)), 1.0
    for rows in _slices(weight):
        left, right = (q[rows], cast) if axis == 0 else (cast[:, rows].T, q.T)
        wide = weight[rows].to(q.dtype)
        if growth is not None:
            wide = wide * (growth if axis == 0 else growth[rows, None])
        weight[rows] = wide.addmm_(left, right, alpha=-strength)


def lengths(weight: Float[Tensor, "out in"], axis: int) -> Float[Tensor, " other"]:
    """The squared length of each vector that the weight writes, fp64."""
    out = torch.zeros(weight.shape[1 - axis], dtype=torch.float64, device=weight.device)
    for rows in _slices(weight):
        squares = weight[rows].to(_wide(weight)).square().sum(axis, dtype=torch.float64)
        if axis == 1:
            out[rows] = squares
        else:
            out += squares
    return out


def growth(
    weight: Float[Tensor, "out in"], cast: Float[Tensor, "k other"], axis: int, strength: float
) -> Float[Tensor, " other"]:
    """The factor on what is outside the subspace that keeps each vector's length.

    A vector with next to nothing outside has nothing to grow but rounding, and loses length instead.
    """
    whole, inside = lengths(weight, axis), cast.double().square().sum(0)
    outside = whole - inside
    enough = outside > torch.finfo(cast.dtype).eps ** (2 / 3) * whole
    grown = (whole - (1 - strength) ** 2 * inside) / outside.where(enough, 1.0)
    return grown.where(enough, 1.0).sqrt().to(cast.dtype)


def norm(weight: Tensor) -> float:
    """The Frobenius norm, over the whole tensor."""
    return sum(float(torch.linalg.vector_norm(weight[rows].to(_wide(weight)))) ** 2 for rows in _slices(weight)) ** 0.5


def _matrices(weight: Tensor, axis: int) -> Iterator[tuple[Tensor, int]]:
    """The weight, or each expert of a stack, with the axis of the matrix that faces the residual stream."""
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

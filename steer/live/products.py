"""Linear layers as a CPU computes them fast in fp32: MKL reads the weights of thin and of wide products several times.

Measured on two cores of an AMD EPYC (AVX2), all 211 matrices of a 135M Llama from memory, 2 threads, milliseconds as
MKL does `x W^T` and as here: one vector 77 and 51, two 111 and 51, 16 vectors 169 and 120; the LM head
(49152 x 576) alone for 96 vectors 86 and 60, for 192 164 and 136.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 64
"""Up to so many vectors a product is faster as `(W x^T)^T`."""
WIDE = 4096
"""Matrices with more outputs than this are multiplied `AT_ONCE` rows at a time, which a core's cache holds."""
AT_ONCE = 1024


class CpuLinear(nn.Linear):
    """A linear layer whose products are those of `product`. Everything else is torch's."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """`input W^T + b`."""
        return product(input, self.weight, self.bias)


def product(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """`x weight^T + bias` as `torch.nn.functional.linear`, up to rounding."""
    rows = x.numel() // x.shape[-1]
    few, wide = rows <= FEW, len(weight) > WIDE
    if not rows or not (few or wide) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if few:
        # One vector is read as two: a product with a single one runs on one core.
        out = (weight @ (flat.expand(2, -1) if rows == 1 else flat).t()).t()[:rows].contiguous()
    elif torch.is_grad_enabled():
        out = torch.cat([flat @ part.t() for part in weight.split(AT_ONCE)], dim=-1)
    else:
        out = flat.new_empty(rows, len(weight))
        for part, columns in zip(weight.split(AT_ONCE), out.split(AT_ONCE, dim=-1), strict=True):
            torch.mm(flat, part.t(), out=columns)
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def use_fast_products(model: nn.Module) -> None:
    """Let the fp32 linear layers of a model on the CPU compute as `CpuLinear`; layers of any other kind stay."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is nn.Linear:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                module.__class__ = CpuLinear


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does nothing but multiply by its weight and add its bias."""
    return type(module) in (nn.Linear, CpuLinear)

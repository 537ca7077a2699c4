"""Faster linear layers for fp32 on an AMD CPU; `loading.py` puts them into every model that it loads there.

On AMD's CPUs MKL reads the weights several times where it multiplies few vectors, or by a matrix with many outputs.
Milliseconds measured on two cores of an AMD EPYC (AVX2) with 2 threads, weights read from memory, MKL's `x W^T` first
and this file second: all 211 matrices of a 135M Llama for one vector 77 and 51, for two 111 and 51, for 16 vectors 169
and 120; the LM head (49152 x 576) alone for 96 vectors 86 and 60, for 192 vectors 164 and 136. On two cores of an Intel
Xeon, limited to AVX2, it is the other way round: one vector 25 and 59, two 45 and 56, 16 vectors 65 and 77; the LM head
for 96 vectors 55 and 61, for 192 vectors 90 and 117. The maker decides and not a timing, so that a machine
rounds alike in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 64
"""Up to this many vectors, a product is faster as `(W x^T)^T`."""
WIDE = 4096
"""Matrices with more outputs than this are multiplied `AT_ONCE` rows at a time."""
AT_ONCE = 1024
"""How many rows of a matrix are multiplied at a time: a core's cache holds them."""


class CpuLinear(nn.Linear):
    """A linear layer that multiplies with `product`. Everything else is `torch.nn.Linear`."""

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """`input W^T + b`."""
        return product(input, self.weight, self.bias)


def product(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """`x weight^T + bias`, the same as `torch.nn.functional.linear` up to rounding."""
    rows = x.numel() // x.shape[-1]
    few, wide = rows <= FEW, len(weight) > WIDE
    if not rows or not (few or wide) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if few:
        # A single vector is multiplied twice, as a product with one vector runs on one core only. The copy matters:
        # torch multiplies an expanded vector at half the speed.
        out = (weight @ (flat.expand(2, -1).contiguous() if rows == 1 else flat).t()).t()[:rows].contiguous()
    elif torch.is_grad_enabled():
        out = torch.cat([flat @ part.t() for part in weight.split(AT_ONCE)], dim=-1)
    else:
        out = flat.new_empty(rows, len(weight))
        for part, columns in zip(weight.split(AT_ONCE), out.split(AT_ONCE, dim=-1), strict=True):
            torch.mm(flat, part.t(), out=columns)
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def mkl_is_slow() -> bool:
    """Whether torch multiplies with MKL on a CPU of AMD."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and later
    return torch.backends.mkl.is_available() and "AMD" in str(known.get("cpu_name", ""))


def use_fast_products(model: nn.Module) -> None:
    """Turn the fp32 linear layers of a model that are on the CPU into `CpuLinear` where `mkl_is_slow`; other layers
    stay as they are."""
    for module in model.modules() if mkl_is_slow() else ():
        if isinstance(module, nn.Linear) and type(module) is nn.Linear:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                module.__class__ = CpuLinear


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does nothing but multiply by its weight and add its bias."""
    return type(module) in (nn.Linear, CpuLinear)

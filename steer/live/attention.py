"""Attention for CPUs: grouped queries without copying the keys and values for every query head.

Decoding a batch is bound by memory there, and transformers' plain attention writes the KV cache out once a
query head at every step. The arithmetic is the same, the softmax in fp32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "steer_grouped"


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups seq d"],
    value: Float[Tensor, "batch groups seq d"],
    attention_mask: Float[Tensor, "batch 1 new seq"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch new heads d"], None]:
    """Scaled dot-product attention with an additive mask, as transformers calls it; inference only.

    `softcap` bounds the scores (Gemma 2), `s_aux` is a score a head that attends to nothing (gpt-oss's sinks).
    """
    batch, heads, new, d = query.shape
    groups, seq = key.shape[1], key.shape[2]
    # Query heads h = g * (heads / groups) + i share the keys of group g.
    rows = query.reshape(batch, groups, heads // groups * new, d)
    scores = (rows @ key.transpose(2, 3)) * (d**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, groups, heads // groups, new, seq)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :seq]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(batch, -1, -1, new, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)[..., :seq]
    out = weights.view(batch, groups, heads // groups * new, seq) @ value
    return out.view(batch, heads, new, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)

"""Attention for CPUs over texts that are packed behind each other: each looks at its own keys, and only at those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from steer.live.attention import grouped_attention

NAME = "steer_packed"


@dataclass(frozen=True)
class Reading:
    """Texts whose new tokens look at their keys in one call."""

    tokens: slice | Int[Tensor, " texts"]
    """Among the packed tokens: those of one text, or one each of several."""
    keys: slice
    """Among the keys that were fetched; texts of several are filled up to one length."""
    texts: int
    mask: Float[Tensor, "texts 1 new seq"] | None
    """Added to the scores; None: one token sees all, those of one text what came before them."""


def packing(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """How the tokens of a step are to be attended to: inputs that take the place of transformers' own."""
    ends_q = inputs["cu_seq_lens_q"].tolist()
    ends_k = inputs["cu_seq_lens_k"]["full_attention"].tolist()
    fetched: Tensor = inputs["read_index"][0]
    new = [b - a for a, b in pairwise(ends_q)]
    seq = [b - a for a, b in pairwise(ends_k)]
    low = torch.finfo(dtype).min
    readings: list[Reading] = []
    index: list[Tensor] = []
    at = 0
    # Without anything to fetch the keys are those of the step itself, each text's own.
    singles = [i for i, n in enumerate(new) if n == 1] if fetched.numel() else []
    for group in _of_like_length(singles, seq):
        width = max(seq[i] for i in group)
        lengths = torch.tensor([seq[i] for i in group])
        places = torch.arange(width).expand(len(group), -1)
        starts = torch.tensor([ends_k[i] for i in group])
        index.append(fetched[(starts[:, None] + torch.minimum(places, lengths[:, None] - 1)).flatten()])
        mask = None
        if int(lengths.min()) < width:
            mask = torch.zeros(len(group), 1, 1, width, dtype=dtype)
            mask.masked_fill_((places >= lengths[:, None])[:, None, None], low)
        tokens = torch.tensor([ends_q[i] for i in group])
        readings.append(Reading(tokens, slice(at, at := at + len(group) * width), len(group), mask))
    for i in sorted(set(range(len(new))) - set(singles)):
        index.append(fetched[ends_k[i] : ends_k[i + 1]])
        mask = None
        if new[i] < seq[i]:
            mask = torch.full((new[i], seq[i]), low, dtype=dtype).triu_(seq[i] - new[i] + 1)[None, None]
        readings.append(Reading(slice(ends_q[i], ends_q[i + 1]), slice(at, at := at + seq[i]), 1, mask))
    # A mask of four dimensions is passed on as it is; it is not looked at.
    return {
        "read_index": [torch.cat(index) if fetched.numel() else fetched],
        "attention_mask": torch.empty(1, 1, 1, 0),
        "readings": readings,
    }


def _of_like_length(texts: Sequence[int], seq: Sequence[int]) -> list[list[int]]:
    """Groups in which the longest is at most twice the shortest: what is filled up stays little."""
    groups: list[list[int]] = []
    for i in sorted(texts, key=lambda i: -seq[i]):
        if groups and 2 * seq[i] >= seq[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups new d"],
    value: Float[Tensor, "batch groups new d"],
    attention_mask: Float[Tensor, "batch 1 new seq"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Any = None,
    readings: Sequence[Reading] = (),
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch new heads d"], None]:
    """Attention as transformers calls it, over packed texts where there is a paged `cache`, else over a plain batch.

    Texts are read apart, not in one matrix that is masked but for its diagonal blocks.
    """
    if cache is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    heads, new, d = query.shape[1:]
    groups = key.shape[1]
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    out = query.new_empty(new, heads, d)
    for r in readings:
        k, v = (x[r.keys].view(r.texts, -1, groups, d).transpose(1, 2) for x in (keys, values))
        if isinstance(r.tokens, slice):
            q = queries[r.tokens].transpose(0, 1)[None]
            read = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=r.mask, is_causal=r.mask is None, scale=scaling, enable_gqa=True
            )
            out[r.tokens] = read[0].transpose(0, 1)
        else:
            # The query heads that share keys count as queries: the keys are read once.
            q = queries[r.tokens].view(r.texts, groups, heads // groups, d)
            read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=r.mask, scale=scaling)
            out[r.tokens] = read.reshape(r.texts, heads, d)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, eager_mask)

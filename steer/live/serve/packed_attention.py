"""Attention over texts that are packed behind each other: each looks at its own keys, and only at those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from steer.live.attention import attend, check_known, grouped_attention

NAME = "steer_packed"
_PAGED = frozenset(
    {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "read_index",
        "write_index",
        "block_table",
        "is_causal",
        "logits_indices",
        "logits_processor_args",
    }
)
"""What a paged cache wants to know of the step; `packing` has it from there."""


@dataclass(frozen=True)
class Reading:
    """Texts whose new tokens look at their keys in one call."""

    tokens: slice | Int[Tensor, " texts"]
    """Among the packed tokens: those of one text, or one each of several."""
    keys: slice
    """Among the keys that were fetched; texts of several are filled up to one length."""
    texts: int
    mask: Bool[Tensor, "texts 1 new seq"] | None
    """True where a key is seen. None: one token sees all, those of one text what came before them."""


@dataclass(frozen=True)
class Packing:
    """How the layers of one kind, full or sliding, read the texts of a step."""

    readings: tuple[Reading, ...]
    order: Int[Tensor, " keys"] | None
    """Where each key of the readings stands among those that the cache gives; None: as they come."""


def packing(inputs: dict[str, Any], window: int | None) -> dict[str, Any]:
    """How the tokens of a step are to be attended to: inputs that take the place of transformers' own.

    `window`: how many keys a token of a sliding layer sees, itself among them.
    """
    fetched: list[Tensor] = inputs["read_index"]
    ends_q = inputs["cu_seq_lens_q"].tolist()
    read, packings = [], {}
    for i, layer_type in enumerate(inputs["cache"].cache_allocators):
        ends_k = inputs["cu_seq_lens_k"][layer_type]
        sliding = layer_type == "sliding_attention"
        readings, order = _readings(ends_q, ends_k.tolist(), fetched[i], window if sliding else None)
        # A sliding layer's index marks the places of the new keys by their order, which has to stay.
        ordered = order is not None and not sliding
        read.append(fetched[i][order] if ordered else fetched[i])
        packings[layer_type] = Packing(readings, None if ordered else order)
    # A mask of four dimensions is passed on as it is; it is not looked at.
    unseen = torch.empty(1, 1, 1, 0, device=fetched[0].device)
    mask = unseen if len(packings) == 1 else dict.fromkeys(packings, unseen)
    return {"read_index": read, "attention_mask": mask, "packings": packings}


def _readings(
    ends_q: list[int], ends_k: list[int], fetched: Int[Tensor, " keys"], window: int | None
) -> tuple[tuple[Reading, ...], Int[Tensor, " keys"] | None]:
    """The readings of a step, and the order in which they want the keys."""
    device = fetched.device
    new = [b - a for a, b in pairwise(ends_q)]
    seq = [b - a for a, b in pairwise(ends_k)]
    readings: list[Reading] = []
    order: list[Tensor] = []
    at = 0
    # Without anything to fetch the keys are those of the step itself, each text's own.
    singles = [i for i, n in enumerate(new) if n == 1] if fetched.numel() else []
    for group in _of_like_length(singles, seq):
        width = max(seq[i] for i in group)
        lengths = torch.tensor([seq[i] for i in group], device=device)
        places = torch.arange(width, device=device).expand(len(group), -1)
        starts = torch.tensor([ends_k[i] for i in group], device=device)
        order.append((starts[:, None] + torch.minimum(places, lengths[:, None] - 1)).flatten())
        padded = min(seq[i] for i in group) < width
        mask = (places < lengths[:, None])[:, None, None] if padded else None
        tokens = torch.tensor([ends_q[i] for i in group], device=device)
        readings.append(Reading(tokens, slice(at, at := at + len(group) * width), len(group), mask))
    for i in sorted(set(range(len(new))) - set(singles)):
        order.append(torch.arange(ends_k[i], ends_k[i + 1], device=device))
        mask = None
        if new[i] < seq[i] or (window is not None and new[i] > window):
            # Key j is seen by token i where 0 <= i - j < window.
            behind = torch.arange(seq[i] - new[i], seq[i], device=device)[:, None] - torch.arange(seq[i], device=device)
            mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
            mask = mask[None, None]
        readings.append(Reading(slice(ends_q[i], ends_q[i + 1]), slice(at, at := at + seq[i]), 1, mask))
    return tuple(readings), torch.cat(order) if fetched.numel() else None


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
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    cache: Any = None,
    packings: Mapping[str, Packing] | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "batch new heads d"], None]:
    """Attention as transformers calls it, over packed texts where there is a paged `cache`, else over a plain batch.

    Texts are read apart, not in one matrix that is masked but for its diagonal blocks.
    """
    if cache is None or packings is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, **more)
    check_known(module, {name: value for name, value in more.items() if name not in _PAGED})
    layer_type = cache.layer_to_allocator[module.layer_idx].layer_type
    packed = packings[layer_type]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=more)
    heads, new, d = query.shape[1:]
    groups = key.shape[1]
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if packed.order is not None:
        keys, values = keys[packed.order], values[packed.order]
    out = query.new_empty(new, heads, d)
    for r in packed.readings:
        k, v = (x[r.keys].view(r.texts, -1, groups, d).transpose(1, 2) for x in (keys, values))
        if isinstance(r.tokens, slice):
            q = queries[r.tokens].transpose(0, 1)[None]
            out[r.tokens] = attend(q, k, v, r.mask, scaling, softcap, s_aux)[0].transpose(0, 1)
        elif softcap is None and s_aux is None:
            # The query heads that share keys count as queries: the keys are read once.
            q = queries[r.tokens].view(r.texts, groups, heads // groups, d)
            read = scaled_dot_product_attention(q, k, v, attn_mask=r.mask, scale=scaling)
            out[r.tokens] = read.reshape(r.texts, heads, d)
        else:
            out[r.tokens] = attend(queries[r.tokens][:, :, None], k, v, r.mask, scaling, softcap, s_aux)[:, :, 0]
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

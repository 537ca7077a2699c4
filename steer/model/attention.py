"""Attention that does not copy keys and values for grouped queries, with softcap and sinks; registered as `NAME`.

Decoding a batch on a CPU is bound by memory, and transformers' plain attention copies the KV cache once per query head
at every step. Its `sdpa` silently leaves out a softcap of the scores, and refuses sinks. This one applies both, and
raises an error for an argument that it does not know. `loading.py` and `LoadedModel` choose it where it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, sdpa_mask

from steer.errors import UnsupportedError

NAME = "steer_grouped"
_DONE_ELSEWHERE = frozenset(
    {
        "sliding_window",  # in the mask
        "position_ids",  # in the rotary embedding
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "logits_to_keep",
    }
)
"""Arguments that transformers passes to every attention and that change nothing in the attention of a decoder."""


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups seq d"],
    value: Float[Tensor, "batch groups seq d"],
    attention_mask: Bool[Tensor, "batch 1 new seq"] | Float[Tensor, "batch 1 new seq"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "batch new heads d"], None]:
    """Scaled dot-product attention as transformers calls it; inference only.

    `softcap` bounds the scores (Gemma 2). `s_aux` has one score per head for attending to nothing (gpt-oss's sinks).
    Errors: UnsupportedError for an argument that this attention does not know.
    """
    causal = more.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    check_known(module, more)
    out = attend(query, key, value, attention_mask, scaling, softcap, s_aux, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def check_known(module: nn.Module, more: dict[str, Any]) -> None:
    """Raise UnsupportedError for an unknown argument that might change the output of an attention."""
    for name, value in more.items():
        if name not in _DONE_ELSEWHERE and value is not None and value is not False:
            raise UnsupportedError(
                f"{type(module).__name__}: expected an attention of scores, softcap and sinks, found the argument "
                f"{name}; load the model with attn_implementation='eager'"
            )


def attend(
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups seq d"],
    value: Float[Tensor, "batch groups seq d"],
    mask: Bool[Tensor, "batch 1 new seq"] | Float[Tensor, "batch 1 new seq"] | None,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    *,
    causal: bool = True,
) -> Float[Tensor, "batch heads new d"]:
    """`softmax(softcap * tanh(q k * scaling / softcap) + mask) v`, with the sinks in the softmax as well.

    A boolean mask is True where a key is seen; any other is added to the scores. Without a mask, one new token sees
    every key; several see themselves and the tokens before them, or every key if not `causal`.
    """
    batch, heads, new, d = query.shape
    groups, seq = key.shape[1], key.shape[2]
    causal = causal and mask is None and new > 1
    if softcap is None and sinks is None and new > 1:
        if causal:  # a static cache has empty room after the tokens
            key, value = key[:, :, :new], value[:, :, :new]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=heads != groups
        )
    # Query heads h = g * (heads / groups) + i share the keys of group g.
    rows = query.reshape(batch, groups, heads // groups * new, d)
    scores = (rows @ key.transpose(2, 3)) * (d**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, groups, heads // groups, new, seq)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if causal:
        mask = torch.ones(new, seq, dtype=torch.bool, device=scores.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None, :, :seq], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None, :, :seq]
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(batch, -1, -1, new, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)[..., :seq]
    out = weights.view(batch, groups, heads // groups * new, seq) @ value
    return out.view(batch, heads, new, value.shape[-1])  # values may be narrower than keys


def drop_foreign_windows(config: PreTrainedConfig) -> str | None:
    """Remove from a config what its class does not read and caches would obey; return what was removed, for a message.

    Caches are built for sliding windows wherever a config names some, as a Llama's may that was converted from Mistral.
    The model's masks know of none, so that replies would go wrong once they are longer than the window.
    """
    own = vars(type(config)())
    removed = {key: value for key in _WINDOWS if (value := vars(config).get(key)) is not None and key not in own}
    for key in removed:
        setattr(config, key, None)
    return ", ".join(f"{key} {value}" for key, value in removed.items()) or None


_WINDOWS = ("sliding_window", "attention_chunk_size", "layer_types")
"""Keys of a config that say which blocks attend to a window."""


def finite_eager_mask(*args: Any, **kwargs: Any) -> Float[Tensor, "batch 1 new seq"] | None:
    """transformers' mask of eager attention, but in float64 a token that sees nothing, as padding on the left, sees
    every token.

    The mask adds the least number of the model's dtype, and some architectures take the softmax in float32, where that
    of float64 is minus infinity. Padding would become NaN, which the next block multiplies by zero into every token.
    """
    mask = eager_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.float64:
        return mask
    return mask.masked_fill((mask < 0).all(-1, keepdim=True), 0.0)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register("eager", finite_eager_mask)

"""The tiny checkpoints again, loud: scores that reach softcaps, sinks that draw, windows shorter than the texts.

What `tiny_anatomies` writes leaves an architecture's additions too faint to be missed. Here each of them changes the
logits by more than any tolerance, and `SILENCED` leaves it out, so that a test can show that it would be missed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_anatomies import TINY, Tiny
from tiny_chat import save_tiny_chat
from torch import nn

Silence = Callable[[Any], None]
"""Leaves one addition of an architecture out of a running model."""


@dataclass(frozen=True)
class Loud:
    """One architecture with everything that it adds turned up."""

    tiny: Tiny
    silence: dict[str, Silence] = field(default_factory=dict)

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the checkpoint with a tokenizer and a chat template."""
        return save_tiny_chat(lambda at, **_: self.tiny.save(at, dtype, turned_up), path)


def turned_up(name: str, parameter: nn.Parameter) -> None:
    """Queries and keys that make the softmax choose, sinks that draw, biases of the size of what they are added to."""
    if any(part in name for part in ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv_proj")):
        parameter *= 3
    if name.endswith("sinks"):
        parameter += 1.5
    if "norm" not in name and name.endswith("bias"):
        parameter *= 1.5


def _config(**changes: Any) -> Silence:
    def silence(hf: Any) -> None:
        for key, value in changes.items():
            assert hasattr(hf.config, key), key
            setattr(hf.config, key, value)

    return silence


def _modules(name: str, value: Any) -> Silence:
    """An attribute of every module that has it."""

    def silence(hf: Any) -> None:
        found = [m for m in hf.modules() if hasattr(m, name)]
        assert found, name
        for module in found:
            setattr(module, name, value)

    return silence


def _tensors(part: str, value: float) -> Silence:
    """Parameters and buffers by a part of their names."""

    def silence(hf: Any) -> None:
        found = [p for n, p in (*hf.named_parameters(), *hf.named_buffers()) if part in n]
        assert found, part
        for tensor in found:
            tensor.data.fill_(value)

    return silence


def _wide_window(hf: Any) -> None:
    """As wide as any text."""
    hf.config.sliding_window = 1000


_SCORES = {"score softcap": _modules("attn_logit_softcapping", None)}
_LOGITS = {"final softcap": _config(final_logit_softcapping=None)}
_WINDOW = {"window": _wide_window}
_SLIDING = {"sliding_window": 4}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_USED = {**_MIXED, "use_sliding_window": True}


def _loud(name: str, config: dict[str, Any] | None = None, **silence: Silence) -> Loud:
    tiny = TINY[name]
    return Loud(replace(tiny, config={**tiny.config, **(config or {})}), silence)


_HEADS = {"num_key_value_heads": 4}  # it has no groups


def _phi3(original: int) -> dict[str, Any]:
    """LongRoPE, whose factors are others beyond so many tokens; half of each head rotates."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    rope["original_max_position_embeddings"] = original
    more = {"original_max_position_embeddings": original, "max_position_embeddings": 64, "partial_rotary_factor": 0.5}
    return {**_SLIDING, **more, "rope_parameters": rope}


_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

LOUD: dict[str, Loud] = {
    "llama": _loud("llama biases", {"rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama tied": _loud("llama", {"tie_word_embeddings": True}),
    "mistral": _loud("mistral", _SLIDING, **_WINDOW),
    "qwen2": _loud("qwen2", _USED, **_WINDOW),
    "qwen3": _loud("qwen3", _USED, **_WINDOW),
    "phi3": _loud("phi3", _phi3(64), **_WINDOW),
    "phi3 beyond its first context": _loud("phi3", _phi3(2), **_WINDOW),
    "gemma2": _loud(
        "gemma2", {**_MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        **_SCORES, **_LOGITS, **_WINDOW,
    ),
    "gemma3": _loud(
        "gemma3", {**_MIXED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}, **_LOGITS, **_WINDOW
    ),
    "olmo2": _loud("olmo2"),
    "gpt2": _loud("gpt2", {"scale_attn_by_inverse_layer_idx": True}, positions=_tensors("wpe", 0.0)),
    "gpt-neox": _loud("gpt-neox", {"rotary_pct": 0.5, **_HEADS}),
    "gpt-neox sequential": _loud("gpt-neox sequential", _HEADS),
    "mixtral": _loud("mixtral", _SLIDING, **_WINDOW),
    "qwen2-moe": _loud("qwen2-moe"),
    "qwen3-moe": _loud("qwen3-moe", _SLIDING | {"use_sliding_window": True}, **_WINDOW),
    "gpt-oss": _loud("gpt-oss", _MIXED, sinks=_tensors("sinks", -1e4), **_WINDOW),
}  # fmt: skip
assert len({TINY[n].name for n in TINY}) == len({x.tiny.name for x in LOUD.values()})


def without(hf: Any, silence: Silence) -> Any:
    """A copy of the model with an addition left out."""
    silence(silenced := copy.deepcopy(hf))
    return silenced

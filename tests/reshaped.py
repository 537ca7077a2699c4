"""The default merge as a checkpoint of another architecture that computes the same function.

A real model that replies in real words, where tiny random checkpoints of that architecture reply in noise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PixtralVisionConfig,
)

Weights = dict[str, Tensor]


def _phi3(config: LlamaConfig, weights: Weights) -> tuple[Any, Weights]:
    """Query, key and value in one matrix, gate and up in another."""
    out = dict(weights)
    for block in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        out[f"{attention}.qkv_proj.weight"] = torch.cat([out.pop(f"{attention}.{x}_proj.weight") for x in "qkv"])
        out[f"{mlp}.gate_up_proj.weight"] = torch.cat([out.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")])
    return Phi3ForCausalLM(Phi3Config(**_shared(config))), out


def _mistral3(config: LlamaConfig, weights: Weights) -> tuple[Any, Weights]:
    """The text model of a wrapper that also has a small random vision tower."""
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = MistralConfig(**_shared(config), sliding_window=None)
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    own = {n.replace("model.", "model.language_model.", 1): w for n, w in weights.items()}
    return model, own | {n: w for n, w in model.state_dict().items() if n not in own}


def _mixtral(config: LlamaConfig, weights: Weights) -> tuple[Any, Weights]:
    """Two equal experts a block, both always chosen with the weight 0.5."""
    out = dict(weights)
    for block in range(config.num_hidden_layers):
        here = f"model.layers.{block}"
        gate, up, down = (out.pop(f"{here}.mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
        out[f"{here}.mlp.gate.weight"] = gate.new_zeros(2, config.hidden_size)
        out[f"{here}.mlp.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(2, 1, 1)
        out[f"{here}.mlp.experts.down_proj"] = down.repeat(2, 1, 1)
    return MixtralForCausalLM(MixtralConfig(**_shared(config), num_local_experts=2, num_experts_per_tok=2)), out


SHAPES: dict[str, Callable[[LlamaConfig, Weights], tuple[Any, Weights]]] = {
    "phi3": _phi3,
    "mistral3": _mistral3,
    "mixtral": _mixtral,
}


def save_reshaped(source: Path, shape: str, out: Path) -> Path:
    """Write the Llama checkpoint `source` as a checkpoint of another architecture, in its stored dtype."""
    weights = load_file(source / "model.safetensors")
    dtype = weights["model.embed_tokens.weight"].dtype
    model, state = SHAPES[shape](AutoConfig.from_pretrained(source), weights)
    state["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.to(dtype).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, out / name)
    return out


def _shared(config: LlamaConfig) -> dict[str, Any]:
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    )
    return {name: getattr(config, name) for name in names}

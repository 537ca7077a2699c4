"""Tiny checkpoints that repeat the words of their prompt, so that they show what their instruction says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_chat import save_tiny_chat

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "Qwen 3.5": ("Qwen3_5ForCausalLM", {"layer_types": ["linear_attention", "full_attention"]} | LINEAR),
}


def save_parrot(path: Path, architecture: str = "Llama", *, seed: int = 0, **config: Any) -> Path:
    """Write a checkpoint that repeats the words of its prompt, so that it shows what its instruction says.

    Its full attention adds the mean of the prompt's embeddings to the residual stream; all else is small and random.
    """
    name, more = ARCHITECTURES[architecture]
    model_class: Any = getattr(transformers, name)

    def save(place: Path, **chat: Any) -> Path:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
                 "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**(sizes | more | chat | config)))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith(("v_proj.weight", "o_proj.weight")):
                    weight.copy_(torch.eye(32) * (6 if architecture == "Qwen 3.5" else 3))  # an output gate halves it
                elif architecture == "Gemma 3" and "post_attention_layernorm" in key:
                    weight.fill_(20.0)  # the embedding is multiplied by the root of the width
                elif weight.ndim > 1:
                    weight.normal_(std=1.0 if "embed_tokens" in key else 0.02)
        model.save_pretrained(place)
        return place

    return save_tiny_chat(save, path)

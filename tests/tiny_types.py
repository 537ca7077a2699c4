"""Tiny random checkpoints of any type of transformers, each with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from steer.checkpoint.tiny import IDS, model_class_of, tiny_config, tiny_model, tiny_world

TOKENS = torch.randint(IDS.start, IDS.stop, (2, 12), generator=torch.Generator().manual_seed(1))

INCOMPLETE: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}
"""What the default configs of some types lack, as checkpoints have it."""


WITH_EXPERTS: dict[str, Any] = {
    "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    "hidden_size": 2816, "intermediate_size": 2112, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
    "num_global_key_value_heads": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
"""What Gemma 4 26B-A4B sets otherwise than the default config."""


def config_of_type(model_type: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The default config of a type, with what it lacks, and its class; of `wrapper:TYPE` that which reads pictures.
    `gemma4+experts` is Gemma 4 with experts beside each MLP."""
    wrapper, _, name = model_type.rpartition(":")
    name, _, experts = name.partition("+")
    config = CONFIG_MAPPING[name](**INCOMPLETE.get(name, {}) | (WITH_EXPERTS if experts and not wrapper else {}))
    if wrapper:
        if experts:
            config.text_config = type(config.text_config)(**WITH_EXPERTS)
        config.architectures = [transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]
    model_class = model_class_of(config)
    assert model_class is not None
    return config, model_class


def save_tiny_type(model_type: str, path: Path) -> Path:
    """Write a tiny random checkpoint in fp32, loud enough for every part to be heard."""
    config, model_class = config_of_type(model_type)
    with tiny_world():
        model = tiny_model(tiny_config(config, model_class), model_class)
    model.to(torch.float32).save_pretrained(path)  # outside, where fp32 is fp32
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(IDS.start, IDS.stop)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


def load_plain(path: Path, **more: Any) -> Any:
    """The model as transformers runs it, with its own attention and experts, every weight accounted for."""
    config = transformers.AutoConfig.from_pretrained(path)
    model_class: Any = model_class_of(config)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32} | more
    model, report = model_class.from_pretrained(path, output_loading_info=True, **plain)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["mismatched_keys"], report["mismatched_keys"]
    return model.eval()

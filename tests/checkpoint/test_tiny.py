"""Tiny configs of causal language models: every kind of block, sizes that differ, all else as it was; loud models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from steer.checkpoint.tiny import HEADS, IDS, VOCAB, WIDTH, Double, Unbuildable, model_class_of, tiny_config, tiny_model

TOKENS = torch.arange(IDS.start, IDS.start + 24).reshape(2, 12)


def small(name: str, model: str | None = None, **keys: Any) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The tiny config of a type's default one with some keys changed, and its class."""
    config = CONFIG_MAPPING[name](**keys)
    model_class = getattr(transformers, model) if model else model_class_of(config)
    assert model_class is not None
    return tiny_config(config, model_class), model_class


S, F, L = "sliding_attention", "full_attention", "linear_attention"
KINDS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "gemma3": ({}, {"layer_types": [S, S, F]}),  # a wrapper whose list repeats after six blocks
    "jamba": ({}, {"layer_types": [L, L, L, L, F], "layers_num_experts": [1, 4, 1, 4, 1]}),  # two periods with offsets
    "nemotron_h": ({"hybrid_override_pattern": "MEMEMEM*EMEM-"}, {"layer_types": [L, "moe", F, "mlp"]}),
    "deepseek_v3": ({}, {"first_k_dense_replace": 2}),
    "lfm2": ({"full_attn_idxs": [2, 5, 8]}, {"layer_types": ["conv", "conv", F]}),
    "qwen2_moe": ({"mlp_only_layers": [9]}, {"mlp_only_layers": [2]}),
    "gemma4_text": ({"num_kv_shared_layers": 10}, {"layer_types": [S, F, F, S, S, F], "num_kv_shared_layers": 2}),
    "zamba": ({}, {"layer_types": [L, L, "hybrid", "hybrid"]}),  # blocks that share weights
}
"""Keys that are changed in a type's default config, and what its tiny config says of the blocks."""


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_block_stays_and_few_blocks(name: str) -> None:
    changed, expected = KINDS[name]
    config = small(name, **changed)[0].get_text_config()
    assert {key: getattr(config, key) for key in expected} == expected
    lists = [len(value) for key, value in expected.items() if key.startswith("layer")]
    assert config.num_hidden_layers == (lists[0] if lists else 3)


def test_sizes_differ_and_all_else_stays() -> None:
    config, model_class = small("gemma2", final_logit_softcapping=7.0, query_pre_attn_scalar=99)
    sizes = [config.hidden_size, config.intermediate_size, config.vocab_size, config.num_attention_heads * 24, 2 * 24]
    assert sizes == [WIDTH, 40, VOCAB, 96, 48]
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (24, HEADS, 2)
    assert (config.final_logit_softcapping, config.query_pre_attn_scalar) == (7.0, 99)
    model = tiny_model(config, model_class)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_each_query_head_with_its_own_keys_stays_so_and_latent_attention_rotates_the_same_share() -> None:
    assert small("llama")[0].num_key_value_heads == HEADS
    config, _ = small("mistral4")
    share = config.qk_rope_head_dim / (config.qk_rope_head_dim + config.qk_nope_head_dim)
    assert (config.head_dim, config.rope_parameters["partial_rotary_factor"]) == (20, share)


def test_a_small_config_is_used_as_it_is() -> None:
    config = CONFIG_MAPPING["llama"](hidden_size=32, intermediate_size=50, num_attention_heads=2, num_hidden_layers=5)
    made = tiny_config(config, transformers.LlamaForCausalLM)
    assert made is not config
    assert made.to_dict() == config.to_dict()


def test_models_are_random_loud_float64_and_eager() -> None:
    config, model_class = small("gemma2")
    model, same, other = (tiny_model(config, model_class, seed) for seed in (0, 0, 1))
    values = dict(model.named_parameters())
    assert all(torch.equal(value, dict(same.named_parameters())[name]) for name, value in values.items())
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    assert not model.training
    assert model.config._attn_implementation == "eager"
    gain = 1 + values["model.layers.0.input_layernorm.weight"]  # Gemma stores what is added to 1
    assert 0.5 <= gain.min() < 0.8 < 1.2 < gain.max() <= 1.5
    assert 0.2 < values["model.layers.0.mlp.down_proj.weight"].std() < 0.3


def test_parameters_of_state_spaces_keep_the_values_of_the_class() -> None:
    config, model_class = small("mamba2")
    model = tiny_model(config, model_class)
    mixer: Any = model.get_submodule("backbone.layers.0.mixer")
    torch.testing.assert_close(mixer.A_log.detach(), torch.arange(1.0, len(mixer.A_log) + 1).log().double())
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))


def test_double_computes_in_float64_where_a_forward_pass_casts() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with Double():
        for y in (
            x.float(),
            x.to(torch.float32),
            x.bfloat16(),
            x.type(torch.float16),
            x.softmax(-1, dtype=torch.float32),
        ):
            assert y.dtype == torch.float64
        assert torch.equal(x.float(), x)
        assert torch.ones(2).dtype == torch.full((), torch.finfo(torch.float64).min).dtype == torch.float64
        assert torch.arange(2).dtype == torch.int64
    assert x.float().dtype == torch.float32
    model = tiny_model(*small("llama"))
    with torch.no_grad():
        rough = model(input_ids=TOKENS).logits
        with Double():
            exact = model(input_ids=TOKENS).logits
    assert exact.dtype == torch.float64
    assert 1e-9 < (rough - exact).abs().max() < 1e-4


def test_the_class_is_the_one_that_the_config_names() -> None:
    assert model_class_of(CONFIG_MAPPING["llama"]()) is transformers.LlamaForCausalLM
    assert model_class_of(CONFIG_MAPPING["mistral3"]()) is transformers.Mistral3ForConditionalGeneration
    named = CONFIG_MAPPING["llama4"](architectures=["Llama4ForConditionalGeneration"])
    assert model_class_of(named) is transformers.Llama4ForConditionalGeneration
    assert model_class_of(CONFIG_MAPPING["llama"](architectures=["OursForCausalLM"])) is None
    assert model_class_of(CONFIG_MAPPING["vit"]()) is None


def test_a_model_that_cannot_be_built_is_an_error_of_one_line() -> None:
    with pytest.raises(Unbuildable, match=r"^XmodForCausalLM: .*Input language unknown.*$") as error:
        small("xmod")
    assert "\n" not in str(error.value)


WRAPPERS: dict[str, dict[str, Any]] = {
    "Gemma4ForConditionalGeneration": {"vision_config": {}, "audio_config": {}},
    "Llama4ForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    },
    "Qwen3VLForConditionalGeneration": {},
    "Qwen3_5ForConditionalGeneration": {},
    "Qwen3_5MoeForConditionalGeneration": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_run_on_text_alone(name: str) -> None:
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class(**WRAPPERS[name]), model_class)
    assert type(config) is model_class.config_class
    assert 3 <= config.get_text_config().num_hidden_layers <= 4
    assert config.get_text_config().hidden_size == WIDTH

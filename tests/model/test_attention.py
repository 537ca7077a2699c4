"""The attention for CPUs: the logits of transformers' eager one, whatever an architecture adds to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_types import TOKENS, load_plain, save_tiny_type
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steer.core.sampler import Sampler
from steer.errors import UnsupportedError
from steer.model import attention
from steer.model.decode import generate
from steer.model.forward import logits
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel, load
from steer.serve.packed import packed_attention

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        GptOssConfig(**SIZES, sliding_window=5, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=["llama", "gemma2: softcap, sliding window", "gpt-oss: sinks, sliding window"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_the_logits_are_those_of_eager_attention(config, cached):
    torch.manual_seed(0)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **plain).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    ids = torch.randint(3, 64, (2, 20))

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            if not cached:
                return model(ids, use_cache=False).logits
            first = model(ids[:, :12], use_cache=True)
            rest = [model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(12, 20)]
            return torch.cat([first.logits, *rest], dim=1)

    eager = logits()
    model.set_attn_implementation(attention.NAME)
    # Eager attention takes its softmax in fp32, whatever the dtype.
    torch.testing.assert_close(logits(), eager, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attend", [attention.grouped_attention, packed_attention])
def test_an_argument_that_it_does_not_know_is_an_error_and_never_dropped(attend):
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UnsupportedError, match=r"found the argument position_bias; load the model with attn_impl") as e:
        attend(torch.nn.Identity(), q, q, q, None, position_bias=q)
    assert "\n" not in str(e.value)
    attend(torch.nn.Identity(), q, q, q, None, position_bias=None, use_cache=True, sliding_window=4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_without_a_mask_tokens_see_what_came_before_them_unless_the_model_looks_both_ways(softcap):
    q, k, v = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def read(**more) -> torch.Tensor:
        return attention.grouped_attention(torch.nn.Identity(), q, k, v, None, softcap=softcap, **more)[0]

    scores = q @ k.transpose(2, 3) / 8**0.5
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    before = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(read(), (before.softmax(-1) @ v).transpose(1, 2))
    torch.testing.assert_close(read(is_causal=False), (scores.softmax(-1) @ v).transpose(1, 2))


def test_a_model_whose_scores_have_a_softcap_does_not_run_on_transformers_sdpa():
    config = Gemma2Config(**SIZES, attn_logit_softcapping=2.0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert SteeredModel(hf, None).hf.config._attn_implementation == attention.NAME
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    assert SteeredModel(plain, None).hf.config._attn_implementation == "sdpa"


def test_whether_it_fits_a_proved_architecture_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    source = save_tiny_type("glm", tmp_path / "source")

    def loaded() -> str:
        return load(source, dtype="float32").hf.config._attn_implementation

    assert loaded() == attention.NAME
    (kept,) = (p for p in (tmp_path / "home" / "anatomies").glob("*.json") if p.read_text() == "true")
    kept.write_text("false")
    assert loaded() == "eager"  # what was kept is believed
    kept.write_bytes(b"\xff")
    assert loaded() == attention.NAME


@pytest.mark.parametrize("model_type", ["mpt", "stablelm"])
def test_in_float64_padding_on_the_left_changes_no_text(tmp_path: Path, model_type: str):
    """Their softmax is in fp32, which holds no number that is as far below 0 as the mask's in fp64."""
    place = save_tiny_type(model_type, tmp_path / "source")
    model, plain = load(place, dtype="float64"), load_plain(place, dtype=torch.float64)
    assert model.hf.config._attn_implementation == "eager"
    texts = [TOKENS[0].tolist(), TOKENS[1, :7].tolist(), TOKENS[0, :4].tolist()]
    read = prefill(model, texts, prompts=[len(t) for t in texts])
    with torch.no_grad():
        for text, hidden in zip(texts, read.hidden, strict=True):
            alone = plain(input_ids=torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(logits(model, hidden[-1]), alone, rtol=0, atol=2e-5 * float(alone.abs().max()))
    greedy = Sampler(temperature=0.0, max_new_tokens=6, repetition_penalty=1.0)
    assert generate(model, texts, greedy) == [generate(model, [text], greedy)[0] for text in texts]


@pytest.mark.slow
def test_no_architecture_of_transformers_loses_a_window_of_its_own():
    made_of_three = {"musicgen", "musicgen_melody"}  # which have no default config
    types = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - made_of_three
    texts = [CONFIG_MAPPING[model_type]().get_text_config() for model_type in types]
    assert len(texts) > 170
    assert [t.model_type for t in texts if attention.drop_foreign_windows(t)] == []

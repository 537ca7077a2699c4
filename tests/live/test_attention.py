"""The attention for CPUs: the logits of transformers' eager one, whatever an architecture adds to it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig

from steer.live import attention

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

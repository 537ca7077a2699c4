"""Texts beyond the context that a checkpoint began with, by each kind of rotary scaling, beside plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loud_anatomies import LOUD, Loud
from slow_steering import watched
from tiny_anatomies import VOCAB
from tiny_anatomies import load as load_plain
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.errors import UsageError
from steer.model import prefill as prefill_module
from steer.model.decode import decode, generate
from steer.model.kv_cache import PrefixCache
from steer.model.prefill import Beginning, prefill
from steer.model.steered import SteeredModel, load
from steer.model.steering.receipts import Tally
from steer.sae.documents import documents

LIMIT = 24
"""Where the rotary frequencies become others, or the original context."""
GREEDY = Sampler(max_new_tokens=10, temperature=0, repetition_penalty=1.0)
TEXT = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
EXACT = {"atol": 3e-5, "rtol": 3e-5}
"""Rotary angles, norms and softmax of transformers are in fp32."""

Pair = tuple[SteeredModel, Any]


def pair(loud: Loud, place: Path, **tokenizer_options: Any) -> Pair:
    """A checkpoint as steer runs it and as transformers does, both in fp64."""
    loud.save(place)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place, **tokenizer_options)
    model = SteeredModel(load(place, dtype=torch.float64).hf, tokenizer, "loud", place)
    model.end_token_ids = frozenset()
    return model, load_plain(place)


def longrope(window: int | None) -> Loud:
    """Phi 3 with other factors beyond `LIMIT` tokens."""
    tiny = LOUD["phi3"].tiny
    key = {"original_max_position_embeddings": LIMIT}
    rope = tiny.config["rope_parameters"] | key
    return Loud(replace(tiny, config=tiny.config | key | {"rope_parameters": rope, "sliding_window": window}))


def scaled(kind: str, **config: Any) -> Loud:
    """A Llama whose `LIMIT` tokens are stretched by a factor of 2."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    tiny = LOUD["llama"].tiny
    more = {"rope_parameters": rope, "max_position_embeddings": LIMIT, **config}
    return Loud(replace(tiny, config=tiny.config | more))


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def phi3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(longrope(request.param), tmp_path_factory.mktemp("phi3") / "model")


@torch.no_grad()
def whole(plain: Any, text: Sequence[int], start: int) -> Tensor:
    """The logits after each of the tokens from `start` on, each by a pass of transformers over the whole text so far:
    those that a reply's tokens are drawn by."""
    return torch.cat([plain(torch.tensor([text[:n]])).logits[:, -1] for n in range(start, len(text) + 1)])


def reply(model: SteeredModel, prompt: list[int], memory: PrefixCache | None = None) -> tuple[list[int], Tensor]:
    """A reply's tokens, and the logits that they were drawn by."""
    with watched(model) as seen:
        made = [step.tokens[0] for step in decode(model, [prompt], GREEDY, memory=memory)]
    return made, torch.cat(seen)


def test_both_sets_of_factors_are_loud(phi3: Pair):
    model, plain = phi3
    assert model.anatomy.rotary_limit == LIMIT
    rotary = model.hf.model.rotary_emb
    angles = [rotary(torch.zeros(1, 1), torch.arange(n)[None])[0][0, 5] for n in (LIMIT, LIMIT + 1)]
    assert (angles[0] - angles[1]).abs().max() > 0.3
    assert plain.config.max_position_embeddings == model.context == 64


@pytest.mark.parametrize("length", [LIMIT - 10, LIMIT - 3, LIMIT, LIMIT + 1, LIMIT + 9])
def test_a_reply_is_drawn_by_the_logits_of_whole_passes_wherever_it_crosses(phi3: Pair, length: int):
    model, plain = phi3
    made, logits = reply(model, TEXT[:length])
    torch.testing.assert_close(logits, whole(plain, TEXT[:length] + made[:-1], length), **EXACT)


def test_a_chat_that_crosses_and_one_that_is_cut_back_are_read_as_if_anew(phi3: Pair):
    model, plain = phi3
    memory, text = PrefixCache(), TEXT[:8]
    for added in ([], TEXT[40:44], TEXT[44:48]):  # 18, 32 and 46 tokens with the replies
        text = [*text, *added]
        made, logits = reply(model, text, memory)
        torch.testing.assert_close(logits, whole(plain, text + made[:-1], len(text)), **EXACT)
        text += made
    for shorter in (text[:12], text[:40], text[:9]):
        made, logits = reply(model, shorter, memory)
        torch.testing.assert_close(logits, whole(plain, shorter + made[:-1], len(shorter)), **EXACT)


def test_a_long_text_is_read_whole_where_its_beginning_alone_would_be_rotated_otherwise(
    phi3: Pair, monkeypatch: pytest.MonkeyPatch
):
    model, plain = phi3
    monkeypatch.setattr(prefill_module, "AT_ONCE", 8)
    monkeypatch.setattr(prefill_module, "PASS", 0)
    texts = [TEXT[:50], [*TEXT[:40], 7, 8, 9]]
    begun = Beginning.of(model, [t[:20] for t in texts])
    assert (begun is None) == (plain.config.sliding_window is not None)
    for before in (None, begun):
        read = prefill(model, texts, prompts=[30, 30], begun=before).hidden
        for text, hidden in zip(texts, read, strict=True):
            with torch.no_grad():
                expected = plain.model(torch.tensor([text])).last_hidden_state[0, 29:]
            torch.testing.assert_close(hidden[-len(expected) :], expected, **EXACT)


def test_chats_written_together_are_those_written_alone(phi3: Pair):
    model, plain = phi3
    chats = [[{"role": "user", "content": "ba " * n}] for n in (1, 9, 14, 30)]
    prompts = [model.prompt_ids(c) for c in chats]
    assert len(prompts[0]) + GREEDY.max_new_tokens < LIMIT < len(prompts[-1])
    for prompt, made in zip(prompts, model.replies(chats, GREEDY), strict=True):
        assert made == whole(plain, prompt + made[:-1], len(prompt)).argmax(-1).tolist()


def test_a_batch_that_crosses_goes_on_without_the_rows_that_left_it(phi3: Pair):
    model, plain = phi3
    prompts = [TEXT[:18], TEXT[20:38], TEXT[30:48]]
    ends = generate(model, prompts, GREEDY)
    model.end_token_ids = frozenset({ends[1][2]})  # one row leaves before the others cross
    try:
        found = generate(model, prompts, GREEDY)
    finally:
        model.end_token_ids = frozenset()
    assert len({len(made) for made in found}) > 1
    for prompt, made in zip(prompts, found, strict=True):
        assert made == whole(plain, prompt + made[:-1], len(prompt)).argmax(-1).tolist()


def test_a_receipt_counts_tokens_that_are_read_again_once(phi3: Pair, make_direction: Callable[..., Any]):
    model, tally = phi3[0], Tally()
    edit = Edit(add=((make_direction(), 1.0),))
    with model.steering.applied([edit]):
        made = [s.tokens[0] for s in decode(model, [TEXT[: LIMIT - 3]], GREEDY, tally=tally)]
    receipt = tally.receipt()
    assert receipt.tokens == receipt.sliders[0].tokens == LIMIT - 3 + len(made) - 1


def test_documents_of_a_harvest_end_where_the_factors_change(phi3: Pair, tmp_path: Path):
    (tmp_path / "x.txt").write_text("hello " * 60)
    assert {len(d.ids) for d in documents(phi3[0], str(tmp_path / "x.txt"), context=50)} == {LIMIT, 60 % LIMIT}


@pytest.mark.slow
def test_compiled_decoding_crosses_too(tmp_path: Path):
    model, plain = pair(longrope(None), tmp_path / "model")
    model.compile()
    made, logits = reply(model, TEXT[: LIMIT - 4])
    torch.testing.assert_close(logits, whole(plain, TEXT[: LIMIT - 4] + made[:-1], LIMIT - 4), **EXACT)


@pytest.mark.parametrize(("stated", "context"), [(2 * LIMIT, 2 * LIMIT), (30, 30), (LIMIT, LIMIT), (1000, LIMIT)])
def test_linear_scaling_reaches_as_far_as_the_tokenizer_says(tmp_path: Path, stated: int, context: int):
    model, plain = pair(scaled("linear"), tmp_path / "model", model_max_length=stated)
    assert model.context == context
    made, logits = reply(model, TEXT[:18])
    assert len(made) == min(10, context - 18)
    torch.testing.assert_close(logits, whole(plain, TEXT[:18] + made[:-1], 18), **EXACT)
    with pytest.raises(UsageError, match=f"expected a prompt of at most {context - 1} tokens"):
        reply(model, TEXT[:context])


def test_dynamic_scaling_ends_where_it_would_change_the_keys_that_are_held(tmp_path: Path):
    model, plain = pair(scaled("dynamic"), tmp_path / "model", model_max_length=2 * LIMIT)
    assert model.context == model.anatomy.rotary_limit == LIMIT
    made, logits = reply(model, TEXT[:16])
    assert len(made) == LIMIT - 16
    torch.testing.assert_close(logits, whole(plain, TEXT[:16] + made[:-1], 16), **EXACT)
    with pytest.raises(UsageError, match=f"expected a prompt of at most {LIMIT - 1} tokens"):
        reply(model, TEXT[:LIMIT])

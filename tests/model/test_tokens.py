"""End tokens at odds, tokens without a row in the embedding, contexts that end, dtypes that overflow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_chat import ENDLESS, TEMPLATE, save_tiny_chat
from tokenizers import processors

from steer.chat.session import Session
from steer.core.sampler import Sampler
from steer.errors import CheckpointError, UsageError
from steer.measure.contrast import Reply, reply_means
from steer.measure.harness import text_entropies
from steer.model.steered import SteeredModel, load
from steer.model.tokens import ContextWarning, context_length, padded
from steer.sae.documents import documents
from steer.sae.harvest import harvest
from steer.serve.requests import CompletionRequest, completion_prompts

Save = Callable[..., Path]
EOS, ASSISTANT = 2, 5
"""`</s>` and `<|assistant|>` of the tiny tokenizer."""


@pytest.fixture
def model(tiny_llama: Save, tmp_path: Path) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path / "chat"))


@pytest.fixture
def endless(tiny_llama: Save, tmp_path: Path) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path / "endless", **ENDLESS))


def save_gpt2(path: Path, **config: object) -> Path:
    """As `save_tiny_llama`, with learnt positions, 64 of them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97}
    made = transformers.GPT2Config(**(sizes | config))
    transformers.GPT2LMHeadModel(made).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"eos_token_id": 0}, {0, EOS}),
        ({"eos_token_id": [0, 7]}, {0, EOS, 7}),
        ({"eos_token_id": -1}, {EOS}),
        ({"eos_token_id": None, "template": TEMPLATE.replace("</s>", "<|assistant|>")}, {EOS, ASSISTANT}),
        ({"eos": None, "template": TEMPLATE.replace("</s>", "<|assistant|>"), "eos_token_id": 0}, {0, ASSISTANT}),
        (ENDLESS, set()),
        ({"template": "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}"}, {EOS}),
    ],
    ids=[
        "config and tokenizer",
        "a list",
        "-1 for none",
        "template and tokenizer",
        "template and config",
        "none",
        "one that refuses",
    ],
)
def test_whatever_anybody_calls_an_end_token_ends_a_reply(
    tiny_llama: Save, tmp_path: Path, settings: dict[str, Any], ends: set[int]
) -> None:
    assert load(save_tiny_chat(tiny_llama, tmp_path / "m", **settings)).end_token_ids == ends


def test_a_reply_ends_at_the_tokenizers_end_token_where_the_config_names_another(
    tiny_llama: Save, tmp_path: Path
) -> None:
    model = load(save_tiny_chat(tiny_llama, tmp_path / "m", eos_token_id=0))
    says_eos = Sampler(max_new_tokens=8, temperature=0.0, logit_bias=((EOS, 100.0),))
    assert model.replies([[{"role": "user", "content": "hello"}]], says_eos) == [[]]


def test_a_pad_token_without_a_row_is_never_fed(model: SteeredModel) -> None:
    chats = [[{"role": "user", "content": words}] for words in ("hello", "hello friend well yes")]
    replies = [Reply(tuple(c), (9, 10, 11), "") for c in chats]
    before = reply_means(model, replies)
    model.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert model.tokenizer.pad_token_id == model.vocabulary
    assert torch.equal(reply_means(model, replies), before)
    assert len(model.replies(chats, Sampler(max_new_tokens=2))) == 2


def test_padding_is_where_the_mask_is_0_and_in_the_embedding() -> None:
    ids, mask = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = padded([[5, 6, 7], [8]], left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_added_token_beyond_the_embedding_is_named_wherever_text_comes_in(
    model: SteeredModel, tmp_path: Path
) -> None:
    model.tokenizer.add_tokens(["zonk"])
    text = tmp_path / "x.txt"
    text.write_text("hello zonk\n")
    reads: list[Callable[[], object]] = [
        lambda: model.chat("hello zonk"),
        lambda: list(Session(model).reply("zonk")),
        lambda: model.replies([[{"role": "user", "content": "zonk"}]], Sampler(max_new_tokens=1)),
        lambda: list(documents(model, str(text))),
        lambda: harvest(model, tmp_path / "out", sites=[1], sources=str(text)),
        lambda: text_entropies(model, ["hello zonk"]),
    ]
    for read in reads:
        with pytest.raises(CheckpointError, match=r"expected tokens below 77, .* found 77 \('zonk'\)"):
            read()
    assert model.chat("hello", max_new_tokens=1) is not None


def test_a_tokenizer_that_puts_an_end_after_every_text_ends_no_prompt(model: SteeredModel) -> None:
    """As tunes have it that were trained with add_eos_token."""
    model.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    hello = model.tokenizer.convert_tokens_to_ids("hello")
    assert model.tokenizer("hello").input_ids == [1, hello, EOS]
    assert model.encode("hello", frame=True) == [1, hello]
    for text in ("hello", "<s>hello", "<s> hello"):
        (prompt,) = completion_prompts(model, CompletionRequest(prompt=text), 64)
        assert prompt.ids == (1, hello)
    (empty,) = completion_prompts(model, CompletionRequest(prompt=""), 64)
    assert empty.ids == (1,)


def test_half_a_character_is_an_error_of_one_line(model: SteeredModel) -> None:
    for read in (lambda: model.chat("a\udcffb"), lambda: model.encode("\ud800")):
        with pytest.raises(UsageError, match="expected Unicode, found half of a character"):
            read()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_that_leaves_no_room_is_refused_and_a_reply_ends_where_the_context_does(
    tiny_llama: Save, tmp_path: Path, architecture: str
) -> None:
    save = tiny_llama if architecture == "llama" else lambda path, **config: save_gpt2(path, **config)
    settings = ENDLESS | ({"max_position_embeddings": 64} if architecture == "llama" else {})
    model = load(save_tiny_chat(save, tmp_path / "m", **settings))
    model.end_token_ids = frozenset()
    assert model.context == 64
    long = [{"role": "user", "content": "hello " * 80}]
    for read in (
        lambda: model.chat(long),
        lambda: model.replies([[{"role": "user", "content": "yes"}], long], Sampler(max_new_tokens=1)),
    ):
        with pytest.raises(UsageError, match=r"expected a prompt of at most 63 tokens, .* found 8\d"):
            read()
    chats = [[{"role": "user", "content": "hello " * n}] for n in (1, 50)]
    room = [64 - len(model.prompt_ids(c)) for c in chats]
    with pytest.warns(ContextWarning, match="reads at most 64 tokens"):
        made = model.replies(chats, Sampler(max_new_tokens=200))
    assert [len(r) for r in made] == room
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is as long as it was asked to be
        assert len(model.replies([chats[1]], Sampler(max_new_tokens=room[1]))[0]) == room[1]


def test_documents_are_cut_to_the_models_own_context(tmp_path: Path) -> None:
    model = load(save_tiny_chat(lambda path, **config: save_gpt2(path, **config), tmp_path / "m"))
    text = tmp_path / "x.txt"
    text.write_text("hello " * 200)
    assert [len(d.ids) for d in documents(model, str(text))] == [64, 64, 64, 8]
    harvest(model, tmp_path / "out", sites=[1], sources=str(text))


def test_yarn_stretches_the_context_and_nothing_else_does() -> None:
    plain = transformers.LlamaConfig(max_position_embeddings=1000)
    assert context_length(plain) == 1000
    for kind, length in (("yarn", 4000), ("llama3", 1000), ("linear", 1000)):
        scaled = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1000}
        plain.rope_parameters = scaled
        assert context_length(plain) == length
    window = transformers.Gemma3TextConfig(max_position_embeddings=900, sliding_window=4)
    assert context_length(window) == 900
    assert context_length(transformers.GPT2Config(n_positions=77)) == 77
    assert context_length(transformers.MptConfig(max_seq_len=77)) == 77
    by_kind = {"full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 900}}
    window.rope_parameters = by_kind | {"sliding_attention": {"rope_type": "default"}}
    assert context_length(window) == 3600


@pytest.fixture
def overflowing(tiny_llama: Save, tmp_path: Path) -> SteeredModel:
    """A model in float16 whose residual stream is beyond 65504."""
    model = load(save_tiny_chat(tiny_llama, tmp_path / "half", dtype=torch.float16), dtype=torch.float16)
    with torch.no_grad():
        model.hf.model.layers[1].post_attention_layernorm.weight.fill_(3e4)
    return model


def test_a_dtype_that_overflows_is_named_at_the_first_forward_pass(overflowing: SteeredModel, tmp_path: Path) -> None:
    model = overflowing
    text = tmp_path / "x.txt"
    text.write_text("hello friend\n\nwell yes")
    replies = [Reply(({"role": "user", "content": "hello"},), (9, 10), "")]
    for read in (
        lambda: model.chat("hello"),
        lambda: model.replies([[{"role": "user", "content": "hello"}]], Sampler(max_new_tokens=1)),
        lambda: reply_means(model, replies),
        lambda: harvest(model, tmp_path / "out", sites=[1], sources=str(text)),
    ):
        with pytest.raises(CheckpointError, match="found NaN or infinity in float16; load it as float32"):
            read()

"""A chat template whose end of turn is no token of the tokenizer: replies end at its text, which nobody sees."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from serving import served
from tiny_chat import TEMPLATE, save_tiny_chat

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.chat.session import Session
from steer.checkpoint.chat_templates import chosen_template
from steer.core.sampler import Sampler
from steer.measure.harness import neutral_replies
from steer.model.steered import SteeredModel, load

ENDS = "{% for m in messages %}{{ m.role + ':' + m.content + '[END]' }}{% endfor %}{{ '>' if add_generation_prompt }}"
GREEDY = Sampler(24, 0.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    """A model of bytes that says "yes[END]" again and again: each token is chosen by the token before it alone."""
    place = tmp_path_factory.mktemp("ends") / "chat"
    model = load(
        save_tiny_chat(tiny_llama, place, by_bytes=True, template=ENDS, tie=False, max_position_embeddings=512)
    )
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        seen = model.hf.model.norm(model.hf.get_input_embeddings().weight)
        for one, following in pairwise(model.encode(">yes[END]y")):
            model.hf.lm_head.weight[following] += seen[one]
    return model


def test_the_end_is_a_text_only_where_it_is_no_token(model: SteeredModel, tiny_llama, tmp_path: Path) -> None:
    assert model.end_text == "[END]"
    assert load(save_tiny_chat(tiny_llama, tmp_path / "chat", template=TEMPLATE)).end_text is None
    for name, text in (("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("llama3", "<|eot_id|>"), ("plain", None)):
        model.tokenizer.chat_template = chosen_template(name)
        assert model.template.turn_end().text == text, name
    model.tokenizer.chat_template = ENDS


def test_every_way_to_reply_ends_before_it(model: SteeredModel) -> None:
    pieces = list(model.stream("hello", sampler=GREEDY))
    assert "".join(pieces) == "yes"
    (ids,) = model.replies([[{"role": "user", "content": "hello"}]], GREEDY)
    assert model.text(ids) == "yes"
    longer = model.replies([[{"role": "user", "content": t}] for t in ("hello", "a")], Sampler(5, 0.0), keys=[0, 1])
    assert [model.text(r) for r in longer] == ["yes[E", "yes[E"]  # too short to know that it is the mark
    assert {r.text for r in neutral_replies(model, ["hello", "and you?"])} == {"yes"}


def test_chats_and_comparisons_end_before_it(model: SteeredModel) -> None:
    session = Session(LocalBackend(model), sampler=GREEDY)
    assert "".join(session.reply("hello")) == "yes"
    chat = Chat(LocalBackend(model), keep=False)
    chat.sampler = GREEDY
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    assert reply.text == "yes"
    assert reply.written is not None
    assert (model.text(reply.written.ids), reply.written.ending) == ("yes", "ended")
    comparison = chat.compare("hello", chat.side("plain"), chat.side("now"))
    assert comparison.wait(20)
    assert [s.text for s in comparison.shown] == ["yes", "yes"]
    assert [s.tokens for s in comparison.shown] == [3, 3]
    chat.close()


def test_the_server_ends_chats_before_it_and_leaves_plain_texts_alone(model: SteeredModel) -> None:
    with served(model) as server:
        body = {"max_tokens": 24, "temperature": 0, "repetition_penalty": 1}
        answer = server.post("/v1/chat/completions", body | {"messages": [{"role": "user", "content": "hello"}]}).json()
        assert answer["choices"][0]["message"]["content"] == "yes"
        assert answer["choices"][0]["finish_reason"] == "stop"
        plain = server.post("/v1/completions", body | {"prompt": ">"}).json()
        assert plain["choices"][0]["text"].startswith("yes[END]yes[END]")

"""Templates and thoughts over HTTP: options reach the template, thoughts have their field, changes are said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, served
from tiny_chat import TEMPLATE, save_tiny_chat

from steer.chat.remote import RemoteBackend
from steer.chat.session import Session
from steer.core.sampler import Sampler
from steer.model.steered import load
from steer.serve.engine import Token
from steer.serve.writing import ReplyText

THINKING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    + TEMPLATE
    + "{% if add_generation_prompt and enable_thinking is not false %}<think> {% endif %}"
)
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("served") / "chat", template=THINKING)
    with pytest.MonkeyPatch.context() as patch, served(load(place)) as running:
        patch.setenv("STEER_HOME", str(place / "home"))
        yield running


def body(server: Served, messages: Any = HELLO, **more: Any) -> dict[str, Any]:
    """A request whose reply is "yes yes yes"."""
    yes = server.model.tokenizer.convert_tokens_to_ids("yes")
    return {"messages": messages, "max_tokens": 3, "logit_bias": {str(yes): 100.0}, "temperature": 0, **more}


def message(server: Served, *args: Any, **more: Any) -> dict[str, Any]:
    answer = server.post(CHAT, body(server, *args, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def test_thoughts_that_the_prompt_opens_have_a_field_of_their_own_in_streams_too(server: Served) -> None:
    said = message(server)
    assert (said["content"], said["reasoning_content"]) == ("", "yes yes yes")
    with server.client().chat.completions.create(model="chat", stream=True, **body(server)) as stream:
        deltas = [c.choices[0].delta for c in stream if c.choices]
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == "yes yes yes"
    assert "".join(d.content or "" for d in deltas) == ""
    answer = message(server, [*HELLO, {"role": "assistant", "content": "<think> lie </think> well"}])
    assert answer["content"].split() == ["yes", "yes", "yes"]
    assert "reasoning_content" not in answer


@pytest.mark.parametrize(
    "off", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False, "other": [1]}}]
)
def test_a_request_switches_thoughts_off(server: Served, off: dict[str, Any]) -> None:
    answer = server.post(CHAT, body(server, **off)).json()
    said = answer["choices"][0]["message"]
    assert (said["content"].strip(), "reasoning_content" in said) == ("yes yes yes", False)
    assert answer["usage"]["prompt_tokens"] == len(server.model.prompt_ids(HELLO, thoughts=False))
    assert answer["usage"]["prompt_tokens"] < len(server.model.prompt_ids(HELLO))
    warned = " ".join(answer["steering"]["warnings"])
    assert ("no option other" in warned) == ("chat_template_kwargs" in off)


@pytest.mark.parametrize("options", [{"chat_template": "x"}, {"tokenize": True}, {"messages": []}, {"self": 1}, "x"])
def test_options_that_are_no_templates_are_refused(server: Served, options: Any) -> None:
    answer = server.post(CHAT, body(server, chat_template_kwargs=options))
    assert answer.status_code == 400
    assert "chat_template_kwargs" in answer.json()["error"]["message"]


def test_a_refused_system_prompt_is_folded_and_the_reply_says_so(server: Served) -> None:
    answer = server.post(CHAT, body(server, [{"role": "system", "content": "well"}, *HELLO])).json()
    assert "the system prompt is sent in the first user turn" in answer["steering"]["warnings"][0]
    folded = [{"role": "user", "content": "well\n\nhello"}]
    assert answer["usage"]["prompt_tokens"] == len(server.model.prompt_ids(folded))
    assert server.post(CHAT, body(server)).json()["steering"]["warnings"] == []


def test_the_thoughts_of_past_replies_reach_the_template(server: Served) -> None:
    past = {"role": "assistant", "content": "well", "reasoning_content": "lie lie "}
    plain = message_tokens(server, [*HELLO, past | {"reasoning_content": None}, *HELLO])
    assert message_tokens(server, [*HELLO, past, *HELLO]) == plain + 2


def message_tokens(server: Served, messages: Any) -> int:
    return server.post(CHAT, body(server, messages)).json()["usage"]["prompt_tokens"]


def test_a_chat_over_the_server_keeps_thoughts_and_can_leave_them_out(server: Served) -> None:
    yes = server.model.tokenizer.convert_tokens_to_ids("yes")
    sampler = Sampler(3, 0.0, logit_bias=((yes, 100.0),))
    backend = RemoteBackend(server.url)
    assert "".join(Session(backend, sampler=sampler).reply("hello")).startswith("<think>\nyes")
    backend.template_options = {"enable_thinking": False}
    assert "".join(Session(backend, sampler=sampler).reply("hello")).strip() == "yes yes yes"


@pytest.mark.parametrize("stop", [(), ("lo",)])
def test_pieces_split_thoughts_and_stop_strings_alike(server: Served, stop: tuple[str, ...]) -> None:
    tokenizer = server.model.tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    ids = tokenizer("<think> so so </think> well lo yes", add_special_tokens=False).input_ids
    text = ReplyText(tokenizer, (), stop, "")
    made = [*(text.add(Token(i, None, (), False)) for i in ids), text.end()]
    assert "".join(p.thoughts for p in made) == "so so"
    assert "".join(p.text for p in made).strip() == ("well" if stop else "well lo yes")
    assert len([t for p in made for t in p.tokens]) >= 5

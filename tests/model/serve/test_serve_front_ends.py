"""Requests as front ends send them: numbers as text, tools in a history, foreign fields, other hosts, web pages."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import NO_END, Served, served
from tiny_chat import TEMPLATE

from steer.core.profile import Profile
from steer.core.sampler import PRESETS
from steer.errors import UsageError
from steer.model.steered import SteeredModel
from steer.serve.limits import Limits
from steer.serve.requests import ChatRequest, CompletionRequest, chat_prompt, sampler_of, warnings_of
from steer.serve.server import Options

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello friend"}]
PAGE = "https://lite.example.org"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    {"role": "user", "content": "hello"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "bo"}'}},
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "no JSON"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "yes"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "well"}]},
]
"""A history in which the model called two tools."""


@pytest.fixture(scope="module")
def open_server(served_model: SteeredModel) -> Iterator[Served]:
    """A server with every option for other machines' clients."""
    options = Options(
        profiles=[Profile.parse({"name": "noir"}, "noir")],
        allow_hosts=["host.docker.internal", "Workshop.local"],
        allow_origins=[PAGE, "null"],
        any_model_name=True,
    )
    with served(served_model, options) as running:
        yield running


def sampled(body: dict[str, Any], limits: Limits | None = None) -> Any:
    """The sampler that the fields of a body give."""
    request = CompletionRequest.model_validate({"prompt": "hello"} | body)
    return sampler_of(request, PRESETS["plain"], limits or Limits(), 77, 512)


def reply(server: Served, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    base: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    answer = server.post(path, base | {"max_tokens": 4} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"max_tokens": 24.0}, {"max_new_tokens": 24}),
        ({"max_tokens": "24"}, {"max_new_tokens": 24}),
        ({"n_predict": "24.0"}, {"max_new_tokens": 24}),
        ({"max_tokens": -1}, {"max_new_tokens": 512}),
        ({"n_predict": -2}, {"max_new_tokens": 512}),
        ({"max_tokens": 0}, {"max_new_tokens": PRESETS["plain"].max_new_tokens}),
        ({"top_k": 40.0, "seed": 1.0, "dry_range": "7"}, {"top_k": 40, "seed": 1, "dry_range": 7}),
        ({"seed": str(2**63 - 1)}, {"seed": 2**63 - 1}),
        ({"temperature": "1", "min_p": "0.05"}, {"temperature": 1.0, "min_p": 0.05}),
        ({"temperature": "7e-1"}, {"temperature": 0.7}),
        ({"top_p": 0, "typical_p": 0.0}, {"top_p": 1e-9, "typical_p": 1e-9}),
        ({"repeat_penalty": 0}, {"repetition_penalty": 1.0}),
        ({"top_k": "-1"}, {"top_k": 0}),
        ({"temperature_last": "true"}, {"temperature_last": True}),
        ({"logit_bias": {"10": "5"}}, {"logit_bias": ((10, 5.0),)}),
        ({"logit_bias": {"10": 5, "50256": -100, "77": 1}}, {"logit_bias": ((10, 5.0),)}),
    ],
)
def test_numbers_and_flags_are_read_as_clients_write_them(fields, wanted):
    sampler = sampled(fields)
    assert {name: getattr(sampler, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("written", "meant"), [("false", False), ("False", False), (0, False), ("true", True), (1, True)]
)
def test_a_flag_may_be_text_or_a_number(written, meant):
    assert CompletionRequest.model_validate({"prompt": "", "stream": written}).stream is meant


def test_as_many_tokens_as_there_is_room_for_is_no_more_than_the_server_allows():
    assert sampled({"max_tokens": -1}, Limits(tokens=100)).max_new_tokens == 100


def test_a_top_p_of_0_is_the_likeliest_token(server):
    said = [
        reply(server, {"repetition_penalty": 1, "seed": 3, **more})["choices"][0]["message"]["content"]
        for more in ({"temperature": 0}, {"temperature": 2, "top_p": 0}, {"temperature": 2})
    ]
    assert said[0] == said[1] != said[2]


def test_minus_1_fills_the_context(server):
    prompt = [10] * (server.engine.context - 3)
    answer = reply(server, {"prompt": prompt, "max_tokens": -1, "logit_bias": NO_END}, COMPLETE)
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_foreign_bias_is_left_out_and_named(server, path):
    answer = reply(server, {"logit_bias": {**NO_END, "50256": -100}, "seed": 1}, path)
    (warning,) = answer["steering"]["warnings"]
    assert "vocabulary of 77" in warning
    assert "1 beyond it, as 50256" in warning
    same = reply(server, {"logit_bias": NO_END, "seed": 1}, path)
    assert same["choices"] == answer["choices"]
    assert same["steering"]["warnings"] == []
    assert "beyond" in reply(server, {"logit_bias": [[10**300, 1]]}, path)["steering"]["warnings"][0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": TOOLS}, ["tools"]),
        ({"tools": TOOLS, "tool_choice": "none"}, []),
        ({"tools": [], "functions": None}, []),
        ({"functions": [TOOLS[0]["function"]]}, ["functions"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"response_format": {"type": "text"}}, []),
        ({"grammar": "root ::= x", "json_schema": {"type": "object"}}, ["grammar", "json_schema"]),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, ["structured_outputs", "guided_choice"]),
        ({"mirostat_mode": 2, "tfs": 1, "min_tokens": 3}, ["min_tokens", "mirostat_mode"]),
        ({"modalities": ["text"], "audio": None, "best_of": 1}, []),
        ({"modalities": ["text", "audio"]}, ["modalities"]),
        ({"user": "u1", "metadata": {"chat_id": "1"}, "store": False, "cache_prompt": True}, []),
    ],
)
def test_what_is_not_honoured_is_named_in_the_reply(server, fields, named):
    warnings = reply(server, fields)["steering"]["warnings"]
    assert [w.partition(":")[0] for w in warnings] == named


def test_a_stream_and_a_completion_name_it_too(server):
    body = {"messages": HELLO, "max_tokens": 2, "stream": "true", "tools": TOOLS}
    events = server.post(CHAT, body).text.split("\n\n")
    assert "tools: " in json.loads(events[-3].removeprefix("data: "))["steering"]["warnings"][0]
    assert reply(server, {"grammar": "x"}, COMPLETE)["steering"]["warnings"][0].startswith("grammar: ")


def test_sillytaverns_neutral_settings_are_not_named(served_model):
    body = json.loads((Path(__file__).parent / "fixtures/sillytavern_text_completion.json").read_text())
    assert warnings_of(served_model, CompletionRequest.model_validate(body)) == []


def test_parts_are_joined_by_a_newline_and_may_be_texts_or_refusals(served_model):
    parts = ["hello", {"type": "input_text", "text": "friend"}, {"type": "refusal", "refusal": "lie"}, {"text": "yes"}]
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].text == "hello\nfriend\nlie\nyes"
    joined = served_model.prompt_ids([{"role": "user", "content": request.messages[0].text}])
    assert list(chat_prompt(served_model, request).ids) == joined


def test_tools_in_a_history_are_plain_text_for_a_template_without_them(server, monkeypatch):
    seen: list[Any] = []
    prompt = server.model.prompt
    monkeypatch.setattr(server.model, "prompt", lambda chat, *more: seen.append(chat) or prompt(chat, *more))
    (warning,) = reply(server, {"messages": CALLED})["steering"]["warnings"]
    assert warning.startswith("messages[1], messages[2], messages[3]: the chat template has no tools")
    assert seen == [
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": 'Called weather({"city": "bo"})\nCalled time(no JSON)'},
            {"role": "user", "content": "weather returned: yes"},
            {"role": "user", "content": "time returned: well"},
        ]
    ]


def test_a_template_with_tools_gets_them_as_it_expects_them(server, monkeypatch):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name + ' ' + (c.function.arguments.city or 'none') + ' ' }}{% endfor %}"
        "{{ m.name if m.role == 'tool' }} </s> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    seen: list[str] = []
    encode = server.model.encode
    monkeypatch.setattr(server.model, "encode", lambda text, **more: seen.append(text) or encode(text, **more))
    monkeypatch.setattr(server.model.tokenizer, "chat_template", template)
    assert reply(server, {"messages": CALLED})["steering"]["warnings"] == []
    assert "<|assistant|> weather bo time none  </s>" in seen[0]
    assert "<|tool|> yesweather </s>" in seen[0]


TOOLED = "{% for t in tools or [] %}{{ t.function.name + ' ' }}{% endfor %}" + TEMPLATE
"""A template that writes the names of the tools that may be called."""


@pytest.mark.parametrize(
    ("fields", "written", "named"),
    [
        ({"tools": TOOLS}, "weather ", ["tools"]),
        ({"tools": TOOLS, "tool_choice": "auto"}, "weather ", ["tools"]),
        ({"functions": [TOOLS[0]["function"]]}, "weather ", ["tools"]),
        ({"tools": TOOLS, "tool_choice": "required"}, "weather ", ["tools", "tool_choice"]),
        (
            {"tools": [*TOOLS, {"type": "function", "function": {"name": "time"}}],
             "tool_choice": {"type": "function", "function": {"name": "time"}}},
            "time ", ["tools", "tool_choice"],
        ),
        ({"functions": [{"name": "time"}], "function_call": {"name": "time"}}, "time ", ["tools", "tool_choice"]),
        ({"tools": TOOLS, "tool_choice": "none"}, "", []),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "weather ", ["response_format", "tools"]),
        ({"tools": []}, "", []),
    ],
)  # fmt: skip
def test_tools_reach_a_template_that_takes_them(server, monkeypatch, fields, written, named):
    seen: list[str] = []
    encode = server.model.encode
    monkeypatch.setattr(server.model, "encode", lambda text, **more: seen.append(text) or encode(text, **more))
    monkeypatch.setattr(server.model.tokenizer, "chat_template", TOOLED)
    warnings = reply(server, fields)["steering"]["warnings"]
    assert [w.partition(":")[0] for w in warnings] == named
    assert seen[0].startswith(f"{written}<s>")


def test_a_tool_that_the_request_does_not_have_is_refused(server):
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "tame"}}}
    refused = server.post(CHAT, body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice"
    assert "'tame'" in refused.json()["error"]["message"]
    for wrong in ({"tools": "weather"}, {"tools": ["weather"]}, {"functions": {"name": "x"}}):
        assert server.post(CHAT, {"messages": HELLO} | wrong).status_code == 400


def test_calls_as_openai_had_them_before_tools(server):
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "well", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"role": "function", "name": "f", "content": "yes"},
    ]
    request = ChatRequest.model_validate({"messages": chat})
    plain = [chat[0], {"role": "assistant", "content": 'well\nCalled f({"a": 1})'}]
    plain.append({"role": "user", "content": "f returned: yes"})
    assert list(chat_prompt(server.model, request).ids) == server.model.prompt_ids(plain)


@pytest.mark.parametrize("name", ["gpt-4o", "default", "other/model:latest"])
def test_any_models_name_is_the_served_one_if_the_server_is_started_so(server, open_server, name):
    assert reply(open_server, {"model": name})["model"] == name
    assert open_server.client().models.retrieve(name.replace("/", "-")).object == "model"
    refused = server.post(CHAT, {"model": name, "messages": HELLO})
    assert refused.status_code == 404
    assert "--any-model-name" in refused.json()["error"]["message"]
    long = open_server.post(CHAT, {"model": name + "m" * 1000, "messages": HELLO})
    assert (long.status_code, long.json()["error"]["param"]) == (400, "model")


def test_any_models_name_may_carry_a_profile_and_a_wrong_profile_is_still_wrong(open_server):
    assert reply(open_server, {"model": "gpt-4o@noir"})["steering"]["profile"] == "noir"
    refused = open_server.post(CHAT, {"model": "chat@gris", "messages": HELLO})
    assert refused.status_code == 404
    assert "--any-model-name" not in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["host.docker.internal", "HOST.docker.internal:8321", "workshop.local", "workshop.local.", "localhost.:1"]
)
def test_a_host_that_is_allowed_is_served(open_server, host):
    assert open_server.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["docker.internal", "host.docker.internal.evil.example", "x.workshop.local"])
def test_another_host_is_not_and_the_refusal_names_the_option(open_server, host):
    refused = open_server.get("/v1/models", headers={"Host": host})
    assert refused.status_code == 400
    assert "--allow-host" in refused.json()["error"]["message"]


def test_a_page_that_is_allowed_may_ask_first_and_read_the_answer(open_server):
    asked = httpx.options(
        open_server.url + CHAT,
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
            "Access-Control-Request-Private-Network": "true",
        },
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    assert asked.headers["access-control-allow-private-network"] == "true"
    for origin in (PAGE, "null"):
        answer = open_server.post(CHAT, {"messages": HELLO, "max_tokens": 1}, headers={"Origin": origin})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    refused = open_server.post(CHAT, {}, headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, PAGE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://lite.example.org", f"{PAGE}.evil.example", f"{PAGE}:8"]
)
def test_another_page_may_not(open_server, origin):
    asked = httpx.options(open_server.url + CHAT, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 403
    assert asked.json()["error"]["code"] == "invalid_origin"
    answer = open_server.get("/v1/models", headers={"Origin": origin})
    assert "access-control-allow-origin" not in {**asked.headers, **answer.headers}


def test_a_page_asks_without_the_key_and_can_read_that_it_is_wrong(served_model):
    with served(served_model, Options(api_key="s3cret", allow_origins=[PAGE])) as server:
        asked = httpx.options(server.url + CHAT, headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200
        refused = server.get("/v1/models", headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        other = httpx.options(server.url + CHAT, headers={"Origin": PAGE, "Access-Control-Request-Method": "DELETE"})
        assert (other.status_code, other.json()["error"]["code"]) == (403, "method_not_allowed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allow_hosts": ["http://x"]}, "--allow-host http://x: expected a host's name"),
        ({"allow_hosts": ["x:80"]}, "without port"),
        ({"allow_hosts": [""]}, "--allow-host"),
        ({"allow_hosts": ["*"]}, "--allow-host"),
        ({"allow_origins": ["example.org"]}, "scheme and host"),
        ({"allow_origins": ["https://example.org/"]}, "scheme and host alone"),
        ({"allow_origins": ["https://*.example.org"]}, "scheme and host"),
        ({"allow_origins": [PAGE, "*"], "api_key": "k"}, "named origins beside --api-key"),
    ],
)
def test_hosts_and_origins_that_could_never_match_or_match_too_much_are_refused(options, says):
    with pytest.raises(UsageError, match=says.replace("*", "[*]")):
        Options(**options)


@pytest.fixture(scope="module")
def commenting(served_model: SteeredModel) -> Iterator[Served]:
    """A server that keeps streams alive with comments."""
    with served(served_model, Options(keep_alive="comments")) as running:
        yield running


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("keep_alive", ["chunks", "comments"])
def test_a_stream_without_text_is_kept_alive_by_chunks_or_comments(
    server, commenting, served_model, monkeypatch, keep_alive, path
):
    monkeypatch.setattr("steer.serve.writing.PING", 0.02)
    hook = served_model.hf.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    body = {"prompt": "hello", "messages": HELLO, "max_tokens": 4, "logit_bias": NO_END, "seed": 1, "n": 2}
    try:
        reply = (commenting if keep_alive == "comments" else server).post(path, body | {"stream": True})
    finally:
        hook.remove()
    lines = [line for line in reply.text.splitlines() if line]
    comments = [line for line in lines if line.startswith(":")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line not in [*comments, "data: [DONE]"]]
    texts = [c["choices"][0].get("delta", c["choices"][0]) for c in chunks]
    empty = [t for t in texts if not t.get("content", t.get("text")) and "role" not in t]
    assert (len(comments) >= 3) == (keep_alive == "comments")
    assert (len(empty) >= 3 + 2) == (keep_alive == "chunks")
    assert all(c["choices"] for c in chunks)
    ends = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] not in ends
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert ends == {0: "length", 1: "length"}


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n bad: header\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http_are_refused_in_openais_format_too(server, raw):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(raw)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_http"

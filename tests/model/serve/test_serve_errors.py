"""What a server refuses, and how: errors in OpenAI's shape, keys, hosts, sizes."""

from __future__ import annotations

import json
import logging
import re
import socket

import httpx
import openai
import pytest
from openai import OpenAI
from serving import served, until

from steer.core.profile import Profile
from steer.errors import SteerError, UsageError
from steer.model.steered import load
from steer.serve.limits import Limits, is_loopback
from steer.serve.server import Options, listen, load_profiles, serve

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error(reply: httpx.Response, status: int) -> dict[str, str]:
    """What an error says, whose shape is OpenAI's."""
    assert reply.status_code == status, reply.text
    (problem,) = reply.json().values()
    assert list(reply.json()) == ["error"]
    assert list(problem) == ["message", "type", "param", "code"]
    assert "\n" not in problem["message"]
    assert "Traceback" not in reply.text
    return problem


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid list, found 'hello'"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "messages[0].role",
            "'tool' or 'function', found 'wizard'",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content",
            "valid string or .*valid list, found 3",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "expected text, found a part of type 'image_url'",
        ),
        ({"messages": HELLO * 21}, "messages", "at most 20, found 21"),
        ({"temperature": "hot"}, "temperature", "valid number, found 'hot'"),
        ({"temperature": True}, "temperature", "valid number, found True"),
        ({"temperature": -1}, "temperature", "from 1e-6 to 1e6"),
        ({"top_p": 2}, "top_p", "at most 1, found 2"),
        ({"max_tokens": 401}, "max_tokens", "at most 400, found 401"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"n": 9}, "n", "less than or equal to 8, found 9"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": 3}, "stop", "valid list, found 3"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"logit_bias": {"hello": 1}}, "logit_bias[0][0]", "valid integer, found 'hello'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias[0][0]", "at least 0, found -1"),
        ({"stream": "maybe"}, "stream", "valid boolean, found 'maybe'"),
        ({"seed": "1e400"}, "seed", "found '1e400'|found inf"),
        ({"temperature": "NaN"}, "temperature", "nan"),
        ({"top_k": "9" * 100}, "top_k", "valid integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias[0][1]", "at most 100, found 101"),
        ({"top_logprobs": 3}, "top_logprobs", "expected logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"dry_sequence_breakers": "{"}, "dry_sequence_breakers", "valid list"),
        ({"steering": {"slider": {}}}, "steering.slider", "not permitted"),
        ({"steering": {"sliders": {"moral": "much"}}}, "steering.sliders.moral", "valid number, found 'much'"),
        ({"steering": {"sliders": {"moral": 10_001}}}, "steering.sliders.moral", "less than or equal to 10000"),
        ({"messages": [{"role": "assistant", "content": "well"}]}, "messages", "the assistant's last one replies to"),
        ({"steering": {"a\ud800": 1}}, "steering", "unicode"),
        (
            {"model": None, "steering": {"profile": None, "sliders": {"\ud800": 1}}},
            "steering.sliders",
            "unicode|found moral",
        ),
        ({"steering": "noir"}, "steering", "found 'noir'"),
        ({"steering": {"sliders": {"kindness": 1}}}, "steering.sliders", "found moral, other"),
        ({"steering": {"sliders": {"moral:ablate": 2}}}, "steering.sliders", "from 0 to 1, found 2"),
        ({"model": "chat@noir", "steering": {"profile": "gris"}}, "steering.profile", "expected 'noir'"),
    ],
)
def test_a_request_that_cannot_be_is_a_400_that_names_the_field(server, body, param, says):
    base = {} if body == {} else {"messages": HELLO}
    raw = json.dumps(base | body)
    problem = error(server.post(CHAT, content=raw, headers={"Content-Type": "application/json"}), 400)
    assert problem["type"] == "invalid_request_error"
    assert problem["param"] == param
    assert re.search(says, problem["message"]), problem["message"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "required"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "expected a text, found none"),
        ({"prompt": [5000]}, "prompt", "below 77, found 5000"),
        ({"prompt": [-1]}, "prompt", "found -1"),
        ({"prompt": "hello", "suffix": "x"}, "suffix", "gaps are not filled"),
        ({"prompt": "hello", "echo": True, "max_tokens": 0}, "max_tokens", "at least 1 beside echo, found 0"),
        ({"prompt": ["hello"] * 5, "n": 4}, "n", "at most 16 texts a request, found 4 for each of 5"),
    ],
)
def test_a_completion_that_cannot_be_is_a_400_that_names_the_field(server, body, param, says):
    problem = error(server.post("/v1/completions", body), 400)
    assert (problem["param"], says in problem["message"]) == (param, True), problem


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "expected JSON"),
        (b"", "JSON object"),
        (b"3", "body"),
        (b"[]", "body"),
        (b"\xff\xfe{}", "body"),
        (b"[" * 50_000, "body"),
        (b'{"messages": NaN}', "messages"),
        (b'{"messages": [{"role":"user","content":"hello"}], "temperature": Infinity}', "temperature"),
        (b'{"messages": [{"role":"user","content":"hello"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role":"user","content":"hello"}], "seed": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_a_body_that_is_no_request_is_a_400(server, raw, says):
    problem = error(server.post(CHAT, content=raw, headers={"Content-Type": "application/json"}), 400)
    assert says in problem["message"]


def test_a_body_that_a_web_page_may_send_unasked_is_refused(server):
    """A page of another site can post text/plain here without the browser asking first."""
    body = '{"messages": [{"role": "user", "content": "hello"}]}'
    problem = error(server.post(CHAT, content=body, headers={"Content-Type": "text/plain"}), 400)
    assert "Content-Type: application/json" in problem["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hello \ud83d"}], "stop": "\ude00"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ude00"}]}], "\ud83d": 1},
    ],
)
def test_half_a_character_that_a_client_cut_breaks_nothing(server, body):
    """JSON can hold what UTF-8 cannot."""
    raw = json.dumps(body | {"max_tokens": 1})
    assert server.post(CHAT, content=raw, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_sliders_that_break_the_model_give_json_all_the_same(server, stream):
    wild = {"sliders": {"moral": 9e3, "moral:clamp": -9e3, "other:scale": 9e3}}
    body = {"messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "steering": wild, "stream": stream}
    reply = server.post(CHAT, body)
    assert reply.status_code == 200
    assert "NaN" not in reply.text
    assert "Infinity" not in reply.text


def test_what_is_not_here_is_a_404_that_names_what_is(server):
    problem = error(server.post(CHAT, {"model": "gpt-4o", "messages": HELLO}), 404)
    assert (problem["code"], problem["param"]) == ("model_not_found", "model")
    assert "chat, chat@noir" in problem["message"]
    assert error(server.post(CHAT, {"model": "chat@gris", "messages": HELLO}), 404)["code"] == "model_not_found"
    assert error(server.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"
    problem = error(server.post(CHAT, {"messages": HELLO, "steering": {"profile": "gris"}}), 404)
    assert problem["code"] == "profile_not_found"
    assert "noir" in problem["message"]
    assert error(server.get("/v2/nothing"), 404)["code"] == "not_found"
    assert error(server.get(CHAT), 405)["code"] == "method_not_allowed"


def test_a_prompt_longer_than_the_context_is_a_400_with_openais_code(server):
    context = server.engine.context
    problem = error(server.post("/v1/completions", {"prompt": [10] * context}), 400)
    assert (problem["code"], problem["param"]) == ("context_length_exceeded", "prompt")
    assert f"at most {context - 1} tokens" in problem["message"]
    assert server.post("/v1/completions", {"prompt": [10] * (context - 1)}).status_code == 200
    long = [{"role": "user", "content": "hello " * context}]
    assert error(server.post(CHAT, {"messages": long}), 400)["code"] == "context_length_exceeded"


def test_openais_client_raises_its_own_errors(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.chat.completions.create(model="chat", messages=HELLO, temperature=-1)
    assert (raised.value.param, raised.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True)


def test_a_body_over_the_limit_is_a_413_whatever_its_headers_say(server):
    body = b'{"prompt": "' + b"a" * 100_000 + b'"}'
    kind = {"Content-Type": "application/json"}
    problem = error(server.post("/v1/completions", content=body, headers=kind), 413)
    assert "100,000 bytes" in problem["message"]
    # In chunks, with no Content-Length.
    streamed = server.post("/v1/completions", content=iter([body[:60_000], body[60_000:]]), headers=kind)
    error(streamed, 413)
    small = iter([b'{"prompt": "hello",', b'"max_tokens": 2}'])
    assert server.post("/v1/completions", content=small, headers=kind).status_code == 200


def test_a_template_that_refuses_a_chat_is_a_400_and_none_at_all_too(served_model, server):
    tokenizer = served_model.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
        problem = error(server.post(CHAT, {"messages": HELLO}), 400)
        assert "roles must take turns" in problem["message"]
        tokenizer.chat_template = None
        assert "chat template" in error(server.post(CHAT, {"messages": HELLO}), 400)["message"]
    finally:
        tokenizer.chat_template = before


def test_without_the_right_key_there_is_only_health(served_model):
    with served(served_model, Options(host="0.0.0.0", api_key="s3cret")) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
        ):
            for path in ("/v1/models", "/v1/steering", "/metrics", "/openapi.json", "/nothing"):
                assert error(server.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        assert server.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert server.get("/health").json() == {"status": "ok"}
        assert len(list(server.client("s3cret").models.list())) == 1
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").chat.completions.create(model="chat", messages=HELLO)
        error(server.get("/v1/models", headers={"Authorization": "Bearer s3cret\u00e9".encode()}), 401)


def test_a_key_is_asked_for_before_the_body_is_read(served_model):
    with served(served_model, Options(api_key="s3cret")) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 5000\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8321", ""])
def test_on_loopback_a_name_that_somebody_made_point_here_is_refused(server, host):
    assert server.get("/v1/models", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8321", "127.0.0.1:1", "[::1]:8321"])
def test_on_loopback_its_own_names_are_served(server, host):
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_get_no_leave_to_read(server):
    asked = httpx.options(
        f"{server.url}/v1/steering",
        headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"},
    )
    assert "--allow-origin" in error(asked, 403)["message"]
    reply = server.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not any(h.startswith("access-control-allow") for h in [*asked.headers, *reply.headers])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::"])
def test_another_host_wants_a_key(host):
    assert not is_loopback(host)
    with pytest.raises(UsageError, match=r"--api-key"):
        Options(host=host)
    Options(host=host, api_key="k")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert is_loopback(host)
    Options(host=host)


@pytest.mark.parametrize("key", ["", " k", "k\n", "ключ"])
def test_a_key_that_no_header_can_hold_is_refused(key):
    with pytest.raises(UsageError, match="printable ASCII"):
        Options(api_key=key)


@pytest.mark.parametrize("name", ["body", "messages", "choices", "tokens"])
def test_limits_are_whole_numbers_above_0(name):
    with pytest.raises(UsageError, match=f"max {name}"):
        Limits(**{name: 0})


def test_a_port_that_is_taken_is_one_line(served_model):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SteerError, match=rf"127.0.0.1:{port}: .*--port"):
            serve(served_model, port=port)
    with pytest.raises(SteerError, match="--port"):
        listen("127.0.0.1", 70_000)


def test_profiles_come_from_files_and_folders(tmp_path):
    for name in ("noir", "gris"):
        Profile.parse({"name": name}, name).save(tmp_path / "all" / f"{name}.yaml")
    (tmp_path / "all" / "notes.txt").write_text("x")
    (tmp_path / "none").mkdir()
    assert [p.name for p in load_profiles([tmp_path / "all", tmp_path / "all" / "noir.yaml"])] == [
        "gris",
        "noir",
        "noir",
    ]
    for place in ("none", "absent.yaml"):
        with pytest.raises(SteerError, match=place):
            load_profiles([tmp_path / place])


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ([{"name": "a"}, {"name": "a"}], "expected one of that name"),
        ([{"name": "a", "sliders": [{"slider": "kindness", "amount": 1}]}], "profile 'a'.*kindness"),
    ],
)
def test_profiles_that_cannot_be_served_stop_the_start(served_model, profiles, says):
    with (
        pytest.raises(SteerError, match=says),
        served(served_model, Options(profiles=[Profile.parse(p, "p") for p in profiles])),
    ):
        pass


def test_an_unexpected_error_is_a_500_that_reveals_nothing(served_model, server, monkeypatch, caplog):
    def broken(*_: object) -> list[int]:
        raise ZeroDivisionError("secret/path")

    monkeypatch.setattr(served_model, "prompt", broken)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    problem = error(server.post(CHAT, {"messages": HELLO}), 500)
    assert "secret" not in str(problem)
    assert (problem["type"], problem["code"]) == ("server_error", "internal_error")
    assert until(lambda: "secret/path" in caplog.text)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_a_500_and_serves_the_next(served_model, server, monkeypatch, stream):
    forward = type(served_model.hf).forward
    left = iter([True, True, False])

    def failing(self, *args, **kwargs):
        if next(left, True):
            return forward(self, *args, **kwargs)
        raise RuntimeError("no more memory at secret/path")

    monkeypatch.setattr(type(served_model.hf), "forward", failing)
    body = {"messages": HELLO, "max_tokens": 8, "stream": stream, "logit_bias": {"2": -100}}
    if not stream:
        problem = error(server.post(CHAT, body), 500)
        assert problem["type"] == "server_error"
    else:
        with pytest.raises(openai.APIError, match="could not be written"):
            list(server.client().chat.completions.create(model="chat", **body))
    monkeypatch.undo()
    assert server.post(CHAT, body).status_code == 200


def test_a_client_of_a_closed_server_hears_so(chat_checkpoint):
    with served(load(chat_checkpoint)) as server:
        server.engine.close()
        assert error(server.post(CHAT, {"messages": HELLO}), 503)["type"] == "server_error"
    with pytest.raises(openai.APIConnectionError):
        OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0).models.list()

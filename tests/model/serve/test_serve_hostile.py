"""Requests that are made to hurt: refused in one short line, before work is done, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from serving import Served, served, until

from steer.core.sampler import Sampler
from steer.model.kv_cache import GrowingCache
from steer.model.sampling import breaker_ids
from steer.model.steered import SteeredModel
from steer.serve import scoring
from steer.serve.limits import Limits
from steer.serve.openai_json import CompletionFormat
from steer.serve.replies import PLANNED
from steer.serve.server import Options

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
HUGE = 10**400
HALF = "\ud800"


@pytest.fixture(scope="module")
def server(served_model: SteeredModel) -> Iterator[Served]:
    with served(served_model, Options(limits=Limits(tokens=400))) as running:
        yield running


def refused(reply: httpx.Response) -> dict[str, str]:
    assert reply.status_code in (400, 404), reply.text[:500]
    problem = reply.json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert len(reply.content) < 1500
    assert problem["message"].isprintable()
    return problem


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        *((CHAT, {name: HUGE}, name) for name in ("seed", "top_k", "dry_allowed_length", "dry_range", "temperature")),
        (CHAT, {"max_tokens": HUGE}, "max_tokens"),
        (CHAT, {"n": HUGE}, "n"),
        (CHAT, {"logit_bias": {"9" * 4000: 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [0] * 400_000}]}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x " * 10**6}]}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "function_call": {"arguments": "x " * 10**6}}]}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "function_call": {"name": "[" * 10**6}}]}, "messages"),
        (CHAT, {"stream": ["[" * 10**5] * 10}, "stream"),
        (CHAT, {"stream": "t" * 10**5}, "stream"),
        (CHAT, {"max_tokens": "[" * 40}, "max_tokens"),
        (CHAT, {"max_tokens": "9" * 4000}, "max_tokens"),
        (CHAT, {"logit_bias": [["a", 1]] * 100_000}, "logit_bias"),
        (CHAT, {"dry_multiplier": 1, "dry_sequence_breakers": ["x" * 65]}, "dry_sequence_breakers"),
        (CHAT, {"dry_multiplier": 1, "dry_sequence_breakers": [str(i) for i in range(65)]}, "dry_sequence_breakers"),
        (CHAT, {"dry_multiplier": 1, "dry_sequence_breakers": "x" * 100_000}, "dry_sequence_breakers"),
        (CHAT, {"dry_sequence_breakers": [0] * 400_000}, "dry_sequence_breakers"),
        (CHAT, {"steering": {"sliders": {f"L1/{'0' * i}7": 1.0 for i in range(65)}}}, "at most 64 sliders, found 65"),
        (CHAT, {"steering": {"sliders": {"L1/" + "9" * 5000: 1.0}}}, "steering.sliders"),
        (CHAT, {"steering": {"sliders": {"L1/" + "9" * 150: 1.0}}}, "steering.sliders"),
        (CHAT, {"steering": {"sliders": {"x" * 100_000: 1.0}}}, "steering.sliders"),
        (CHAT, {"steering": {"sliders": {"\u202ex\x1b[2J": 1.0}}}, "steering.sliders"),
        (CHAT, {"steering": {"profile": "p" * 100_000}}, "profile"),
        (CHAT, {"steering": {"k" * 100_000: 1}}, "steering"),
        (CHAT, {"model": "m" * 100_000}, "model"),
        (CHAT, {"model": "chat@" + "m" * 100_000}, "model"),
        (CHAT, {"messages": [0] * 400_000}, "messages"),
        (CHAT, {"messages": [{"role": "user"}] * 100_000}, "messages"),
        (CHAT, {"messages": [{"role": "w" * 100_000, "content": ""}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "t" * 10**5}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [0] * 400_000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 10**6}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": ["a"] * 1000}] * 700}, "10000 parts and tool calls in all"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}] * 1000}] * 200}, "tool calls in"),
        (CHAT, {"stop": [0] * 400_000}, "stop"),
        (CHAT, {"stop": ["a" * 1001]}, "stop"),
        (COMPLETE, {"prompt": [1, "a"] * 300_000}, "prompt"),
        (COMPLETE, {"prompt": ["a"] * 100_000}, "prompt"),
        (COMPLETE, {"prompt": [["a"]] * 100_000}, "prompt"),
        (COMPLETE, {"prompt": [[1]] * 17}, "n"),
        (COMPLETE, {"prompt": ["a"] * 17}, "n"),
        (COMPLETE, {"prompt": [HUGE]}, "prompt"),
        (COMPLETE, {"prompt": [1] * 10**6}, "prompt"),
        (COMPLETE, {"prompt": "x" * 10**6}, "prompt"),
        (COMPLETE, {"prompt": ["x" * 10**6] * 3}, "prompt"),
        (CHAT, {"temperature": 1e300, "logit_bias": {"5": -100}}, "temperature"),
        (CHAT, {"repetition_penalty": 1e300}, "repetition_penalty"),
        (CHAT, {"logit_bias": {str(t): -100 for t in range(77)}}, "every one banned"),
        (CHAT, {"logit_bias": {str(t): -100 for t in range(77)}, "temperature": 0}, "every one banned"),
        (CHAT, {"logit_bias": {str(t): -100 for t in range(77)}, "top_k": 3}, "every one banned"),
    ],
)
def test_a_hostile_body_is_a_400_of_one_short_line(server, path, body, says):
    base = {"messages": HELLO} if path == CHAT else {}
    raw = json.dumps(base | body)
    problem = refused(server.post(path, content=raw, headers={"Content-Type": "application/json"}))
    assert says in problem["message"] or says == problem["param"], problem
    assert server.get("/health").json() == {"status": "ok"}


def test_moving_the_live_sliders_has_the_same_limits(server):
    for sliders in ({f"L1/{i}": 1.0 for i in range(65)}, {"x" * 10**5: 1.0}, {"x": HUGE}):
        raw = json.dumps({"sliders": sliders})
        refused(httpx.put(f"{server.url}/v1/steering", content=raw, headers={"Content-Type": "application/json"}))


def test_a_request_that_takes_long_to_tokenise_keeps_no_other_waiting(server, monkeypatch):
    encode, begun, go_on = server.model.encode, threading.Event(), threading.Event()

    def slow(text: str, **more: bool) -> list[int]:
        if text == "slow":
            begun.set()
            assert go_on.wait(60)
        return encode(text, **more)

    monkeypatch.setattr(server.model, "encode", slow)
    replies = []
    client = threading.Thread(target=lambda: replies.append(server.post(COMPLETE, {"prompt": "slow", "max_tokens": 2})))
    client.start()
    try:
        assert begun.wait(60)
        assert server.post(COMPLETE, {"prompt": "hello", "max_tokens": 2}).status_code == 200
        assert not replies
    finally:
        go_on.set()
        client.join()
    assert replies[0].status_code == 200


def test_texts_are_written_while_a_long_prompt_is_scored(server, monkeypatch):
    monkeypatch.setattr(scoring, "AT_ONCE", 8)
    passes, begun = [], threading.Event()

    def watch(module: object, args: object, kwargs: dict[str, object]) -> None:
        passes.append("scoring" if isinstance(kwargs.get("past_key_values"), GrowingCache) else "writing")
        if passes[-1] == "scoring" and not begun.is_set():
            begun.set()
            until(lambda: server.engine.running)

    handle = server.model.hf.model.register_forward_pre_hook(watch, with_kwargs=True)
    replies = []
    scored = {"prompt": "hello " * 200, "max_tokens": 1, "echo": True, "logprobs": 0}
    client = threading.Thread(target=lambda: replies.append(server.post(COMPLETE, scored)))
    client.start()
    try:
        assert begun.wait(60)
        assert server.post(COMPLETE, {"prompt": "hello", "max_tokens": 2}).status_code == 200
    finally:
        client.join()
        handle.remove()
    assert replies[0].status_code == 200
    first, last = passes.index("scoring"), len(passes) - passes[::-1].index("scoring")
    assert passes[first:last].count("scoring") == 25
    assert "writing" in passes[first:last]


@pytest.mark.parametrize(("stream", "method"), [(False, "whole"), (True, "opening")])
def test_the_log_probabilities_of_a_prompt_are_written_beside_the_loop(server, monkeypatch, stream, method):
    write, begun, go_on = getattr(CompletionFormat, method), threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        begun.set()
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(CompletionFormat, method, slow)
    body = {"prompt": "hello friend", "max_tokens": 1, "echo": True, "logprobs": 5, "stream": stream}
    replies = []
    client = threading.Thread(target=lambda: replies.append(server.post(COMPLETE, body)))
    client.start()
    try:
        assert begun.wait(60)
        assert server.get("/health").json() == {"status": "ok"}
    finally:
        go_on.set()
        client.join()
    assert replies[0].status_code == 200


def test_prompts_behind_one_that_is_too_long_are_not_tokenised(server, monkeypatch):
    encode, encoded = server.model.encode, []

    def counted(text: str, **more: bool) -> list[int]:
        encoded.append(text)
        return encode(text, **more)

    monkeypatch.setattr(server.model, "encode", counted)
    problem = refused(server.post(COMPLETE, {"prompt": ["hello", *["x " * server.engine.context] * 5]}))
    assert problem["code"] == "context_length_exceeded"
    assert len(encoded) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": HALF}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a", HALF: 1}, {"role": "assistant", "content": HALF}]}),
        (CHAT, {"stop": HALF}),
        (CHAT, {"stop": [HALF]}),
        (CHAT, {HALF: 1, "stream_options": {HALF: 1}}),
        (CHAT, {"dry_multiplier": 1, "dry_sequence_breakers": [HALF]}),
        (CHAT, {"dry_multiplier": 1, "dry_sequence_breakers": json.dumps([HALF])}),
        (COMPLETE, {"prompt": HALF, "echo": True}),
        (COMPLETE, {"prompt": [HALF]}),
    ],
)
def test_half_a_character_in_a_text_is_read_as_none(server, path, body, stream):
    raw = json.dumps({"max_tokens": 2, "stream": stream} | ({"messages": HELLO} if path == CHAT else {}) | body)
    reply = server.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200
    assert '"error"' not in reply.text


@pytest.mark.parametrize(
    "body",
    [
        {"model": HALF},
        {"model": f"chat@{HALF}"},
        {"messages": [{"role": HALF, "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": HALF, "text": "a"}]}]},
        {"steering": {"profile": HALF}},
        {"steering": {"sliders": {HALF: 1}}},
        {"steering": {"sliders": {f"moral:{HALF}": 1}}},
        {"steering": {HALF: 1}},
        {"logit_bias": {HALF: 1}},
        {"seed": HALF},
        {"dry_multiplier": 1, "dry_sequence_breakers": HALF},
    ],
)
def test_half_a_character_in_a_name_is_a_400_or_404(server, body):
    raw = json.dumps({"messages": HELLO, "stream": True} | body)
    refused(server.post(CHAT, content=raw, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("host", ["evil.example", "h" * 8000, "[::2]:80", ""])
def test_a_foreign_host_is_refused_in_openais_shape(server, host):
    problem = refused(server.get("/v1/models", headers={"Host": host}))
    assert problem["code"] == "invalid_host"


def test_a_token_that_is_banned_is_never_drawn_beside_a_text_that_has_none_left(server):
    replies = {}

    def ask(name: str, bans: range) -> None:
        body = {"messages": HELLO, "max_tokens": 30, "logit_bias": {str(t): -100 for t in bans}, "logprobs": True}
        replies[name] = server.post(CHAT, body)

    threads = [threading.Thread(target=ask, args=a) for a in (("all", range(77)), ("most", range(70)))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert replies["all"].status_code == 400
    tokens = replies["most"].json()["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 30


def test_an_edit_that_cannot_be_worked_out_ends_its_own_request_alone(served_model, make_direction, chat_checkpoint):
    with served(served_model, max_running=4) as server:
        alone = server.post(CHAT, {"messages": HELLO, "max_tokens": 60, "temperature": 0}).json()["choices"]
        bad = replace(make_direction("bad"))
        object.__setattr__(bad, "site", 1.5)  # as a file of a stranger had it
        lines: list[str] = []

        def stream() -> None:
            body = {"messages": HELLO, "max_tokens": 60, "temperature": 0, "stream": True}
            with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as reply:
                lines.extend(reply.iter_lines())

        from steer.core.edit import Edit
        from steer.serve.engine import Job

        other = threading.Thread(target=stream)
        other.start()
        problem: list[object] = []
        for _ in range(5):
            job = Job((1, 5, 9), Sampler(max_new_tokens=5), lambda: Edit(add=((bad, 1.0),)))
            server.engine.submit(job, problem.append)
        assert until(lambda: len(problem) == 5)
        assert all("could not be written" in str(e) or "site" in str(e) for e in problem)
        other.join(60)
        text = "".join(
            json.loads(x[6:])["choices"][0]["delta"].get("content", "")
            for x in lines
            if x.startswith("data: {") and json.loads(x[6:])["choices"]
        )
        assert text == alone[0]["message"]["content"]
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 60, "temperature": 0}).json()["choices"] == alone


def test_health_is_503_once_the_engine_takes_nothing(served_model):
    with served(served_model) as server:
        assert server.get("/health").status_code == 200
        server.engine.close()
        reply = server.get("/health")
        assert reply.status_code == 503
        assert "closed" in reply.json()["error"]["message"]


def test_a_request_whose_client_hung_up_before_its_turn_is_not_planned(served_model, monkeypatch):
    planned, go = [], threading.Event()
    real = served_model.prompt

    def slow(messages, *more):
        planned.append(messages[0]["content"])
        assert go.wait(30)
        return real(messages, *more)

    monkeypatch.setattr(served_model, "prompt", slow)
    with served(served_model) as server:
        body = {"messages": HELLO, "max_tokens": 2}
        first = [threading.Thread(target=server.post, args=(CHAT, body)) for _ in range(PLANNED)]
        for client in first:
            client.start()
        assert until(lambda: len(planned) == PLANNED)
        host, port = server.url.removeprefix("http://").split(":")
        raw = json.dumps({"messages": [{"role": "user", "content": "gone"}]}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        )
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=20) as gone:
                gone.sendall(head.encode() + b"\r\n\r\n" + raw)
                gone.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    gone.recv(1)
        assert until(lambda: server.metric("steer_hung_up_total") == 3)
        go.set()
        for client in first:
            client.join(30)
        assert server.post(CHAT, body).status_code == 200
    assert planned == ["hello"] * (PLANNED + 1)


def test_few_sets_of_breakers_are_kept(served_model):
    for i in range(40):
        breaker_ids(served_model.tokenizer, (f"b{i}",))
    assert breaker_ids.cache_info().currsize <= 16


def test_names_that_were_asked_for_once_do_not_stay(server, served_model, make_direction):
    before = set(served_model.sliders.known())
    for op in ("add", "ablate", "clamp", "cap", "scale"):
        body = {"messages": HELLO, "max_tokens": 1, "steering": {"sliders": {f"moral:{op}": 1.0}}}
        assert server.post(CHAT, body).status_code == 200
    assert set(served_model.sliders.known()) == before


def test_a_profile_of_a_folder_that_does_not_fit_is_passed_over(served_model, tmp_path):
    from steer.errors import SkippedWarning
    from steer.serve.server import load_profiles

    (tmp_path / "good.yaml").write_text("name: good\nsliders:\n- {slider: moral, amount: 1.0}\n")
    (tmp_path / "torn.yaml").write_text("name: [")
    (tmp_path / "other.yaml").write_text("name: other\nsliders:\n- {slider: nobody, amount: 1.0}\n")
    with pytest.warns(SkippedWarning, match=r"torn\.yaml") as caught:
        profiles = load_profiles([tmp_path])
    assert len(caught) == 1
    assert [p.name for p in profiles] == ["good", "other"]
    with warnings.catch_warnings(record=True) as problem, served(served_model, Options(profiles=profiles)) as server:
        names = [m["id"] for m in server.get("/v1/models").json()["data"]]
    assert names == ["chat", "chat@good"]
    (line,) = [str(w.message) for w in problem if w.category is SkippedWarning]
    assert "other.yaml" in line
    assert "'nobody'" in line

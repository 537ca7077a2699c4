"""Clients that leave, queues that are full, servers that stop."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serving import NO_END, Served, served, until

from steer.serve.server import Options

HELLO = [{"role": "user", "content": "hello"}]
LONG = {"messages": HELLO, "max_tokens": 380, "logit_bias": NO_END, "temperature": 0}


@pytest.fixture(scope="module")
def slow(served_model) -> Iterator[Served]:
    """A server with few places, whose model takes a while for each token."""
    hook = served_model.hf.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    with served(served_model, max_running=2, max_waiting=1) as server:
        yield server
    hook.remove()


def request_bytes(body: dict, path: str = "/v1/chat/completions") -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    return head.encode() + b"\r\n\r\n" + raw


def connect(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_generation(slow, how, stream):
    hung_up, written = slow.metric("steer_hung_up_total"), slow.metric("steer_completion_tokens_total")
    raw = connect(slow)
    raw.sendall(request_bytes(LONG | {"stream": stream}))
    if stream:
        got = b""
        while got.count(b"data: ") < 4:
            got += raw.recv(4096)
    assert until(lambda: slow.metric("steer_completion_tokens_total") >= written + 3)
    assert slow.engine.running == 1
    if how == "reset":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    left = time.monotonic()
    assert until(lambda: slow.engine.running == 0, 5)
    # A few steps of 0.02 s, and not the eight seconds of a whole reply.
    assert time.monotonic() - left < 1.0
    assert until(lambda: slow.metric("steer_hung_up_total") == hung_up + 1)
    assert slow.metric("steer_completion_tokens_total") < written + 60


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(slow):
    with connect(slow) as one, connect(slow) as two:
        for raw in (one, two):
            raw.sendall(request_bytes(LONG | {"stream": True}))
        assert until(lambda: slow.engine.running == 2)
        three = connect(slow)
        three.sendall(request_bytes(LONG))
        assert until(lambda: slow.engine.waiting == 1)
        three.close()
        assert until(lambda: slow.engine.waiting == 0, 5)
        assert slow.engine.running == 2
    assert until(lambda: slow.engine.running == 0, 5)


def test_choices_of_a_client_that_hangs_up_all_stop(slow):
    with connect(slow) as raw:
        raw.sendall(request_bytes(LONG | {"n": 3, "stream": True}))
        # A request with several texts leaves as many places as it takes.
        assert until(lambda: (slow.engine.running, slow.engine.waiting) == (1, 2))
    assert until(lambda: (slow.engine.running, slow.engine.waiting) == (0, 0), 5)


def test_a_full_queue_is_a_429_that_says_when_to_come_again(slow):
    with connect(slow) as one, connect(slow) as other:
        one.sendall(request_bytes(LONG | {"stream": True}))
        other.sendall(request_bytes(LONG | {"stream": True}))
        assert until(lambda: slow.engine.running == 2)
        # One could wait, both cannot, so neither is taken.
        reply = slow.post("/v1/chat/completions", LONG | {"n": 2})
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        problem = reply.json()["error"]
        assert (problem["type"], problem["code"]) == ("rate_limit_error", "queue_full")
        assert until(lambda: slow.engine.waiting == 0, 5)
        with connect(slow) as two:
            two.sendall(request_bytes(LONG | {"stream": True}))
            assert until(lambda: slow.engine.waiting == 1)
            with pytest.raises(openai.RateLimitError, match="queue full"):
                slow.client().chat.completions.create(model="chat", messages=HELLO, stream=True)
            assert slow.get("/health").status_code == 200
    assert until(lambda: (slow.engine.running, slow.engine.waiting) == (0, 0), 5)
    assert slow.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}).status_code == 200


def test_a_stop_string_stops_the_generation(slow):
    written = slow.metric("steer_completion_tokens_total")
    reply = slow.post("/v1/chat/completions", LONG | {"stop": " "}).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert slow.engine.running == 0
    assert slow.metric("steer_completion_tokens_total") == written + reply["usage"]["completion_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("keep_alive", ["chunks", "comments"])
def test_openais_client_reads_on_through_a_silence_that_is_filled(served_model, monkeypatch, keep_alive):
    monkeypatch.setattr("steer.serve.writing.PING", 0.05)
    hook = served_model.hf.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    try:
        with served(served_model, Options(keep_alive=keep_alive)) as server:
            # Some of the tokens are special, and have no text.
            body = {"messages": HELLO, "max_tokens": 6, "stream": True, "logit_bias": NO_END}
            assert "".join(
                c.choices[0].delta.content or "" for c in server.client().chat.completions.create(model="chat", **body)
            )
    finally:
        hook.remove()


def test_a_server_that_stops_reports_it_to_its_clients(served_model):
    hook = served_model.hf.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    heard: list[str] = []

    def listen(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}, timeout=60) as reply:
            heard.extend(reply.iter_lines())

    try:
        with served(served_model) as server:
            client = threading.Thread(target=listen, args=[server.url])
            client.start()
            assert until(lambda: len(heard) > 6)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 3
        client.join(10)
        assert "the server is stopping" in "".join(heard[-4:])
        assert heard[-2:] == ["data: [DONE]", ""]
    finally:
        hook.remove()


SCRIPT = """
import sys
from steer.model.steered import load
from steer.serve.server import serve
serve(load(sys.argv[1]), port=0, ready=lambda url: print(url, flush=True))
print("closed", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_quietly_in_the_midst_of_a_stream(chat_checkpoint: Path, how):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(chat_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 120)[0], "it never said where it is"
        url = process.stdout.readline().strip()
        body = {"messages": HELLO, "max_tokens": 100, "logit_bias": NO_END, "stream": True, "n": 8}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as reply:
            next(reply.iter_lines())
            process.send_signal(how)
            out, err = process.communicate(timeout=30)
        assert process.returncode == (0 if how == signal.SIGINT else -signal.SIGTERM)
        assert "Traceback" not in err
        assert out == ("closed\n" if how == signal.SIGINT else "")
    finally:
        process.kill()

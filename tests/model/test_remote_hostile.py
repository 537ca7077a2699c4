"""A server behind `steer chat --server` that is another, or hostile: one line, no traceback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from steer.chat.remote import RemoteBackend, receipt_of
from steer.chat.session import Session
from steer.core.sampler import CHAT
from steer.errors import SteerError, UsageError

ROW = {"name": "moral", "operation": "add", "amount": 0.0, "unit_share": 0.1, "site": 1, "range": [-1, 1]}


@contextmanager
def serving(steering: Any = None, models: Any = None, chunks: list[Any] | None = None) -> Iterator[str]:
    """Answers with just these things."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": "m", "object": "model"}]} if models is None else models
            self._send(listed if self.path.endswith("/models") else steering, "application/json")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            lines = [f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks or []]
            self._send("".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

        def _send(self, what: Any, kind: str) -> None:
            data = (what if isinstance(what, str) else json.dumps(what)).encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        None, [], 3, "text", {}, {"sliders": None}, {"sliders": 3}, {"sliders": {}},
        {"sliders": [3]}, {"sliders": [None]},
        {"sliders": [{"operation": "add"}]},
        *({"sliders": [ROW | change]} for change in (
            {"name": 3}, {"name": ""}, {"name": "x" * 10**5}, {"name": None}, {"range": ["a", "b"]}, {"range": [1]},
            {"range": 3}, {"unit_share": "much"}, {"amount": []}, {"amount": "1e999"}, {"site": "x"}, {"site": -1},
            {"site": 10**400}, {"operation": 3}, {"operation": None}, {"share": {}},
        )),
    ],
)  # fmt: skip
def test_what_is_no_steer_server_is_one_line(answer):
    with (
        serving(answer) as url,
        pytest.raises(SteerError, match=r"expected (a steer|an OpenAI-compatible) server") as caught,
    ):
        RemoteBackend(url)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "models", [3, [], {}, {"data": None}, {"data": [3]}, {"data": [{}]}, {"data": [{"id": 3}]}, "x"]
)
def test_models_that_are_none_are_one_line(models):
    with serving({"sliders": []}, models) as url, pytest.raises(SteerError) as caught:
        RemoteBackend(url)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk",
    [
        3, "x", "{", [], {}, {"choices": 3}, {"choices": [3]}, {"choices": [{}]}, {"choices": [{"delta": None}]},
        {"choices": [{"delta": {"content": 3}}]}, {"choices": [{"delta": {"content": "a"}, "finish_reason": 3}]},
        {"choices": [{"delta": {"content": "a"}}], "steering": 3},
        {"choices": [{"delta": {"content": "a"}}], "steering": {"receipt": {"tokens": "x", "sliders": 3}}},
        {"error": "x"}, {"error": {"message": ["x"]}}, "[" * 5000,
    ],
)  # fmt: skip
def test_a_reply_of_another_kind_is_one_line_or_its_text(chunk):
    with serving({"sliders": [ROW]}, chunks=[chunk]) as url:
        session, said = Session(RemoteBackend(url)), []
        message = ""
        try:
            said.extend(session.reply("hello"))
        except SteerError as e:
            message = str(e)
    assert "".join(said) in ("", "a")
    assert "\n" not in message


def test_text_that_is_no_unicode_is_one_line_and_no_fault_of_the_servers():
    with serving({"sliders": [ROW]}, chunks=[]) as url:
        session = Session(RemoteBackend(url), system="Be \udcff.")
        with pytest.raises(UsageError, match=r"expected text that is Unicode, .* found '\\udcff'; convert it"):
            list(session.reply("hello"))
        assert session.messages == []
        with pytest.raises(UsageError, match="expected a key in ASCII, found 'é'"):
            RemoteBackend(url, api_key="clé")
        with pytest.raises(UsageError, match="expected text that is Unicode"):
            list(RemoteBackend(url, name="\ud800").write([{"role": "user", "content": "a"}], CHAT, {}))


@pytest.mark.parametrize(
    "receipt",
    [
        3, [], "x", {"tokens": "x"}, {"sliders": 3}, {"sliders": [3]}, {"sliders": [{}]}, {"tokens": 10**400},
        {"sliders": [{"name": "a", "operation": "explode", "amount": 1, "tokens": 1}]},
        {"sliders": [{"name": "a", "operation": "add", "amount": "x", "tokens": 1}]},
        {"sliders": [{"name": "a", "operation": "add", "amount": 1e999, "tokens": 1}]},
    ],
)  # fmt: skip
def test_a_receipt_of_another_kind_counts_the_pieces_that_came(receipt):
    assert receipt_of({"receipt": receipt}, 7).sliders == ()
    row = {"name": "a", "operation": "add", "amount": 1, "tokens": 2, "mean_share": None}
    assert receipt_of({"receipt": {"tokens": 3, "sliders": [row]}}, 7).sliders[0].name == "a"

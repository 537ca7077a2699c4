"""Who asks: chats with different sliders, one who hangs up, one who sends rubbish."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

import httpx
from openai import OpenAI

from steer.core.profile import Profile

PROFILES = {
    p["name"]: Profile.parse(p, p["name"])
    for p in (
        {"name": "later", "sliders": [{"slider": "moralizing", "amount": -2, "when": {"part": "reply"}}]},
        {"name": "rising", "sliders": [{"slider": "compliance", "amount": -2.5, "when": {"after": 2, "ramp": 8}}]},
    )
}
SETTINGS: list[str | dict[str, float]] = [
    {},
    {"moralizing": -2.0},
    {"compliance": -1.5},
    {"moralizing": 2.0},
    "later",
    {"moralizing-latent": -2.0},
    {"moralizing:ablate": 1.0},
    {"compliance:cap": -1.0},
    {"moralizing:clamp": -0.5},
    {"compliance": 1.5},
    "rising",
    {"moralizing": -1.0, "compliance": 1.0},
    {"L14/3494:clamp": 2.0},
    {"moralizing": 1.0},
    {"moralizing:clamp": 1.5},
    {"moralizing": -1.0},
]
"""A profile of the server's or amounts, one for each client."""
SAMPLERS: list[dict[str, float]] = [
    {"temperature": 0.0, "min_p": 0.0, "repetition_penalty": 1.0},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.02},
]
"""Greedy, and what the chat uses."""
LARGEST = 100_000
"""Bytes of a request that the server takes."""
LIVE = (2.5, -2.5)
"""Where the live slider `moralizing` goes to and fro, which nobody follows but those who hang up."""


@dataclass(frozen=True)
class Ask:
    """One request of a client."""

    client: int
    message: str
    seed: int
    tokens: int
    """At most."""
    sampler: int
    stream: bool
    banned: tuple[int, ...]

    @property
    def chat(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.message}]

    def body(self, model: str) -> dict[str, Any]:
        """What OpenAI's client is called with."""
        setting, extra = SETTINGS[self.client], dict(SAMPLERS[self.sampler])
        steering: dict[str, Any] = {"sliders": setting}
        if isinstance(setting, str):
            # Half by the name of the model, half by the extension.
            model, steering = (f"{model}@{setting}", {}) if self.stream else (model, {"profile": setting})
        return {
            "model": model,
            "messages": self.chat,
            "max_tokens": self.tokens,
            "temperature": extra.pop("temperature"),
            "seed": self.seed,
            "logprobs": True,
            "extra_body": extra | ({"steering": steering} if steering else {}),
            **({"logit_bias": {str(token): -100 for token in self.banned}} if self.banned else {}),
        }


@dataclass
class Reply:
    """What came of a request."""

    ask: Ask
    text: str = ""
    tokens: list[bytes] = field(default_factory=list)
    """Their spelling: OpenAI's API has no ids."""
    logprobs: list[float] = field(default_factory=list)
    ended: str | None = None
    usage: tuple[int, int] = (0, 0)
    """Tokens of the prompt and of the reply."""
    sliders: dict[str, float] | None = None
    """By which it went, as it says itself."""
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Seconds to the first token, where it was streamed."""


def asks(client: int, messages: Sequence[str], ends: Sequence[int]) -> Iterator[Ask]:
    """The requests of one client, the same in every run."""
    chance = random.Random(client)
    for message in cycle(messages):
        yield Ask(
            client, message, chance.randrange(2**31), chance.randint(20, 80), chance.randrange(len(SAMPLERS)),
            chance.random() < 0.5, tuple(ends) if chance.random() < 0.5 else (),
        )  # fmt: skip


def openai_at(url: str) -> OpenAI:
    """OpenAI's own client, which asks once."""
    return OpenAI(base_url=url, api_key="any", max_retries=0, timeout=300)


def send(api: OpenAI, model: str, ask: Ask) -> Reply:
    """The reply to one request. Errors: whatever OpenAI's client raises."""
    out, body = Reply(ask), ask.body(model)
    if ask.stream:
        chunks = api.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    else:
        chunks = [api.chat.completions.create(**body)]
    for chunk in chunks:
        for choice in chunk.choices:
            said = choice.delta if ask.stream else choice.message
            out.text += said.content or ""
            if choice.logprobs is not None:
                out.tokens += [bytes(token.bytes) for token in choice.logprobs.content]
                out.logprobs += [token.logprob for token in choice.logprobs.content]
            if ask.stream and out.first is None and said.content:
                out.first = time.monotonic() - out.asked
            out.ended = choice.finish_reason or out.ended
        if chunk.usage is not None:
            out.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            out.sliders = chunk.model_extra["steering"]["sliders"]
    return out


class Office:
    """A server under load, from outside: what everybody does until the time is over, and what came of it."""

    def __init__(self, url: str, model: str, ends: Sequence[int], clients: int, seconds: float) -> None:
        """`url`: with the /v1. `ends`: the model's end tokens."""
        self.url, self.model, self.ends, self.seconds = url, model, tuple(ends), seconds
        self.begun = math.inf
        """When the time began, by `time.monotonic`: everybody who chats has had one reply by then."""
        self.warm = threading.Barrier(clients + 3, self._begin)
        """Where the chats, the two others and whoever looks on wait for it."""
        self.replies: list[Reply] = []
        self.hung_up = 0
        """Requests that were taken and left."""
        self.rubbish = 0
        """Requests that are none."""
        self.problems: list[str] = []

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.begun + self.seconds

    def chats(self, asked: Iterator[Ask]) -> None:
        """One client, a request after the other."""
        with openai_at(self.url) as api:
            self._chat(api, next(asked))
            self.warm.wait()
            while not self.over:
                self._chat(api, next(asked))

    def leaves(self) -> None:
        """One who hangs up: on streams and whole replies, while it waits, while it reads, while it asks."""
        self.warm.wait()
        for n in count():
            if self.over:
                return
            try:
                self._leave(n)
            except OSError as e:
                self._problem("one who hangs up", e)
            time.sleep(0.1)

    def sends_rubbish(self) -> None:
        """One who sends what is no request, and moves the live sliders between."""
        self.warm.wait()
        with httpx.Client(base_url=self.url, timeout=60) as http:
            for n, (status, body) in enumerate(cycle(self._wrong())):
                if self.over:
                    return
                try:
                    if body is None:
                        got = self._no_http()
                    else:
                        json_type = {"Content-Type": "application/json"}
                        got = http.post("chat/completions", content=body, headers=json_type).status_code
                    moved = http.put("steering", json={"sliders": {"moralizing": LIVE[n % 2]}}).status_code
                except Exception as e:
                    self._problem("rubbish", e)
                    continue
                self.rubbish += 1
                if (got, moved) != (status, 200):
                    self.problems.append(f"rubbish: expected {status} and 200, found {got} and {moved}")
                time.sleep(0.1)

    def _begin(self) -> None:
        self.begun = time.monotonic()

    def _chat(self, api: OpenAI, ask: Ask) -> None:
        try:
            self.replies.append(send(api, self.model, ask))
        except Exception as e:
            self._problem("a chat", e)

    def _leave(self, n: int) -> None:
        whole = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 500}
        body = json.dumps(whole | {"stream": n % 2 == 0, "logit_bias": {str(end): -100 for end in self.ends}}).encode()
        with self._connected() as raw:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            asked = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
            if n % 5 == 4:
                raw.sendall(asked[: -len(body) // 2])
                return
            raw.sendall(asked)
            self.hung_up += 1
            if n % 2 == 0:
                got = b""
                while got.count(b"data: ") < 2 + n % 20 and (more := raw.recv(4096)):
                    got += more
            else:
                time.sleep(0.3 + 0.1 * (n % 20))
            if n % 3 == 0:
                # Closed by a reset, as by a client that is killed.
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _no_http(self) -> int:
        """The status with which it answers what is not HTTP at all."""
        with self._connected() as raw:
            raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            return int(raw.recv(4096).split(b" ")[1])

    def _connected(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").removesuffix("/v1").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def _wrong(self) -> list[tuple[int, bytes | None]]:
        """(the status it should get, body); None for what is not HTTP."""
        fine = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        changes: list[tuple[int, dict[str, Any]]] = [
            (400, {"steering": {"sliders": {"kindness": 1.0}}}),
            (400, {"steering": {"sliders": {"moralizing": "much"}}}),
            (400, {"steering": {"sliders": {"moralizing:ablate": 7.0}}}),
            (400, {"steering": {"slider": {"moralizing": 1.0}}}),
            (400, {"messages": 3}),
            (400, {"messages": []}),
            (400, {"temperature": "hot"}),
            (400, {"max_tokens": -5}),
            (400, {"logit_bias": {"99999999": 1}}),
            (400, {"messages": [{"role": "user", "content": "a " * 20_000}]}),
            (404, {"model": "gpt"}),
            (404, {"steering": {"profile": "nobody"}}),
            (413, {"messages": [{"role": "user", "content": "a" * LARGEST}]}),
        ]
        bodies = [(status, json.dumps(fine | change).encode()) for status, change in changes]
        return [(400, b"{bad json"), (400, b""), (400, b"[1]"), (400, None), *bodies]

    def _problem(self, who: str, error: Exception) -> None:
        self.problems.append(f"{who}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

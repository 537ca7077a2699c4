"""The worst requests that one client can make, and how long another waits for its first token beside each."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from steer.core.trait import NeutralPrompts

PATIENCE = 300
"""Seconds for a first token."""
ASKED = (0.3, 3.0, 3.0, 3.0)
"""Seconds before each of the other's chats: while the worst request is planned, then read, then written."""


def requests(context: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each is called, its path and its body, for a model of that context."""
    topics = " ".join(NeutralPrompts.load().fit)
    long = (topics * (1 + 3 * context // len(topics)))[: 3 * context]  # characters: under one in three is a token
    user = [{"role": "user", "content": "Hello"}]
    yield "16 long replies", "completions", {"prompt": ["Hello"] * 16}
    yield "16 long prompts", "completions", {"prompt": [f"{i}. {long}" for i in range(16)]}
    everything = {"logprobs": True, "top_logprobs": 20, "dry_multiplier": 1, "typical_p": 0.9, "xtc_probability": 0.5}
    chat = [{"role": "user", "content": long}]
    yield "8 replies to a long prompt, every sampler", "chat/completions", {"messages": chat, "n": 8} | everything
    yield "4 MB that is too long", "completions", {"prompt": ["ab cd\n" * 100_000] * 6}
    yield "4 MB in 1,000 messages", "chat/completions", {"messages": [user[0] | {"content": "a" * 3_900}] * 1_000}


def waits(url: str, name: str, context: int) -> tuple[float, dict[str, float]]:
    """Seconds to the first token of a short chat: the median of some with nobody else, and the longest of those beside
    each worst request."""
    alone = statistics.median(first_token(url, name) for _ in range(5))
    return alone, {label: _beside(url, name, path, body) for label, path, body in requests(context)}


def first_token(url: str, name: str) -> float:
    """Seconds that a short chat waits for it."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello, who are you?"}], "max_tokens": 4}
    begun = time.perf_counter()
    with httpx.stream("POST", f"{url}/chat/completions", json=body | {"stream": True}, timeout=PATIENCE) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - begun
    raise RuntimeError("a chat ended without a token")


def _beside(url: str, name: str, path: str, body: dict[str, Any]) -> float:
    over = threading.Event()

    def ask() -> None:
        """Until asked to leave, which ends what the server writes for it. A refusal is an answer too."""
        with httpx.stream("POST", f"{url}/{path}", json=body | {"model": name, "stream": True}, timeout=PATIENCE) as r:
            for _ in r.iter_lines():
                if over.is_set():
                    return

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    waited = []
    for pause in ASKED:
        time.sleep(pause)
        waited.append(first_token(url, name))
    over.set()
    client.join(PATIENCE)
    return max(waited)

"""A real server over a real engine and a real model, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from steer.model.steered import SteeredModel
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Engine
from steer.serve.server import Options, Server, address, listen

NO_END = {"2": -100}
"""The logit bias without which a random model ends its replies where it likes."""


@dataclass
class Served:
    """Where a server is, and what stands behind it."""

    url: str
    """Without the /v1."""
    model: SteeredModel
    engine: Engine
    name: str = "chat"

    def client(self, key: str = "any") -> OpenAI:
        """OpenAI's own."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        """A request by hand."""
        return httpx.post(self.url + path, **({"json": body} if body is not None else {}), timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def put(self, body: Any) -> httpx.Response:
        """Move the live sliders."""
        return httpx.put(f"{self.url}/v1/steering", json=body, timeout=60)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, 0 where it is not there yet."""
        lines = [text.rpartition(" ") for text in self.get("/metrics").text.splitlines()]
        return next((float(value) for name, _, value in lines if name == line), 0.0)


@contextmanager
def served(
    model: SteeredModel, options: Options | None = None, engine: Engine | None = None, **engine_options: int
) -> Iterator[Served]:
    """A server on a free port for the length of a block."""
    options = options or Options()
    engine = engine or BatchingEngine(model, **engine_options)
    try:
        with listen(options.host, 0) as listening:
            server = Server(model, engine, options)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                yield Served(address(listening).removesuffix("/v1"), model, engine)
            finally:
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()
    finally:
        engine.close()


def until(condition: Any, seconds: float = 20.0) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False

"""The server's counters and histograms, in Prometheus's format at /metrics.

`Counted` counts requests as middleware; `steer.serve.writing` times the tokens of replies with `RequestTimer`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steer.serve.engine import Engine

_FIRST_TOKEN_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Buckets of the time to a reply's first token, in seconds."""
_EACH_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
"""Buckets of the time between two tokens, in seconds."""


class Metrics:
    """One server's counters. The numbers of running and waiting jobs are read from `engine` at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("steer_requests", "Requests answered.", ["route", "status"], registry=r)
        self.hung_up = Counter("steer_hung_up", "Clients that left before their reply was whole.", registry=r)
        self.prompt_tokens = Counter("steer_prompt_tokens", "Tokens of prompts.", registry=r)
        self.reply_tokens = Counter("steer_completion_tokens", "Tokens written.", registry=r)
        self.first_token = Histogram(
            "steer_time_to_first_token_seconds",
            "From taking a job to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=r,
        )
        self.each_token = Histogram(
            "steer_time_per_token_seconds", "Between two tokens of one reply.", buckets=_EACH_TOKEN_BUCKETS, registry=r
        )
        Gauge("steer_jobs_running", "Texts being written.", registry=r).set_function(lambda: engine.running)
        Gauge("steer_jobs_waiting", "Texts that wait for room.", registry=r).set_function(lambda: engine.waiting)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's exposition format."""
        return generate_latest(self.registry)


@dataclass
class RequestTimer:
    """Times the tokens of one reply."""

    metrics: Metrics
    _last: float = field(default_factory=time.perf_counter)
    _begun: bool = False

    def token(self) -> None:
        """Count one token and record the time since the last one, or since the job was submitted."""
        now = time.perf_counter()
        histogram = self.metrics.each_token if self._begun else self.metrics.first_token
        histogram.observe(now - self._last)
        self.metrics.reply_tokens.inc()
        self._last, self._begun = now, True


class Counted:
    """Middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # what the client receives for an exception that no handler caught

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The label is the route's path, not the request's: unknown paths would each make a new time series.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()

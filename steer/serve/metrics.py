"""The server's counters and histograms, in Prometheus's format at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
        self._reply_tokens = Counter("steer_completion_tokens", "Tokens written.", registry=r)
        self._first_token = Histogram(
            "steer_time_to_first_token_seconds",
            "From taking a job to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=r,
        )
        self._each_token = Histogram(
            "steer_time_per_token_seconds", "Between two tokens of one reply.", buckets=_EACH_TOKEN_BUCKETS, registry=r
        )
        Gauge("steer_jobs_running", "Texts being written.", registry=r).set_function(lambda: engine.running)
        Gauge("steer_jobs_waiting", "Texts that wait for room.", registry=r).set_function(lambda: engine.waiting)

    def token(self, seconds: float, first: bool) -> None:
        """Count a token of a reply. `seconds`: since the last one, or for the first since its job was submitted."""
        (self._first_token if first else self._each_token).observe(seconds)
        self._reply_tokens.inc()

"""The server's routes: OpenAI's API for one model, `/v1/steering` for its sliders, `/health` and `/metrics`.

`create_app` connects the parts of `steer.serve` to a FastAPI application; `steer.serve.server` runs it on uvicorn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from steer.core.profile import Profile
from steer.serve.engine import Engine
from steer.serve.errors import ApiError, handle_errors
from steer.serve.limits import BodyLimit, KeyRequired, KnownHost, Limits, check_exposure, is_loopback
from steer.serve.metrics import Counted, Metrics
from steer.serve.replies import Replies
from steer.serve.schemas import ChatRequest, CompletionRequest, SteeringUpdate
from steer.serve.steering import LiveSettings

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


@dataclass(frozen=True)
class Options:
    """Settings of one server."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    """The bearer token that every request must send; required if other machines can reach `host`."""
    profiles: Sequence[Profile] = ()
    """Profiles that clients choose by model name, as in `merged@noir`."""
    limits: Limits = field(default_factory=Limits)
    """How much one request may ask for."""

    def __post_init__(self) -> None:
        check_exposure(self.host, self.api_key)


def create_app(model: SteeredModel, engine: Engine, options: Options | None = None) -> FastAPI:
    """Return an ASGI application that serves `model` with texts that `engine` writes. It closes neither of them.

    Errors: SteerError for profiles that do not fit the model.
    """
    options = options or Options()
    board = LiveSettings(model, options.profiles)
    metrics = Metrics(engine)
    replies = Replies(
        model,
        engine,
        board,
        metrics,
        name=public_name(model.name),
        limits=options.limits,
    )
    # FastAPI's documentation pages are switched off, because they load scripts from other hosts.
    app = FastAPI(title="steer", docs_url=None, redoc_url=None)
    handle_errors(app)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest, request: ChatRequest) -> Response:
        return await replies.answer(http, request)

    @app.post("/v1/completions")
    async def complete(http: HttpRequest, request: CompletionRequest) -> Response:
        return await replies.answer(http, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _models(replies.name, board.profiles, started)}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        profile = replies.profile_of(name)
        return _models(replies.name, [profile] if profile else [], started)[-1]

    @app.get("/v1/steering")
    async def steering() -> dict[str, Any]:
        return await anyio.to_thread.run_sync(board.describe)

    @app.put("/v1/steering")
    async def steer(update: SteeringUpdate) -> dict[str, Any]:
        def change() -> dict[str, Any]:
            board.change(update)
            return board.describe()

        return await anyio.to_thread.run_sync(change)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.problem is not None:
            raise ApiError(503, engine.problem, code="engine_error")
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    # The middleware that is added last sees a request first.
    app.add_middleware(BodyLimit, limit=options.limits.body)
    if options.api_key is not None:
        app.add_middleware(KeyRequired, key=options.api_key)
    if is_loopback(options.host):
        # Against DNS rebinding: a page of another site could make its own host name point to this machine.
        app.add_middleware(KnownHost, hosts=("localhost", "127.0.0.1", "::1", options.host))
    app.add_middleware(Counted, metrics=metrics)
    return app


def public_name(name: str) -> str:
    """Return the name that clients use for a model: the last part of a directory's path, or the hub id unchanged."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _models(name: str, profiles: Sequence[str], created: int) -> list[dict[str, Any]]:
    ids = [name, *(f"{name}@{p}" for p in profiles)]
    return [{"id": i, "object": "model", "created": created, "owned_by": "steer"} for i in ids]

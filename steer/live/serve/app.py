"""The server's routes: OpenAI's API for one model, and its sliders."""

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

from steer.live.serve.engine import Engine
from steer.live.serve.errors import ApiError, handle_errors
from steer.live.serve.limits import BodyLimit, KeyRequired, KnownHost, Limits, check_exposure, is_loopback
from steer.live.serve.metrics import Counted, Metrics
from steer.live.serve.replies import Replies
from steer.live.serve.schemas import ChatRequest, CompletionRequest, SteeringUpdate
from steer.live.serve.steering import Board
from steer.values.profile import Profile

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


@dataclass(frozen=True)
class Options:
    """Of one server."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    """What every request must bring; wanted where others than this machine reach the host."""
    profiles: Sequence[Profile] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_exposure(self.host, self.api_key)


def create_app(model: SteeredModel, engine: Engine, options: Options | None = None) -> FastAPI:
    """An ASGI application that answers for `model` with texts that `engine` writes; it closes neither.

    Errors: SteerError for profiles that do not fit the model.
    """
    options = options or Options()
    board = Board(model, options.profiles)
    metrics = Metrics(engine)
    replies = Replies(
        model,
        engine,
        board,
        metrics,
        name=public_name(model.name),
        limits=options.limits,
    )
    # The pages of documentation that FastAPI offers load scripts from other hosts.
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

    # The last one added is the first that sees a request.
    app.add_middleware(BodyLimit, limit=options.limits.body)
    if options.api_key is not None:
        app.add_middleware(KeyRequired, key=options.api_key)
    if is_loopback(options.host):
        # A page of another site cannot reach it under a name that it makes point here.
        app.add_middleware(KnownHost, hosts=("localhost", "127.0.0.1", "::1", options.host))
    app.add_middleware(Counted, metrics=metrics)
    return app


def public_name(name: str) -> str:
    """What clients call a model: a directory by its last part, a hub id as it is."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _models(name: str, profiles: Sequence[str], created: int) -> list[dict[str, Any]]:
    ids = [name, *(f"{name}@{p}" for p in profiles)]
    return [{"id": i, "object": "model", "created": created, "owned_by": "steer"} for i in ids]

"""`steer serve`: OpenAI's API for one model, `/v1/steering` for its sliders, `/health` and `/metrics`, on uvicorn.

`serve` opens the port and starts the engine; `steer.cli.live.serve` is the command that calls it. `create_app` makes
the routes and connects them to the other parts of `steer.serve`.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import h11
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from uvicorn.protocols.http.h11_impl import H11Protocol

from steer.core.profile import Profile
from steer.core.version import __version__
from steer.errors import SteerError, UsageError, skip
from steer.model.sliders import as_edit
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Engine
from steer.serve.errors import ERRORS, ApiError, handle_errors
from steer.serve.limits import Guard, Limits, Origins, is_loopback
from steer.serve.metrics import Metrics
from steer.serve.new_sliders import NewSliders
from steer.serve.replies import KeepAlive, Replies
from steer.serve.requests import ChatRequest, CompletionRequest, NewSlider, Steering
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
    allow_hosts: Sequence[str] = ()
    """Names by which clients may reach a server on loopback, besides this machine's, as `host.docker.internal`."""
    allow_origins: Sequence[str] = ()
    """Origins of web pages that may use the server, as `https://example.org`; `*` for all, if there is no key."""
    any_model_name: bool = False
    """Whether a model's name that the server does not know, as `gpt-4o`, means the served model."""
    allow_find: bool = False
    """Whether clients may search for new sliders, which loads the model a second time and takes a minute or more."""
    keep_alive: KeepAlive = "chunks"
    """What a stream sends while there is no text: empty chunks, or comments, which some clients take for JSON."""

    def __post_init__(self) -> None:
        for name in self.allow_hosts:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UsageError(f"--allow-host {name}: expected a host's name without port, as host.docker.internal")
        for origin in self.allow_origins:
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*?#@A-Z]+", origin):
                raise UsageError(f"--allow-origin {origin}: expected scheme and host alone, as https://example.org")
        if "*" in self.allow_origins and self.api_key is not None:
            raise UsageError("--allow-origin *: expected named origins beside --api-key, found all; name them")
        key = self.api_key
        if key is not None and not (key.strip() == key != "" and key.isascii() and key.isprintable()):
            raise UsageError("--api-key: expected printable ASCII without spaces around it, found something else")
        if key is None and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}: expected --api-key beside it, as others can reach it, found none; give a key"
            )


def serve(
    model: SteeredModel,
    *,
    port: int = 8321,
    options: Options | None = None,
    max_running: int = 16,
    max_waiting: int = 64,
    context: int | None = None,
    ready: Callable[[str], None] = print,
    engine: Callable[..., Engine] = BatchingEngine,
) -> None:
    """Serve a loaded model until Ctrl-C or SIGTERM.

    `port`: 0 for any free port. `max_running`: texts written at the same time. `max_waiting`: texts that may queue
    behind them. `context`: most tokens of a prompt and its reply together; by default the model's own context.
    `ready`: called with the server's URL when it listens. `engine`: called with the model, and by keyword with the
    three numbers above.

    Errors: SteerError for a port that is taken and profiles that do not fit, UsageError for a host without a key.

        serve(steer.load("merged"), port=0, options=Options(profiles=load_profiles([Path("noir.yaml")])))
    """
    options = options or Options()
    listening = listen(options.host, port)
    with listening:
        writer = engine(model, max_running=max_running, max_waiting=max_waiting, context=context)
        try:
            server = Server(model, writer, options)
            # Prepare all sliders that requests may name: reading a dictionary and measuring its fit takes seconds.
            fixed = model.library().fixed
            for name, slider in model.sliders.known().items():
                if name not in fixed:
                    as_edit(model, [(slider, 1.0)])
            ready(address(listening))
            with suppress(KeyboardInterrupt):  # uvicorn raises it once it has stopped
                server.run(sockets=[listening])
        finally:
            writer.close()


class Server(uvicorn.Server):
    """A uvicorn server of one model's app. Stopping it closes the engine first, so that no stream delays the end."""

    def __init__(self, model: SteeredModel, engine: Engine, options: Options) -> None:
        app = create_app(model, engine, options)
        # Open connections have 5 seconds to end after the server is asked to stop.
        super().__init__(
            uvicorn.Config(
                app, http=_Http, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off"
            )
        )
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, then the server; uvicorn calls this when it is asked to stop."""
        await anyio.to_thread.run_sync(self._engine.close)
        await super().shutdown(sockets)


def create_app(model: SteeredModel, engine: Engine, options: Options | None = None) -> FastAPI:
    """Return an ASGI application that serves `model` with texts that `engine` writes. It closes neither of them.

    Errors: SteerError for profiles that do not fit the model.
    """
    options = options or Options()
    # Clients know a directory by the last part of its path, and a hub id unchanged.
    name = Path(model.name).resolve().name if Path(model.name).is_dir() else model.name
    settings, metrics = LiveSettings(model, options.profiles), Metrics(engine)
    replies = Replies(
        model, engine, settings, metrics, name, options.limits, options.any_model_name, options.keep_alive
    )
    # FastAPI's documentation pages are switched off, because they load scripts from other hosts.
    app = FastAPI(title="steer", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    handle_errors(app)
    started = int(time.time())

    def described(profile: str | None) -> dict[str, Any]:
        id = name if profile is None else f"{name}@{profile}"
        return Model(id=id, object="model", created=started, owned_by="steer").to_dict()

    @app.post("/v1/chat/completions", responses=_replied(ChatCompletion))
    async def chat(http: HttpRequest, request: ChatRequest) -> Response:
        return await replies.answer(http, request)

    @app.post("/v1/completions", responses=_replied(Completion))
    async def complete(http: HttpRequest, request: CompletionRequest) -> Response:
        return await replies.answer(http, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(p) for p in (None, *settings.profiles)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(replies.profile_of(name))

    # FastAPI calls these in a thread, because they are no coroutines: they may read a dictionary from disk.
    @app.get("/v1/steering")
    def steering() -> dict[str, Any]:
        return settings.describe() | {"allow_find": options.allow_find}

    @app.put("/v1/steering")
    def steer(update: Steering) -> dict[str, Any]:
        settings.change(update)
        return steering()

    sliders = NewSliders(model, settings, options.allow_find)

    @app.post("/v1/steering/sliders", status_code=202)
    def find(wanted: NewSlider) -> dict[str, Any]:
        return sliders.start(wanted)

    @app.get("/v1/steering/sliders/{id}")
    def search(id: str) -> dict[str, Any]:
        return sliders.describe(id)

    @app.delete("/v1/steering/sliders/{id}")
    def cancel(id: str) -> dict[str, Any]:
        return sliders.cancel(id)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.problem is not None:
            raise ApiError(503, engine.problem, code="engine_error")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_middleware(
        Guard, host=options.host, hosts=options.allow_hosts, api_key=options.api_key, max_body=options.limits.body,
        metrics=metrics,
    )  # fmt: skip
    app.add_middleware(Origins, origins=options.allow_origins)
    return app


def _replied(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a route that answers with a whole reply or a stream."""
    return {200: {"model": whole, "content": {"text/event-stream": {}}}}


class _Http(H11Protocol):
    """uvicorn's HTTP; its answer to bytes that are no HTTP is an error in OpenAI's format too."""

    def send_400_response(self, msg: str) -> None:
        """Answer with an error and close the connection. `msg`: uvicorn's own words."""
        error = ApiError(
            400, f"request: expected HTTP/1.1, found something else; {msg}", code="invalid_http"
        ).response()
        headers = [*error.raw_headers, (b"connection", b"close")]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=bytes(error.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Errors: SteerError for an address that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        message = f"{host}:{port}: expected an address to listen on, found it unusable ({why}); choose another --port"
        raise SteerError(message) from e


def address(listening: socket.socket) -> str:
    """Return the base URL for OpenAI's clients."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def load_profiles(places: Iterable[Path]) -> list[Profile]:
    """Load profiles from files, and from all `.yaml` and `.yml` files of directories.

    In a directory, a file that is not a profile is skipped with a warning.
    Errors: SteerError for a place without profiles, and for a named file that is not a profile.
    """
    out: list[Profile] = []
    for place in places:
        files = sorted(f for f in place.iterdir() if f.suffix in (".yaml", ".yml")) if place.is_dir() else [place]
        if not files:
            raise SteerError(f"{place}: expected profiles in .yaml files, found none; name another place")
        for file in files:
            try:
                out.append(replace(Profile.load(file), among=file if place.is_dir() else None))
            except SteerError as e:
                if not place.is_dir():
                    raise
                skip(file, e)
    return out

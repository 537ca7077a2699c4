"""`steer serve`: the app on uvicorn, from a free port to a quiet end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import uvicorn

from steer.errors import SteerError, skip
from steer.live.serve.app import Options, create_app
from steer.live.serve.batching import BatchingEngine
from steer.live.serve.engine import Engine
from steer.live.sliders import as_edit
from steer.values.profile import Profile

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

GRACE = 5
"""Seconds that connections have to end once the server is asked to stop."""


def serve(
    model: SteeredModel,
    *,
    port: int = 8321,
    options: Options | None = None,
    max_running: int = 16,
    max_waiting: int = 64,
    context: int | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM. `ready` is told the address; port 0 takes any that is free.

    `max_running` texts are written at a time, `max_waiting` more wait, `context` tokens hold a prompt and its reply.
    Errors: SteerError for a port that is taken and profiles that do not fit, UsageError for a host without a key.
    """
    options = options or Options()
    listening = listen(options.host, port)
    with listening:
        engine = BatchingEngine(model, max_running, max_waiting, context)
        try:
            server = Server(model, engine, options)
            # What requests may name is looked up now: reading a dictionary and measuring its fit takes seconds.
            for slider in model.sliders.known().values():
                as_edit(model, [(slider, 1.0)])
            ready(address(listening))
            with suppress(KeyboardInterrupt):  # uvicorn raises it once it has stopped
                server.run(sockets=[listening])
        finally:
            engine.close()


class Server(uvicorn.Server):
    """uvicorn with an app of ours. To stop it ends what the engine writes, so that no stream holds it up."""

    def __init__(self, model: SteeredModel, engine: Engine, options: Options) -> None:
        app = create_app(model, engine, options)
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off")
        )
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it is asked to stop."""
        await anyio.to_thread.run_sync(self._engine.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Errors: SteerError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise SteerError(
            f"{host}:{port}: expected an address to listen on, found it unusable ({why}); choose another --port"
        ) from e


def address(listening: socket.socket) -> str:
    """The URL under which OpenAI's clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def load_profiles(places: Iterable[Path]) -> list[Profile]:
    """Profiles from files, and from all `.yaml` and `.yml` files of directories.

    A file of a directory that is no profile is passed over with a warning.
    Errors: SteerError for a place with none, and for a file that is named and no profile.
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

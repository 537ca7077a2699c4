"""`steer serve`: opens the port, starts the engine, and runs the app of `steer.serve.app` on uvicorn.

`steer.cli.live.serve` is the command that calls `serve`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import uvicorn

from steer.core.profile import Profile
from steer.errors import SteerError, skip
from steer.model.sliders import as_edit
from steer.serve.app import Options, create_app
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Engine

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

GRACE = 5
"""Seconds that open connections have to end after the server is asked to stop."""


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
    """Serve a loaded model until Ctrl-C or SIGTERM.

    `port`: 0 for any free port. `max_running`: texts written at the same time. `max_waiting`: texts that may queue
    behind them. `context`: most tokens of a prompt and its reply together; by default the model's own context.
    `ready`: called with the server's URL when it listens.

    Errors: SteerError for a port that is taken and profiles that do not fit, UsageError for a host without a key.

        serve(steer.load("merged"), port=0, options=Options(profiles=load_profiles([Path("noir.yaml")])))
    """
    options = options or Options()
    listening = listen(options.host, port)
    with listening:
        engine = BatchingEngine(model, max_running, max_waiting, context)
        try:
            server = Server(model, engine, options)
            # Prepare all sliders that requests may name: reading a dictionary and measuring its fit takes seconds.
            for slider in model.sliders.known().values():
                as_edit(model, [(slider, 1.0)])
            ready(address(listening))
            with suppress(KeyboardInterrupt):  # uvicorn raises it once it has stopped
                server.run(sockets=[listening])
        finally:
            engine.close()


class Server(uvicorn.Server):
    """A uvicorn server of one model's app. Stopping it closes the engine first, so that no stream delays the end."""

    def __init__(self, model: SteeredModel, engine: Engine, options: Options) -> None:
        app = create_app(model, engine, options)
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off")
        )
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, then the server; uvicorn calls this when it is asked to stop."""
        await anyio.to_thread.run_sync(self._engine.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Errors: SteerError for an address that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise SteerError(
            f"{host}:{port}: expected an address to listen on, found it unusable ({why}); choose another --port"
        ) from e


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

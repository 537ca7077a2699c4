"""What the verbs of the command line share."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer

from steer.errors import StoppedError
from steer.plain_text import plain

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or smollm2-135m-instruct.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", help="auto: over every GPU, then memory; a device as cuda:1. The first GPU, or the CPU."
    ),
]
FourBit = Annotated[
    bool, typer.Option("--four-bit", help="Quantise the weights to 4 bits as they load (bitsandbytes).")
]


def _for_all_loads(dtype: str | None) -> str | None:
    if dtype is not None:
        os.environ["STEER_DTYPE"] = dtype
    return dtype


Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "stored"] | None,
    typer.Option(
        "--dtype", envvar="STEER_DTYPE", callback=_for_all_loads, show_default="auto",
        help="What to compute in; auto: as stored, or float32 on a CPU that is slow at that.",
    ),
]  # fmt: skip
"""Verbs need not look at it: the variable holds for every model that they load, and for processes they start."""
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, all else on stderr.")]


class _Notices(logging.Handler):
    """Prints each message once, on the stderr of the moment: progress bars put another in its place."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        line = self.format(record)
        if line not in self._said:
            self._said.add(line)
            print(plain(line), file=sys.stderr)


_NOTICES = _Notices()


def print_notices() -> None:
    """Print what the package logs from INFO on, such as the dtype of a model that is loaded, on stderr."""
    logger = logging.getLogger("steer")
    logger.setLevel(logging.INFO)
    logger.addHandler(_NOTICES)


def unicode_option(text: str | None) -> str | None:
    """A text of the command line. Errors: typer's, for bytes that are not UTF-8, before a model is loaded."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as e:
        raise typer.BadParameter(f"expected UTF-8, found other bytes at {e.start}; convert the text") from e
    return text


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Inside, SIGTERM stops as Ctrl-C does, and is then an error of this message with the shells' exit code, 143.

    Whatever a library makes of either (an import that is interrupted may end in any exception), it is a stop.
    """
    seen: list[int] = []

    def stop(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        ours = (signal.SIG_DFL, signal.default_int_handler)  # one that is ignored stays so
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) in ours]
        before = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield
    except (KeyboardInterrupt, Exception) as e:
        if signal.SIGTERM in seen:
            raise StoppedError(f"stopped by SIGTERM; {message}", 128 + signal.SIGTERM) from e
        if seen:
            raise KeyboardInterrupt from e
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """A verb's result on stdout."""
    typer.echo(json.dumps(result, indent=2) if as_json else plain(text))


def tell(line: str) -> None:
    """What happens, on stderr."""
    typer.echo(plain(line), err=True)

"""Options and helpers that the verbs of the command line share: model, dtype, JSON output, notices, stopping."""

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
        "--device-map",
        help="auto: over all GPUs, then memory; or a device, as cuda:1. Default: the first GPU, else CPU.",
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
        help="Type to compute in; auto: as stored, or float32 on a CPU that is slow with the stored type.",
    ),
]  # fmt: skip
"""Verbs need not read this option: it sets STEER_DTYPE, which applies to every model that they load, and to every
process that they start."""


def _for_all_chats(chat_template: str | None) -> str | None:
    if chat_template is not None:
        os.environ["STEER_CHAT_TEMPLATE"] = chat_template
    return chat_template


ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template", envvar="STEER_CHAT_TEMPLATE", callback=_for_all_chats, show_default="the checkpoint's",
        help="chatml, llama3, gemma, mistral, alpaca, plain, or a Jinja file: how chats become text.",
    ),
]  # fmt: skip
"""As `Dtype`, in STEER_CHAT_TEMPLATE."""
NoThink = Annotated[
    bool, typer.Option("--no-think", help="Ask the chat template for replies without thoughts, where it can.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print a machine-readable result on stdout, everything else on stderr.")
]


class _Notices(logging.Handler):
    """Prints each message once, on the current `sys.stderr`, which progress bars replace while they run."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if line not in self._printed:
            self._printed.add(line)
            print(plain(line), file=sys.stderr)


_NOTICES = _Notices()


def print_notices() -> None:
    """Print the package's log messages of level INFO and above on stderr, such as the dtype of a loaded model."""
    logger = logging.getLogger("steer")
    logger.setLevel(logging.INFO)
    logger.addHandler(_NOTICES)


def unicode_option(text: str | None) -> str | None:
    """Check a text from the command line. Errors: typer.BadParameter for bytes that are not UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as e:
        raise typer.BadParameter(f"expected UTF-8, found other bytes at {e.start}; convert the text") from e
    return text


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Inside the block, SIGTERM stops as Ctrl-C does, and raises StoppedError with `message` and exit code 143.

    `main` has a line for every verb; this is for verbs that know more about what is kept. A stop counts as a stop even
    if a library turns it into another exception, as an interrupted import may do.
    """
    seen: list[int] = []

    def stop(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    old_handlers = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        old_handlers = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield
    except (KeyboardInterrupt, Exception) as e:
        if signal.SIGTERM in seen:
            raise StoppedError(f"stopped by SIGTERM; {message}", 128 + signal.SIGTERM) from e
        if seen:
            raise KeyboardInterrupt from e
        raise
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a verb's result on stdout, as JSON or as text."""
    typer.echo(json.dumps(result, indent=2) if as_json else plain(text))


def say(line: str) -> None:
    """Print a progress line on stderr."""
    typer.echo(plain(line), err=True)

"""A command of this program in a process of its own, watched from a page: how far it is, what it says, how it ended."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_LINES = 200
_STEP = re.compile(r"(\d+) of (\d+): ")
_RUN = "from steer.cli import main; main()"
_PATIENCE = 15.0
"""Seconds that a process has to clean up after itself."""


class Job:
    """`steer ...` as a subprocess. The page's process does none of its work, and a page that goes away ends nothing."""

    def __init__(self, arguments: Sequence[str], *, out: Path | None = None, expected: int | None = None) -> None:
        """`out`: the directory that it writes, beside which it works until it is whole, and `expected` how many bytes
        it will come to: together they tell how far it is. Without them the steps do that it says it begins, as in
        `2 of 3: merging`. The command is to have `--json`."""
        self.arguments = tuple(arguments)
        self.out, self.expected = out, expected
        self.began = time.monotonic()
        self.error: str | None = None
        """What went wrong, in a line."""
        self.result: dict[str, Any] | None = None
        """What it printed, once it is done."""
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._cancelled = False
        self._progress: float | None = None
        command = [sys.executable, "-c", _RUN, *self.arguments]
        # A session of its own: Ctrl-C in the page's terminal is for the page, which has `cancel`.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._watching = [threading.Thread(target=work, daemon=True) for work in (self._read_errors, self._read_result)]
        for thread in self._watching:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether it is still at work."""
        return any(t.is_alive() for t in self._watching)

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return not self.running and self.error is None and not self._cancelled

    @property
    def cancelled(self) -> bool:
        """Whether somebody stopped it."""
        return self._cancelled

    @property
    def lines(self) -> list[str]:
        """The last that it said."""
        return list(self._lines)

    @property
    def progress(self) -> float | None:
        """How far it is, from 0 to 1; None where that is not known."""
        if self.done:
            return 1.0
        if self.out is None or not self.expected:
            steps = [m for line in self.lines if (m := _STEP.match(line))]
            return (int(steps[-1][1]) - 1) / int(steps[-1][2]) if steps else None
        written = min(self._bytes() / self.expected, 0.99)
        # What is renamed or put together at the end is not to look like a step back.
        self._progress = max(self._progress or 0.0, written)
        return self._progress

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end. Whether it came in time."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._watching:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not self.running

    def cancel(self) -> None:
        """Stop it; nothing half-written stays. Returns when it has ended."""
        if not self.running:
            return
        self._cancelled = True
        with suppress(ProcessLookupError):
            # Not SIGINT: what a shell starts in the background ignores that, and so do its children.
            self._process.terminate()
        if not self.wait(_PATIENCE):
            with suppress(ProcessLookupError):
                self._process.kill()
            self.wait(_PATIENCE)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._lines.append(line.rstrip())

    def _read_result(self) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.read()
        code = self._process.wait()
        # What it said last is told with what went wrong.
        self._watching[0].join(_PATIENCE)
        # It may have ended well before it heard of it.
        self._cancelled = self._cancelled and code != 0
        if self._cancelled:
            self.error = "stopped; nothing half-written was left"
        elif code:
            last = next((n for n in reversed(self._lines) if n.startswith("steer: ")), "")
            self.error = last.removeprefix("steer: ") or f"it ended with code {code}: {' '.join(self._lines)[-300:]}"
        else:
            try:
                found = json.loads(said)
                self.result = found if isinstance(found, dict) else None
            except ValueError:
                _log.warning("steer %s printed no JSON", " ".join(self.arguments))

    def _bytes(self) -> int:
        """What it has written so far, where it works and where it will be."""
        assert self.out is not None
        total = 0
        with suppress(OSError):
            for place in (self.out, *self.out.parent.glob(f".{self.out.name}.steer-*")):
                if place.is_dir():
                    total += sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        return total

"""A `steer` command in a separate process, for page and server: its progress, its result, and how to stop it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

_log = logging.getLogger(__name__)
_LINES = 200
"""Lines of a command's stderr that are kept."""
_STEP, _DONE = re.compile(r"(\d+) of (\d+): "), re.compile(r"\[(\d+)/(\d+)\] ")
"""How a command says on stderr which step it begins, and which it has done."""
_RUN = "from steer.cli.main import main; main()"
_PATIENCE = 15.0
"""Seconds that a process gets to clean up before it is killed."""


class LatestPerSubject:
    """Base of work in the background that belongs to no browser tab and no connection: this process remembers the
    latest instance of each class for each subject."""

    _latest: ClassVar[dict[tuple[type[LatestPerSubject], Hashable], Any]] = {}

    @classmethod
    def key(cls, subject: Any) -> Hashable:
        """Return the key by which `_latest` stores the work on a subject; by default the subject itself."""
        return subject

    @classmethod
    def latest(cls, subject: Any) -> Self | None:
        """Return what this process began last for a subject, running or ended; None if there is none."""
        return cls._latest.get((cls, cls.key(subject)))

    @classmethod
    def begin(cls, subject: Any, *args: Any) -> Self:
        """Make an instance, which starts to work, the latest for a subject. `args`: those of the class."""
        made = cls._latest[cls, cls.key(subject)] = cls(*args)
        return made

    @classmethod
    def forget(cls, subject: Any) -> None:
        """Make `latest` return None for a subject, once the user has seen how the work ended."""
        cls._latest.pop((cls, cls.key(subject)), None)

    @classmethod
    def running_for(cls) -> set[Hashable]:
        """Return the keys of the subjects for which instances of this class run."""
        return {key for (kind, key), made in cls._latest.items() if kind is cls and made.running}


class Job(LatestPerSubject):
    """A `steer` command in a subprocess. It goes on when the browser tab is closed."""

    stopped = "stopped; nothing half-written was left"
    """What `error` says after `cancel`."""

    def __init__(self, arguments: Sequence[str], *, out: Path | None = None, expected: int | None = None) -> None:
        """Start the command.

        `arguments`: those of `steer`, which must contain `--json`. `out`: the directory that the command writes; it
        works in a hidden directory beside it until the output is complete. `expected`: size of the output in bytes.
        Progress is computed from `out` and `expected`; without them, from lines on stderr: `2 of 3: merging`
        before a step, `[2/3] merged` after it.
        """
        self.arguments = tuple(arguments)
        self.out, self.expected = out, expected
        self.began = time.monotonic()
        self.lines: deque[str] = deque(maxlen=_LINES)
        """The last lines of its stderr."""
        self.cancelled = False
        """Whether the command was stopped by `cancel`."""
        self.error: str | None = None
        """What went wrong, in one line; None if nothing did."""
        self.result: dict[str, Any] | None = None
        """The JSON object that the command printed, after it is done."""
        self._progress = 0.0
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # it is closed with this object
        # A new session, so that Ctrl-C in the page's terminal stops only the page; a job is stopped by `cancel`.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments], stdin=subprocess.DEVNULL, stdout=self._output,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    @property
    def running(self) -> bool:
        """Whether the command is still running."""
        return self._watching.is_alive()

    @property
    def done(self) -> bool:
        """Whether the command has ended without an error."""
        return not self.running and self.error is None

    @property
    def progress(self) -> float | None:
        """How much is done, from 0 to 1; None if unknown."""
        if self.done:
            return 1.0
        if self.out is None or not self.expected:
            done = [
                (int(m[1]) - (pattern is _STEP)) / int(m[2])
                for line in list(self.lines) for pattern in (_STEP, _DONE) if (m := pattern.match(line))
            ]  # fmt: skip
            return done[-1] if done else None
        # Progress never decreases, though files that are renamed or combined at the end may shrink the total.
        self._progress = max(self._progress, min(self._bytes() / self.expected, 0.99))
        return self._progress

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the command has ended. Return whether that happened in time."""
        self._watching.join(seconds)
        return not self.running

    def cancel(self) -> None:
        """Stop the command and wait until it has ended. It removes its unfinished output."""
        if not self.running:
            return
        self.cancelled = True
        # Not SIGINT: a process that a shell starts in the background ignores it, and its children do too.
        self._process.terminate()
        if not self.wait(_PATIENCE):
            self._process.kill()
            self.wait(_PATIENCE)

    def _watch(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self.lines.append(line.rstrip())
        code = self._process.wait()
        # The command may have finished before the signal arrived.
        self.cancelled = self.cancelled and code != 0
        if self.cancelled:
            self.error = self.stopped
        elif code:
            last = next((n for n in reversed(self.lines) if n.startswith("steer: ")), "")
            self.error = last.removeprefix("steer: ") or f"it ended with code {code}: {' '.join(self.lines)[-300:]}"
        else:
            self._output.seek(0)
            try:
                found = json.load(self._output)
                self.result = found if isinstance(found, dict) else None
            except ValueError:
                _log.warning("steer %s printed no JSON", " ".join(self.arguments))

    def _bytes(self) -> int:
        """Return how many bytes are written so far, in the working directory and in `out`."""
        assert self.out is not None
        total = 0
        with suppress(OSError):
            for place in (self.out, *self.out.parent.glob(f".{self.out.name}.steer-*")):
                if place.is_dir():
                    total += sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        return total

"""Commands that the page runs in a separate process, and shows the progress of: a bake, and the default merge.

`Job` runs any `steer` command. `plan` makes a `BakePlan` from a chat's profile; `BakePlan.start` returns a `BakingJob`.
"""

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.baking.certificate import CERTIFICATE, Form
from steer.baking.plan import Verdict, bakeable
from steer.checkpoint.fetch import home, resolve
from steer.checkpoint.merge import is_merge_of
from steer.checkpoint.shipped import RECIPE, present
from steer.checkpoint.staging import check_output
from steer.core.profile import Profile
from steer.errors import SteerError, UnsupportedError
from steer.files import read_json_object
from steer.model.profiles import sliders_in

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_log = logging.getLogger(__name__)
_LINES = 200
"""Lines of a command's stderr that are kept."""
_STEP = re.compile(r"(\d+) of (\d+): ")
_RUN = "from steer.cli.main import main; main()"
_PATIENCE = 15.0
"""Seconds that a process gets to clean up before it is killed."""


class Job:
    """A `steer` command in a subprocess. It goes on when the browser tab is closed."""

    def __init__(self, arguments: Sequence[str], *, out: Path | None = None, expected: int | None = None) -> None:
        """Start the command.

        `arguments`: those of `steer`, which must contain `--json`. `out`: the directory that the command writes; it
        works in a hidden directory beside it until the output is complete. `expected`: size of the output in bytes.
        Progress is computed from `out` and `expected`; without them, from lines on stderr such as `2 of 3: merging`.
        """
        self.arguments = tuple(arguments)
        self.out, self.expected = out, expected
        self.began = time.monotonic()
        self.error: str | None = None
        """What went wrong, in one line; None if nothing did."""
        self.result: dict[str, Any] | None = None
        """The JSON object that the command printed, after it is done."""
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._cancelled = False
        self._progress: float | None = None
        command = [sys.executable, "-c", _RUN, *self.arguments]
        # A new session, so that Ctrl-C in the page's terminal stops only the page; a job is stopped by `cancel`.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._watching = [threading.Thread(target=work, daemon=True) for work in (self._read_errors, self._read_result)]
        for thread in self._watching:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether the command is still running."""
        return any(t.is_alive() for t in self._watching)

    @property
    def done(self) -> bool:
        """Whether the command has ended without an error."""
        return not self.running and self.error is None and not self._cancelled

    @property
    def cancelled(self) -> bool:
        """Whether the command was stopped by `cancel`."""
        return self._cancelled

    @property
    def lines(self) -> list[str]:
        """The last lines of its stderr."""
        return list(self._lines)

    @property
    def progress(self) -> float | None:
        """How much is done, from 0 to 1; None if unknown."""
        if self.done:
            return 1.0
        if self.out is None or not self.expected:
            steps = [m for line in self.lines if (m := _STEP.match(line))]
            return (int(steps[-1][1]) - 1) / int(steps[-1][2]) if steps else None
        written = min(self._bytes() / self.expected, 0.99)
        # Progress never decreases, though files that are renamed or combined at the end may shrink the total.
        self._progress = max(self._progress or 0.0, written)
        return self._progress

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the command has ended. Return whether that happened in time."""
        end = None if seconds is None else time.monotonic() + seconds
        for thread in self._watching:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not self.running

    def cancel(self) -> None:
        """Stop the command and wait until it has ended. It removes its unfinished output."""
        if not self.running:
            return
        self._cancelled = True
        with suppress(ProcessLookupError):
            # Not SIGINT: a process that a shell starts in the background ignores it, and its children do too.
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
        output = self._process.stdout.read()
        code = self._process.wait()
        # The last lines of stderr are needed for the error message.
        self._watching[0].join(_PATIENCE)
        # The command may have finished before the signal arrived.
        self._cancelled = self._cancelled and code != 0
        if self._cancelled:
            self.error = "stopped; nothing half-written was left"
        elif code:
            last = next((n for n in reversed(self._lines) if n.startswith("steer: ")), "")
            self.error = last.removeprefix("steer: ") or f"it ended with code {code}: {' '.join(self._lines)[-300:]}"
        else:
            try:
                found = json.loads(output)
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


@dataclass(frozen=True)
class BakePlan:
    """What a bake of a profile would do: which sliders can be baked, and why the others cannot."""

    model: str
    profile: Profile
    form: Form
    verdicts: tuple[Verdict, ...]
    """One verdict for each slider that moves something."""
    places: tuple[int, ...]
    """For each verdict, the slider's index in the profile."""

    @property
    def why(self) -> str | None:
        """Why the bake is not possible; None if it is."""
        if not self.verdicts:
            return "no slider moves anything; move one first"
        wrong = [v for v in self.verdicts if not v.ok]
        if wrong:
            return "; ".join(f"{v.slider}: {v.reason}" for v in wrong)
        return None if Path(resolve(self.model)).is_dir() else f"{self.model} is no directory on this machine"

    @property
    def possible(self) -> bool:
        """Whether every slider that moves something can be baked."""
        return self.why is None

    def without_refused(self) -> BakePlan:
        """Return the plan without the sliders that cannot be baked."""
        refused = {place for place, v in zip(self.places, self.verdicts, strict=True) if not v.ok}
        sliders = tuple(s for i, s in enumerate(self.profile.sliders) if i not in refused)
        accepted = tuple(v for v in self.verdicts if v.ok)
        remaining = [i for i in range(len(self.profile.sliders)) if i not in refused]
        places = tuple(remaining.index(p) for p in self.places if p not in refused)
        return replace(self, profile=replace(self.profile, sliders=sliders), verdicts=accepted, places=places)

    def start(self, out: str | Path) -> BakingJob:
        """Start the bake into the directory `out`.

        Errors: UnsupportedError if it is not possible, OutputExistsError if `out` exists.
        """
        if self.why is not None:
            raise UnsupportedError(f"bake: {self.why}")
        out = Path(out).expanduser().absolute()
        check_output(out)
        return BakingJob(self, out)


class BakingJob(Job):
    """A running `steer bake`."""

    def __init__(self, plan: BakePlan, out: Path) -> None:
        self.plan = plan
        source = Path(resolve(plan.model))
        self._folder = tempfile.TemporaryDirectory(prefix="steer-bake-")
        file = plan.profile.save(Path(self._folder.name) / "profile.yaml")
        weights = sum(f.stat().st_size for f in source.iterdir() if f.suffix == ".safetensors")
        form = [] if plan.form == "checkpoint" else ["--as", plan.form]
        super().__init__(
            ["bake", str(source), str(out), "--profile", str(file), *form, "--json"],
            out=out,
            # The size of an adapter is not known in advance.
            expected=weights if plan.form == "checkpoint" else None,
        )

    @cached_property
    def _read_certificate(self) -> dict[str, Any] | None:
        assert self.out is not None
        try:
            return read_json_object(self.out / CERTIFICATE)
        except SteerError:
            return None

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The certificate of the files that were written; None before they are complete."""
        return self._read_certificate if self.done else None


def plan(model: SteeredModel, profile: Profile, form: Form = "checkpoint") -> BakePlan:
    """Return what baking a profile into the checkpoint of a loaded model would do. Errors: SteerError."""
    moves = {
        place: slider.at(entry.amount)
        for place, (slider, entry) in enumerate(sliders_in(model, profile))
        if entry.enabled and not slider.is_neutral(entry.amount)
    }
    verdicts = tuple(bakeable(moves.values(), form, model.anatomy))
    return BakePlan(model.name, profile, form, verdicts, tuple(moves))


def default_place() -> Path:
    """Return the directory for the default merge."""
    return home() / "models" / "default-merge"


def ready(place: Path | None = None) -> bool:
    """Return whether the default merge exists, in `place` or in its usual directory, and is complete."""
    return RECIPE.is_file() and is_merge_of(place or default_place(), RECIPE)


def get_default(place: Path | None = None) -> Job:
    """Start a job that fetches the default model and merges its tunes. Files that exist already are used as they are.

    Errors: SteerError if the recipe is not installed.
    """
    place = place or default_place()
    return Job(["merge", str(present(RECIPE)), str(place), "--steps", "--json"])

"""Commands that the page runs in a separate process, and shows the progress of: a bake, a slider from votes, and
the default merge.

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
from steer.chat.voting import votes_place
from steer.checkpoint.fetch import home, resolve
from steer.checkpoint.merge import is_merge_of
from steer.checkpoint.shipped import RECIPE, present
from steer.checkpoint.staging import check_output
from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider
from steer.core.votes import usable_votes
from steer.errors import SteerError, UnsupportedError
from steer.files import read_json_object
from steer.model.profiles import sliders_in

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

_log = logging.getLogger(__name__)
_LINES = 200
"""Lines of a command's stderr that are kept."""
_STEP, _DONE = re.compile(r"(\d+) of (\d+): "), re.compile(r"\[(\d+)/(\d+)\] ")
"""How a command says on stderr which step it begins, and which it has done."""
_RUN = "from steer.cli.main import main; main()"
_PATIENCE = 15.0
"""Seconds that a process gets to clean up before it is killed."""


class Job:
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


@dataclass(frozen=True)
class BakePlan:
    """What a bake of a profile would do: which sliders can be baked, and why the others cannot."""

    model: str
    profile: Profile
    form: Form
    verdicts: tuple[Verdict, ...]
    """One verdict for each slider that moves something."""
    refused: tuple[ProfileSlider, ...]
    """The entries of the profile that cannot be baked."""

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
        profile = replace(self.profile, sliders=tuple(s for s in self.profile.sliders if s not in self.refused))
        return replace(self, profile=profile, verdicts=tuple(v for v in self.verdicts if v.ok), refused=())

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

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The certificate of the files that were written; None before they are complete."""
        assert self.out is not None
        with suppress(SteerError):
            return read_json_object(self.out / CERTIFICATE) if self.done else None


def plan(model: SteeredModel, profile: Profile, form: Form = "checkpoint") -> BakePlan:
    """Return what baking a profile into the checkpoint of a loaded model would do. Errors: SteerError."""
    moving = [
        (slider.at(entry.amount), entry)
        for slider, entry in sliders_in(model, profile)
        if entry.enabled and entry.amount != slider.neutral
    ]
    verdicts = tuple(bakeable([move for move, _ in moving], form, model.anatomy))
    refused = tuple(entry for (_, entry), verdict in zip(moving, verdicts, strict=True) if not verdict.ok)
    return BakePlan(model.name, profile, form, verdicts, refused)


class TasteJob(Job):
    """A running `steer find --votes`."""

    stopped = "stopped; the slider is as it was before"

    @cached_property
    def direction(self) -> Direction | None:
        """The direction that was saved; None before that."""
        return Direction.load(self.result["direction"]) if self.done and self.result else None


_TASTES: dict[str, TasteJob] = {}
"""The last job for each model. They belong to no tab."""


def taste_of(model: SteeredModel) -> TasteJob | None:
    """Return the last job that made a slider of votes for a model, running or ended."""
    return _TASTES.get(model.name)


def start_taste(model: SteeredModel) -> TasteJob:
    """Start to make a slider of all votes on this machine, or return the job that does.

    Errors: UsageError for too few votes.
    """
    job = _TASTES.get(model.name)
    if job is None or not job.running:
        usable_votes(votes_place())
        job = TasteJob(["find", resolve(model.name), "--votes", str(votes_place()), "--json"])
        _TASTES[model.name] = job
    return job


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

"""What a profile or a bake cost: `steer eval --quick` of it beside its model, which the page starts and shows; and what
was measured of the sliders that ship.

Each evaluation is a folder under $STEER_HOME/costs, so that a page that is loaded again finds what was measured and
what still is being measured, and an evaluation that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from steer.baking.certificate import CERTIFICATE
from steer.checkpoint.fetch import home, resolve
from steer.checkpoint.library import placed_directions
from steer.checkpoint.shipped import EFFECTS
from steer.core.profile import Profile
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.files import read_json_object, write_atomic_json
from steer.jobs import Job
from steer.measure.evaluation import REPORT, RESULTS
from steer.model.profiles import edit_of
from steer.model.steered import SteeredModel

PROBES: tuple[str, ...] = ()
"""Probes that are asked; empty for all."""
_ABOUT, _PROFILE, _OUT = "cost.json", "profile.yaml", "eval"


class CostJob(Job):
    """A running `steer eval --quick`."""

    stopped = "stopped; what was measured is kept, and the next start goes on from there"


@dataclass(frozen=True)
class Cost:
    """A quick evaluation of a model and of an edit of it; it may be measured, being measured, or neither."""

    folder: Path
    model: str
    name: str
    """What was made of the model, for people."""
    arguments: tuple[str, ...]
    """Options of `steer eval` that name it."""

    @property
    def job(self) -> CostJob | None:
        """The job that this process started, running or ended; None if there is none."""
        return CostJob.latest(self.folder)

    @property
    def report(self) -> Path | None:
        """The report page, beside eval.json; None before it is complete."""
        file = self.folder / _OUT / REPORT
        return file if file.is_file() else None

    @property
    def lines(self) -> list[str]:
        """What was found, in sentences; empty before that. Errors: SteerError for a damaged eval.json."""
        file = self.folder / _OUT / RESULTS
        return _lines(file, file.stat().st_mtime_ns) if file.is_file() else []

    def start(self, *, fresh: bool = False) -> CostJob:
        """Measure it, or return the job that does. `fresh`: from the beginning.

        Errors: UsageError while another one is being measured, since both would take twice as long.
        """
        if CostJob.running_for() - {self.folder}:
            raise UsageError("cost: expected nothing else to be measured, found a run; wait for it, or cancel it")
        job = self.job
        if job is None or not job.running:
            about = {"model": self.model, "name": self.name, "arguments": self.arguments}
            write_atomic_json(self.folder / _ABOUT, about)
            probes = ["--probes", ",".join(PROBES)] if PROBES else []
            out = ["--out", str(self.folder / _OUT), *(["--fresh"] if fresh else [])]
            command = ["eval", self.model, *self.arguments, *probes, "--quick", *out, "--json"]
            return CostJob.begin(self.folder, command)
        return job


def profile_cost(model: SteeredModel, profile: Profile) -> Cost:
    """Return the evaluation of a model under a profile. Errors: UsageError for a profile that moves nothing."""
    if edit_of(model, profile) is None:
        raise UsageError("cost: expected a slider that moves something, found none; move one first")
    folder = _folder(model, profile.name, profile.dump())
    file = profile.save(folder / _PROFILE)
    return Cost(folder, resolve(model.name), profile.name, ("--profile", str(file)))


def bake_cost(model: SteeredModel, baked: Path) -> Cost:
    """Return the evaluation of a checkpoint that was baked from a model.

    Errors: CheckpointError if `baked` has no certificate, UnsupportedError if it is no checkpoint.
    """
    baked = baked.expanduser().absolute()
    certificate = baked / CERTIFICATE
    if not certificate.is_file():
        raise CheckpointError(f"{baked}: expected a bake with {CERTIFICATE}, found none; name its folder")
    if not (baked / "config.json").is_file():
        raise UnsupportedError(f"{baked}: expected a baked checkpoint, found another form; bake a checkpoint")
    return Cost(_folder(model, baked.name, certificate.read_text()), resolve(model.name), baked.name,
                ("--against", str(baked)))  # fmt: skip


def costs_of(model: SteeredModel) -> list[Cost]:
    """Return the evaluations that were begun for a model on this machine, newest first."""
    found = []
    for file in sorted((home() / "costs").glob(f"*/{_ABOUT}"), key=lambda f: f.stat().st_mtime, reverse=True):
        about = read_json_object(file, do=f"delete {file.parent}")
        if about["model"] == resolve(model.name):
            found.append(Cost(file.parent, about["model"], about["name"], tuple(about["arguments"])))
    return found


def effects_report(model: SteeredModel) -> str | None:
    """Return the report on the sliders that ship for a model: what each does to every trait, and its dose response.
    None where none ship. Errors: SteerError for a damaged file."""
    places = dict.fromkeys(file.parent / EFFECTS for _, file in placed_directions(model.sketch()).values())
    file = next((place for place in places if place.is_file()), None)
    return None if file is None else _report(file, file.stat().st_mtime_ns)


def _folder(model: SteeredModel, name: str, what: Any) -> Path:
    """Return where the evaluation of `what` is kept: another folder if the weights or `what` are others."""
    key = json.dumps([resolve(model.name), model.sketch().id, name, what], sort_keys=True)
    return home() / "costs" / hashlib.sha256(key.encode()).hexdigest()[:16]


@lru_cache(4)
def _report(file: Path, _changed: int) -> str:
    from steer.measure.cross_effects import effects_page  # with matplotlib

    return effects_page(read_json_object(file, do="install steer again"))


@lru_cache(16)
def _lines(file: Path, _changed: int) -> list[str]:
    from steer.measure.eval_report import verdicts  # with matplotlib, which a page that shows none need not load

    return [line for _, lines in verdicts(read_json_object(file, do="measure again")) for line in lines]

"""Commands that the page runs as a `Job`: a bake, and the default merge.

`plan` makes a `BakePlan` from a chat's profile; `BakePlan.start` returns a `BakingJob`.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.baking.certificate import CERTIFICATE, Form
from steer.baking.plan import Verdict, bakeable
from steer.checkpoint.fetch import home, resolve
from steer.checkpoint.merge import is_merge_of
from steer.checkpoint.shipped import RECIPE, present
from steer.checkpoint.staging import check_output
from steer.core.profile import Profile, ProfileSlider
from steer.errors import SteerError, UnsupportedError
from steer.files import read_json_object
from steer.jobs import Job
from steer.model.profiles import sliders_in

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


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

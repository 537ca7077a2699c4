"""Sliders into weights, from a page: what can be baked is said before, `steer bake` does it in a process of its own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.chat.job import Job
from steer.errors import SteerError, UnsupportedError
from steer.files import read_json_object
from steer.live.profiles import sliders_in
from steer.values.profile import Profile
from steer.weights.bakeable import Form, Verdict, bakeable
from steer.weights.certify import CERTIFICATE
from steer.weights.fetch import resolve
from steer.weights.staging import check_output

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


@dataclass(frozen=True)
class BakePlan:
    """What a bake would do."""

    model: str
    profile: Profile
    form: Form
    verdicts: tuple[Verdict, ...]
    """One for each slider that moves something."""
    places: tuple[int, ...]
    """Where each of them stands in the profile."""

    @property
    def why(self) -> str | None:
        """Why it cannot be done; None where it can."""
        if not self.verdicts:
            return "no slider moves anything; move one first"
        wrong = [v for v in self.verdicts if not v.ok]
        if wrong:
            return "; ".join(f"{v.slider}: {v.reason}" for v in wrong)
        return None if Path(resolve(self.model)).is_dir() else f"{self.model} is no directory on this machine"

    @property
    def possible(self) -> bool:
        """Whether everything that moves can be baked."""
        return self.why is None

    def without_refused(self) -> BakePlan:
        """The same without the sliders that cannot be baked."""
        refused = {place for place, v in zip(self.places, self.verdicts, strict=True) if not v.ok}
        sliders = tuple(s for i, s in enumerate(self.profile.sliders) if i not in refused)
        kept = tuple(v for v in self.verdicts if v.ok)
        standing = [i for i in range(len(self.profile.sliders)) if i not in refused]
        places = tuple(standing.index(p) for p in self.places if p not in refused)
        return replace(self, profile=replace(self.profile, sliders=sliders), verdicts=kept, places=places)

    def start(self, out: str | Path) -> BakingJob:
        """Begin. Errors: UnsupportedError for what cannot be baked, OutputExistsError for a place that is taken."""
        if self.why is not None:
            raise UnsupportedError(f"bake: {self.why}")
        out = Path(out).expanduser().absolute()
        check_output(out)
        return BakingJob(self, out)


class BakingJob(Job):
    """`steer bake` at work."""

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
            # How large an adapter will be is not known before.
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
        """What was measured on the files that it wrote; None before they are whole."""
        return self._read_certificate if self.done else None


def plan(model: SteeredModel, profile: Profile, form: Form = "checkpoint") -> BakePlan:
    """What a bake of a profile would do to the checkpoint of a model that runs. Errors: SteerError."""
    moves = {
        place: slider.at(entry.amount)
        for place, (slider, entry) in enumerate(sliders_in(model, profile))
        if entry.enabled and not slider.is_neutral(entry.amount)
    }
    verdicts = tuple(bakeable(moves.values(), form, model.anatomy))
    return BakePlan(model.name, profile, form, verdicts, tuple(moves))

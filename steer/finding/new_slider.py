"""New sliders from two sentences or from votes: the page and the server run `steer find` in another process.

A search that finds nothing is kept under $STEER_HOME/failed until the user deletes it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from steer.checkpoint.fetch import home, resolve
from steer.checkpoint.library import Library
from steer.core.direction import Direction
from steer.core.trait import Trait
from steer.core.votes import usable_votes
from steer.errors import SteerError, UsageError, skip
from steer.files import delete, read_json_object, write_atomic_json
from steer.jobs import Job
from steer.model.steered import SteeredModel

LONGEST = 2000
"""Most characters of a sentence."""


@dataclass(frozen=True)
class FailedSearch:
    """A search that found no direction."""

    name: str
    sentence: str
    opposite: str | None
    error: str
    """Why, in one line."""
    place: Path = field(compare=False)

    def delete(self) -> None:
        """Delete its file. Errors: SteerError."""
        delete(self.place)


class FindJob(Job):
    """A running `steer find`. Its subject is a loaded model."""

    @classmethod
    def key(cls, subject: SteeredModel) -> str:
        """Return the id of the model's sketch."""
        return subject.sketch().id


class TasteJob(FindJob):
    """A running `steer find --votes`."""

    stopped = "stopped; the slider is as it was before"

    def __init__(self, model: SteeredModel, votes: Path) -> None:
        super().__init__(
            ["find", *_loaded_as(model), resolve(model.name), "--votes", str(votes), "--calibrate", "--json"]
        )

    @classmethod
    def start(cls, model: SteeredModel, votes: Path) -> TasteJob:
        """Start to make a slider of all votes in a file, or return the job that does.

        Errors: UsageError for too few votes.
        """
        job = cls.latest(model)
        if job is not None and job.running:
            return job
        usable_votes(votes)
        return cls.begin(model, model, votes)

    @cached_property
    def direction(self) -> Direction | None:
        """The direction that was saved; None before that."""
        return Direction.load(self.result["direction"]) if self.done and self.result else None


class NewSliderJob(FindJob):
    """A running `steer find --quick --calibrate` of a trait of two sentences. The slider is known to every process of
    this machine once it is done.

        job = NewSliderJob.start(model, Trait.from_sentences("You answer in rhyming couplets."))
        job.wait()
        print(job.error or job.result["verdict"]["says"])
    """

    stopped = "stopped; no slider was made"
    _starting: ClassVar = threading.Lock()

    def __init__(self, model: SteeredModel, trait: Trait) -> None:
        self.trait = trait
        self._place = _folder(model) / f"{trait.name}.json"
        opposite = [] if trait.without_instruction is None else ["--opposite", trait.without_instruction]
        # The sentence stands last, behind --, because it may begin with a dash.
        super().__init__(
            ["find", "--as", trait.name, *opposite, "--quick", "--calibrate", "--steps", "--json", *_loaded_as(model),
             "--", resolve(model.name), trait.with_instruction]
        )  # fmt: skip

    @classmethod
    def start(cls, model: SteeredModel, trait: Trait) -> NewSliderJob:
        """Start the search for a trait's direction, which loads the model a second time.

        Errors: UsageError for the name of a slider that the model has, a sentence of over `LONGEST` characters, and
        while another search on this model runs, since both would take twice as long.
        """
        for text in (trait.with_instruction, trait.without_instruction or ""):
            if len(text) > LONGEST:
                raise UsageError(f"sentence: expected at most {LONGEST:,} characters, found {len(text):,}; shorten it")
        library = Library(model)
        if trait.name in library.directions or trait.name in library.rows:
            raise UsageError(
                f"name: expected one that no slider of {model.name} has, found {trait.name!r}; choose another, or "
                "delete that slider"
            )
        with cls._starting:
            before = cls.latest(model)
            if before is not None and before.running:
                raise UsageError(
                    f"new slider: expected no other search, found that for {before.trait.name!r}; wait for it, or "
                    "cancel it"
                )
            return cls.begin(model, model, trait)

    def _watch(self) -> None:
        super()._watch()
        if self.error is None:
            self._place.unlink(missing_ok=True)
        elif not self.cancelled:
            failed = {
                "sentence": self.trait.with_instruction, "opposite": self.trait.without_instruction,
                "error": self.error,
            }  # fmt: skip
            write_atomic_json(self._place, failed)


def failed_searches(model: SteeredModel) -> list[FailedSearch]:
    """Return the searches on a model that found nothing, by name. Other files are skipped with a warning."""
    out = []
    for file in sorted(_folder(model).glob("*.json")):
        try:
            found = read_json_object(file, do="delete it")
            out.append(FailedSearch(file.stem, found["sentence"], found["opposite"], found["error"], file))
        except (SteerError, KeyError) as e:
            skip(file, e)
    return out


def _folder(model: SteeredModel) -> Path:
    return home() / "failed" / model.sketch().id


def _loaded_as(model: SteeredModel) -> list[str]:
    """Return the options with which `steer find` loads the model as it is loaded here."""
    placed = getattr(model.hf, "hf_device_map", None) or {}
    spread = ["--device-map", "auto"] if len(set(placed.values())) > 1 else []
    return [*spread, *(["--four-bit"] if getattr(model.hf, "is_loaded_in_4bit", False) else [])]

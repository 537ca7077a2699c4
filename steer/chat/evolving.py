"""A lineage as the page works on it: the commands that build its generations, and the judges of those who vote.

Jobs and judges belong to the process and not to a tab, so that a page that is loaded again finds both.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from steer.checkpoint.fetch import home
from steer.core.names import check_name
from steer.errors import UsageError
from steer.files import write_atomic
from steer.jobs import Job
from steer.lineage.building import checkpoint
from steer.lineage.judging import Judge
from steer.lineage.lineage import SETTINGS, Lineage

_LAST = "lineage"
"""File in $STEER_HOME with the folder of the lineage that the page showed last."""


class EvolvingJob(Job):
    """A running `steer evolve`."""

    stopped = "stopped; whole generations and measured merges are kept, and the next start goes on from there"


@dataclass(frozen=True)
class Evolution:
    """The lineage in a folder, begun or not."""

    place: Path
    _judges: ClassVar[dict[tuple[Path, str], Judge]] = {}
    """By folder and voter."""

    @property
    def lineage(self) -> Lineage | None:
        """The lineage, once its start is built."""
        if not (self.place / SETTINGS).is_file():
            return None
        lineage = Lineage(self.place)
        return lineage if lineage.generations else None

    @property
    def job(self) -> EvolvingJob | None:
        """The job that this process started, running or ended; None if there is none."""
        return EvolvingJob.latest(self.place)

    def start(self, recipe: str, pool: Sequence[str]) -> EvolvingJob:
        """Start the lineage from a recipe's file, or go on with a start that was stopped. Errors: as `next`."""
        return self._run(recipe, str(self.place), *(part for model in pool for part in ("--pool", model)))

    def next(self) -> EvolvingJob:
        """Build the next generation. Errors: UsageError while another job of this lineage runs."""
        return self._run("next", str(self.place))

    def export(self, out: str) -> EvolvingJob:
        """Write the best merge so far into a new folder. Errors: as `next`."""
        return self._run("export", str(self.place), out)

    def judge(self, voter: str, *, scene: bool = False) -> Judge:
        """Return the judge of a voter, which goes on where it was.

        Errors: UsageError for a voter whose name cannot be a file's, and as `Judge`.
        """
        check_name(voter, "vote as")
        found = self._judges.get((self.place, voter))
        if found is None or found.scene != scene:
            if found is not None:
                found.close()
            lineage = Lineage(self.place)
            found = Judge(lineage, voter, scene=scene, checkpoint=partial(checkpoint, lineage))
            self._judges[self.place, voter] = found
        return found

    def close(self) -> None:
        """Close the judges of this lineage; the next vote opens them again."""
        for key in [key for key in self._judges if key[0] == self.place]:
            self._judges.pop(key).close()

    def remember(self) -> None:
        """Let `last` return this lineage."""
        if last() != self.place:
            write_atomic(home() / _LAST, f"{self.place}\n")

    def _run(self, *arguments: str) -> EvolvingJob:
        if self.job is not None and self.job.running:
            raise UsageError(f"{self.place}: expected no job of this lineage, found one; wait for it, or cancel it")
        self.close()  # what is built needs the memory
        return EvolvingJob.begin(self.place, ["evolve", *arguments, "--json"])


def last() -> Path | None:
    """Return the folder of the lineage that the page showed last; None if it showed none."""
    file = home() / _LAST
    return Path(file.read_text().strip()) if file.is_file() else None


@atexit.register
def _close_all() -> None:
    """A thread that computes while the interpreter ends would abort the process."""
    for place in {place for place, _ in Evolution._judges}:
        Evolution(place).close()

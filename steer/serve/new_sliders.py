"""`POST /v1/steering/sliders`: a new slider from two sentences, searched for in a process beside the server.

A client starts a search, polls it by its id, and may cancel it. The slider can be used in requests once it is done.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from steer.core.small_files import shown
from steer.core.trait import Trait
from steer.errors import SteerError
from steer.finding.new_slider import NewSliderJob
from steer.serve.errors import ApiError
from steer.serve.requests import NewSlider
from steer.serve.steering import LiveSettings

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

KEPT = 100
"""How many searches of a server can be asked about; the oldest is forgotten first."""


class NewSliders:
    """The searches for new sliders that the clients of one server started."""

    def __init__(self, model: SteeredModel, settings: LiveSettings, allowed: bool) -> None:
        self._model, self._settings, self._allowed = model, settings, allowed
        self._jobs: dict[str, NewSliderJob] = {}

    def start(self, wanted: NewSlider) -> dict[str, Any]:
        """Start a search, and describe it. Errors: ApiError, with status 403 where the server allows none, 409 for a
        name that is taken and while another search runs."""
        if not self._allowed:
            message = "sliders: expected a server that searches, found one started without --allow-find; start it so"
            raise ApiError(403, message, code="find_not_allowed")
        try:
            trait = Trait.from_sentences(wanted.sentence, wanted.opposite, wanted.name)
        except SteerError as e:
            raise ApiError(400, str(e), code="invalid_value") from e
        try:
            job = NewSliderJob.start(self._model, trait)
        except SteerError as e:
            raise ApiError(409, str(e), code="find_conflict") from e
        id = f"find-{secrets.token_hex(8)}"
        while len(self._jobs) >= KEPT:
            del self._jobs[next(iter(self._jobs))]
        self._jobs[id] = job
        return self.describe(id)

    def describe(self, id: str) -> dict[str, Any]:
        """Return a search as JSON: its status and progress, and at its end the slider and the verdict, or the error.

        Errors: ApiError for an unknown id.
        """
        job = self._job(id)
        status = "running" if job.running else "cancelled" if job.cancelled else "failed" if job.error else "done"
        found = (job.result or {}) if status == "done" else {}
        return {
            "id": id,
            "object": "steering.search",
            "name": job.trait.name,
            "status": status,
            "progress": job.progress or 0.0,
            "error": job.error,
            "auroc": found.get("auroc"),
            "scorer_auroc": found.get("scorer_auroc"),
            "verdict": found.get("verdict"),
            "slider": self._settings.describe_slider(job.trait.name) if found else None,
        }

    def cancel(self, id: str) -> dict[str, Any]:
        """Stop a search, and describe it. Errors: ApiError for an unknown id."""
        self._job(id).cancel()
        return self.describe(id)

    def _job(self, id: str) -> NewSliderJob:
        if id not in self._jobs:
            message = f"search {shown(id)}: expected the id of one that this server started, found none; start one"
            raise ApiError(404, message, code="search_not_found")
        return self._jobs[id]

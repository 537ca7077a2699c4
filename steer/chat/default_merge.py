"""For a page without a model: the default merge, made in a process of its own while the page shows how far it is."""

from __future__ import annotations

from pathlib import Path

from steer.chat.job import Job
from steer.errors import SteerError
from steer.weights.fetch import home
from steer.weights.merge import is_merge_of

RECIPE = Path(__file__).parents[2] / "examples" / "merge" / "default.yml"


def default_place() -> Path:
    """Where it goes."""
    return home() / "models" / "default-merge"


def ready(place: Path | None = None) -> bool:
    """Whether it is there."""
    return RECIPE.is_file() and is_merge_of(place or default_place(), RECIPE)


def get_default(place: Path | None = None) -> Job:
    """Fetch the default model and merge its tunes; what is there already is taken as it is.

    Errors: SteerError where the recipe is not beside the package.
    """
    if not RECIPE.is_file():
        raise SteerError(f"{RECIPE}: expected the default merge's recipe, found none; start from a checkout")
    place = place or default_place()
    return Job(["merge", str(RECIPE), str(place), "--steps", "--json"])

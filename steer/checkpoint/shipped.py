"""Paths of data that ships with the code: at the top of a checkout, or inside the package if a wheel is installed."""

from __future__ import annotations

from pathlib import Path

from steer.errors import SteerError

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "shipped"  # setup.py lists its contents; a checkout has no such folder


def _place(installed: str, checkout: str) -> Path:
    return _INSTALLED / installed if _INSTALLED.is_dir() else _PACKAGE.parent / checkout


DICTIONARIES = _place("dictionaries", "dictionaries")
"""Directory of the directions and the dictionary that ship."""
EFFECTS = "effects.json"
"""File beside a model's directions: what its sliders do to every trait, as examples/traits/matrix.py measured it."""
RECIPE = _place("merge/default.yml", "examples/merge/default.yml")
"""Recipe of the default merge; its fine-tunes are in the same directory."""


def present(place: Path) -> Path:
    """Returns `place`, one of the paths above. Errors: SteerError if it is missing."""
    if not place.exists():
        raise SteerError(f"{place}: expected what ships with steer, found none; install steer again")
    return place

"""Directions by name: those found on this machine, and those that ship."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from steer.errors import UsageError
from steer.values.direction import Direction
from steer.weights.fetch import home
from steer.weights.sketch import Sketch

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

SHIPPED = Path(__file__).parents[2] / "dictionaries"


def direction_files() -> Iterator[Path]:
    """Every direction at hand, the user's own first."""
    yield from sorted((home() / "directions").glob("*/*.safetensors"))
    yield from sorted(SHIPPED.glob("*/directions/*.safetensors"))


def own_place(sketch: Sketch, name: str) -> Path:
    """Where a direction found on a checkpoint is kept."""
    return home() / "directions" / sketch.id / f"{name}.safetensors"


def directions_of(sketch: Sketch) -> dict[str, Direction]:
    """The directions at hand that were found on this checkpoint, by name."""
    out: dict[str, Direction] = {}
    for file in direction_files():
        direction = Direction.load(file)
        if direction.name not in out and Sketch.from_header(direction.provenance).same_as(sketch):
            out[direction.name] = direction
    return out


def find_direction(model: SteeredModel, name: str) -> Direction:
    """The direction `name` of this checkpoint. Errors: UsageError naming those that there are."""
    known = directions_of(model.sketch())
    if name not in known:
        there = f"found {', '.join(known)}" if known else "found none"
        raise UsageError(
            f"slider {name!r}: expected a direction of that name for {model.name}, {there}; "
            f"make it with: steer find {model.name} {name}"
        )
    return known[name]

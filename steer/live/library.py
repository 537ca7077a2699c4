"""Directions and dictionaries by name: those found or trained on this machine, and those that ship."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import yaml

from steer.errors import SteerError, UsageError
from steer.values.dictionary import Dictionary
from steer.values.dictionary_files import MANIFEST, SLIDERS, WEIGHTS, load_dictionary, read_manifest
from steer.values.direction import Direction
from steer.values.feature import Feature
from steer.values.slider import Slider, parse_name
from steer.weights.fetch import home
from steer.weights.sketch import Sketch


class Checkpoint(Protocol):
    """What names are looked up for: a live model, or a checkpoint on disk."""

    @property
    def name(self) -> str: ...
    def sketch(self) -> Sketch: ...


SHIPPED = Path(__file__).parents[2] / "dictionaries"
_LATENT = re.compile(r"L(\d+)/(\d+)")


def direction_files() -> Iterator[Path]:
    """Every direction at hand, the user's own first."""
    yield from sorted((home() / "directions").glob("*/*.safetensors"))
    yield from sorted(SHIPPED.glob("*/directions/*.safetensors"))


def dictionary_places() -> Iterator[Path]:
    """The directory of every dictionary at hand, the user's own first. Those without a manifest are not whole."""
    for root in (home() / "dictionaries", SHIPPED):
        yield from (manifest.parent for manifest in sorted(root.glob(f"*/*/{MANIFEST}")))


def own_place(sketch: Sketch, name: str) -> Path:
    """Where a direction found on a checkpoint is kept."""
    return home() / "directions" / sketch.id / f"{name}.safetensors"


def own_dictionary_place(sketch: Sketch, name: str) -> Path:
    """Where a dictionary trained on a checkpoint is kept."""
    return home() / "dictionaries" / sketch.id / name


def directions_of(sketch: Sketch) -> dict[str, Direction]:
    """The directions at hand that were found on this checkpoint, by name."""
    out: dict[str, Direction] = {}
    for file in direction_files():
        direction = Direction.load(file)
        if direction.name not in out and Sketch.from_header(direction.provenance).same_as(sketch):
            out[direction.name] = direction
    return out


def dictionaries_of(sketch: Sketch) -> dict[str, Path]:
    """The dictionaries at hand that were trained on this checkpoint, by name. Reads their manifests alone."""
    out: dict[str, Path] = {}
    for place in dictionary_places():
        manifest = read_manifest(place)
        name = str(manifest.get("name") or place.name)
        if name not in out and Sketch.from_header(manifest).same_as(sketch):
            out[name] = place
    return out


def dictionary_at(place: Path) -> Dictionary:
    """The dictionary in a directory, read once as long as its files stay the same."""
    stamps = tuple((place / f).stat().st_mtime_ns for f in (WEIGHTS, MANIFEST) if (place / f).is_file())
    return _load(place, stamps)


@lru_cache(maxsize=8)
def _load(place: Path, stamps: tuple[int, ...]) -> Dictionary:
    return load_dictionary(place)


def features_of(sketch: Sketch) -> dict[str, Slider]:
    """The sliders that come with this checkpoint's dictionaries, by name."""
    out: dict[str, Slider] = {}
    for place in dictionaries_of(sketch).values():
        for row in _slider_rows(place):
            if row["name"] not in out:
                out[row["name"]] = _slider(place, row)
    return out


def sliders_of(sketch: Sketch) -> dict[str, Slider]:
    """Everything at hand that moves this checkpoint by name: directions first, then features."""
    directions = {name: Slider(d) for name, d in directions_of(sketch).items()}
    return directions | {name: s for name, s in features_of(sketch).items() if name not in directions}


def find_slider(model: Checkpoint, name: str) -> Slider:
    """The slider `name` of this checkpoint: a direction, a feature that comes with one of its dictionaries, or
    latent `L<site>/<index>` of one; `NAME:OPERATION` does something else to it.

    Errors: UsageError naming those that there are.
    """
    base, operation = parse_name(name)
    found = _find_slider(model, base)
    return found if operation is None else Slider(found.target, operation, found.when, name)


def _find_slider(model: Checkpoint, name: str) -> Slider:
    sketch = model.sketch()
    known = directions_of(sketch)
    if name in known:
        return Slider(known[name])
    places = dictionaries_of(sketch)
    rows = {row["name"]: (place, row) for place in reversed(places.values()) for row in _slider_rows(place)}
    if name in rows:
        return _slider(*rows[name])
    if match := _LATENT.fullmatch(name):
        return _latent(model, places, int(match[1]), int(match[2]))
    there = [*known, *(n for n in rows if n not in known)]
    raise UsageError(
        f"slider {name!r}: expected a direction or a feature of that name for {model.name}, "
        f"found {', '.join(there) or 'none'}; make it with: steer find {model.name} {name}"
    )


def find_direction(model: Checkpoint, name: str) -> Direction:
    """The direction `name` of this checkpoint. Errors: UsageError naming those that there are."""
    known = directions_of(model.sketch())
    if name not in known:
        there = f"found {', '.join(known)}" if known else "found none"
        raise UsageError(
            f"slider {name!r}: expected a direction of that name for {model.name}, {there}; "
            f"make it with: steer find {model.name} {name}"
        )
    return known[name]


def _latent(model: Checkpoint, places: dict[str, Path], site: int, index: int) -> Slider:
    for place in places.values():
        if read_manifest(place).get("site") == site:
            return Slider(Feature.latent(dictionary_at(place), index))
    there = ", ".join(f"{n} at site {read_manifest(p).get('site')}" for n, p in places.items()) or "none"
    raise UsageError(
        f"slider 'L{site}/{index}': expected a dictionary for {model.name} at site {site}, found {there}; "
        "train one with steer train"
    )


def _slider_rows(place: Path) -> list[dict[str, Any]]:
    """What sliders.yaml says; nothing without one. Errors: SteerError for a file that is no list of sliders."""
    file = place / SLIDERS
    if not file.is_file():
        return []
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8")) or []
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SteerError(f"{file}: expected sliders in YAML, found {' '.join(str(e).split())}; mend the file") from e
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not _matched(row):
            raise SteerError(
                f"{file}: expected a list of sliders with name, latents and a unit each, found {str(row)[:80]!r}; "
                "mend the file, or make it again with steer find"
            )
    return rows


def _matched(row: dict[str, Any]) -> bool:
    latents, units = row.get("latents"), row.get("units")
    if not isinstance(latents, list) or not isinstance(units, list) or len(latents) != len(units):
        return False
    return all(type(i) is int for i in latents) and all(isinstance(u, int | float) for u in units)


def _slider(place: Path, row: dict[str, Any]) -> Slider:
    feature = Feature(row["name"], dictionary_at(place), tuple(row["latents"]), tuple(row["units"]))
    return Slider(feature, row.get("operation", "add"))

"""Directions and dictionaries by name: those found or trained on this machine, and those that ship."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from steer.errors import CheckpointError, SteerError, UnknownNameError, UsageError, skip
from steer.files import write_atomic
from steer.values.dictionary import Dictionary
from steer.values.dictionary_files import CONFIG, MANIFEST, WEIGHTS, load_dictionary, read_manifest
from steer.values.direction import Direction
from steer.values.feature import Feature
from steer.values.names import LATENT, is_name
from steer.values.slider import Slider, parse_name
from steer.values.slider_rows import slider_rows
from steer.values.small_files import shown, stamp
from steer.weights.fetch import home
from steer.weights.sketch import Sketch


class Checkpoint(Protocol):
    """What names are looked up for: a live model, or a checkpoint on disk."""

    @property
    def name(self) -> str: ...
    def sketch(self) -> Sketch: ...


SHIPPED = Path(__file__).parents[2] / "dictionaries"
_T = TypeVar("_T")


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


class Library:
    """What is at hand for one checkpoint, each file read once: to look up many names, make one and ask it for all.

    A file that cannot be read is passed over with a warning that names it: it may be of another checkpoint.
    """

    def __init__(self, model: Checkpoint) -> None:
        self.model = model

    @cached_property
    def directions(self) -> dict[str, Direction]:
        """The directions that were found on this checkpoint, by name."""
        return directions_of(self.model.sketch())

    @cached_property
    def dictionaries(self) -> dict[str, Path]:
        """The dictionaries that were trained on this checkpoint, by name."""
        return dictionaries_of(self.model.sketch())

    @cached_property
    def rows(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """The named sliders that come with those dictionaries: (the dictionary's directory, the row)."""
        out: dict[str, tuple[Path, dict[str, Any]]] = {}
        for place in self.dictionaries.values():
            for row in _passed_over(place, slider_rows) or ():
                out.setdefault(row["name"], (place, row))
        return out

    def sliders(self) -> dict[str, Slider]:
        """Everything that moves this checkpoint by name: directions first, then features."""
        out = {name: Slider(d) for name, d in self.directions.items()}
        for name, (place, row) in self.rows.items():
            if name not in out and (slider := _passed_over(place, lambda place, row=row: _slider(place, row))):
                out[name] = slider
        return out

    def slider(self, name: str) -> Slider:
        """The slider `name`: a direction, a feature that comes with a dictionary, or latent `L<site>/<index>` of one;
        `NAME:OPERATION` does something else to it.

        Errors: UnknownNameError, a UsageError, naming those that are known.
        """
        base, operation = parse_name(name)
        found = self._slider(base)
        return found if operation is None else Slider(found.target, operation, found.when, name)

    def _slider(self, name: str) -> Slider:
        if name in self.directions:
            return Slider(self.directions[name])
        if name in self.rows:
            return _slider(*self.rows[name])
        if match := LATENT.fullmatch(name):
            return self._latent(int(match[1]), int(match[2]))
        there = [*self.directions, *(n for n in self.rows if n not in self.directions)]
        trait = name if is_name(name) else "TRAIT"
        raise UnknownNameError(
            f"slider {shown(name)}: expected a direction or a feature of that name for {self.model.name}, "
            f"found {', '.join(there) or 'none'}; make it with: steer find {self.model.name} {trait}"
        )

    def _latent(self, site: int, index: int) -> Slider:
        sites = {name: _site(place) for name, place in self.dictionaries.items()}
        for name, place in self.dictionaries.items():
            if sites[name] == site:
                return Slider(Feature.latent(dictionary_at(place), index))
        there = ", ".join(f"{name} at site {at}" for name, at in sites.items()) or "none"
        raise UsageError(
            f"slider 'L{site}/{index}': expected a dictionary for {self.model.name} at site {site}, found {there}; "
            "train one with steer train"
        )


def directions_of(sketch: Sketch) -> dict[str, Direction]:
    """The directions at hand that were found on this checkpoint, by name."""
    out: dict[str, Direction] = {}
    for file in direction_files():
        found = _passed_over(file, lambda file: _direction(file, stamp(file)))
        if found is not None and found[0].name not in out and found[1].same_as(sketch):
            out[found[0].name] = found[0]
    return out


def dictionaries_of(sketch: Sketch) -> dict[str, Path]:
    """The dictionaries at hand that were trained on this checkpoint, by name. Reads their manifests alone."""
    out: dict[str, Path] = {}
    for place in dictionary_places():
        found = _passed_over(place / MANIFEST, lambda file: _manifest(file, stamp(file)))
        if found is None or found[0] in out or not found[1].same_as(sketch):
            continue
        name, _, lies = found
        if _passed_over(lies, _check_there):
            out[name] = lies
    return out


def register_dictionary(place: Path, name: str, sketch: Sketch) -> None:
    """Let a dictionary be found by name on the checkpoint with this sketch, from where it lies: it is large, so what is
    kept in the library is where it is. The last one of a name counts. Where that cannot be written there is a warning.
    """
    place = place.resolve()
    if place in [p.resolve() for p in dictionaries_of(sketch).values()]:
        return
    folder = own_dictionary_place(sketch, re.sub(r"[^\w-]+", "-", name))
    if (folder / WEIGHTS).is_file():
        return  # a whole dictionary of that name
    entry = {"name": name, "place": str(place), "sketch": sketch.to_header()}
    try:
        write_atomic(folder / MANIFEST, json.dumps(entry, indent=1) + "\n")
    except SteerError as e:
        skip(folder, e)  # the dictionary itself, the work of hours, is written


def dictionary_at(place: Path) -> Dictionary:
    """The dictionary in a directory, the same one while somebody uses it and its files stay the same."""
    return _load(place, tuple(stamp(place / f) for f in (WEIGHTS, CONFIG, MANIFEST)))


def find_slider(model: Checkpoint, name: str) -> Slider:
    """The slider `name` of this checkpoint, as `Library.slider`."""
    return Library(model).slider(name)


def find_direction(model: Checkpoint, name: str) -> Direction:
    """The direction `name` of this checkpoint. Errors: UsageError naming those that there are."""
    known = directions_of(model.sketch())
    if name not in known:
        there = f"found {', '.join(known)}" if known else "found none"
        raise UsageError(
            f"slider {shown(name)}: expected a direction of that name for {model.name}, {there}; "
            f"make it with: steer find {model.name} {name if is_name(name) else 'TRAIT'}"
        )
    return known[name]


def _passed_over(place: Path, read: Callable[[Path], _T]) -> _T | None:
    """What `read` makes of a file, or None and a warning: strangers' files raise what their libraries raise."""
    try:
        return read(place)
    except Exception as e:
        skip(place, e)
        return None


@lru_cache(maxsize=1024)
def _direction(file: Path, stamp: tuple[int, ...]) -> tuple[Direction, Sketch]:
    direction = Direction.load(file)
    return direction, _sketch(direction.provenance)


@lru_cache(maxsize=256)
def _manifest(file: Path, stamp: tuple[int, ...]) -> tuple[str, Sketch, Path]:
    """Name, checkpoint and directory of a dictionary that a manifest, or an entry of `register_dictionary`, names."""
    manifest = read_manifest(file.parent)
    place = Path(manifest["place"]) if isinstance(manifest.get("place"), str) else file.parent
    return str(manifest.get("name") or file.parent.name), _sketch(manifest), place


def _sketch(provenance: Mapping[str, Any]) -> Sketch:
    """The sketch of a library's file; an empty one where it holds none."""
    sketch = Sketch.from_header(provenance)
    if provenance.get("sketch", "") != "" and not sketch.values.size:
        raise CheckpointError("sketch: expected bf16 values in base64, found something else; find or train it again")
    return sketch


def _check_there(place: Path) -> bool:
    if not (place / WEIGHTS).is_file():
        raise CheckpointError(
            f"{place}: expected a dictionary that was used here, found none; if it was moved, name its new "
            "place once: steer find MODEL TRAIT --dictionary DIR"
        )
    return True


def _site(place: Path) -> int | None:
    """Which block's output a dictionary is of; dictionaries from elsewhere say it in their config alone."""
    site = read_manifest(place).get("site")
    return dictionary_at(place).site if site is None else site


_LOADED: WeakValueDictionary[tuple[object, ...], Dictionary] = WeakValueDictionary()
"""Dictionaries that somebody uses."""


def _load(place: Path, stamps: tuple[tuple[int, ...], ...]) -> Dictionary:
    found = _LOADED.get((place, stamps))
    if found is None:
        found = _LOADED[place, stamps] = load_dictionary(place)
    return found


def _slider(place: Path, row: dict[str, Any]) -> Slider:
    feature = Feature(row["name"], dictionary_at(place), tuple(row["latents"]), tuple(row["units"]))
    return Slider(feature, row.get("operation", "add"))

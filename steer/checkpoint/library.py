"""Finds directions and dictionaries by name for a checkpoint: those made on this machine, and those that ship.

Files belong to a checkpoint if their sketch matches its weights. Chat, server and bakes look up slider names here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from steer.checkpoint.fetch import home
from steer.checkpoint.shipped import DICTIONARIES, present
from steer.checkpoint.sketch import Sketch
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import CONFIG, MANIFEST, WEIGHTS, load_dictionary, read_manifest
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.names import LATENT, is_name
from steer.core.slider import Slider, parse_name, slider_rows
from steer.core.small_files import shown, stamp
from steer.errors import CheckpointError, SteerError, UnknownNameError, UsageError, skip
from steer.files import write_atomic


class Checkpoint(Protocol):
    """The thing that names are looked up for: a live model, or a checkpoint on disk."""

    @property
    def name(self) -> str: ...
    def sketch(self) -> Sketch: ...


_T = TypeVar("_T")


def direction_files() -> Iterator[Path]:
    """Every direction file on this machine, the user's first, then those that ship."""
    yield from sorted((home() / "directions").glob("*/*.safetensors"))
    yield from sorted(present(DICTIONARIES).glob("*/directions/*.safetensors"))


def dictionary_places() -> Iterator[Path]:
    """The directory of every dictionary on this machine, the user's first. A directory without a manifest is incomplete
    and left out."""
    for root in (home() / "dictionaries", present(DICTIONARIES)):
        yield from (manifest.parent for manifest in sorted(root.glob(f"*/*/{MANIFEST}")))


def own_place(sketch: Sketch, name: str) -> Path:
    """File for a direction that was found on the checkpoint with this sketch."""
    return home() / "directions" / sketch.id / f"{name}.safetensors"


def own_dictionary_place(sketch: Sketch, name: str) -> Path:
    """Directory for a dictionary that was trained on the checkpoint with this sketch."""
    return home() / "dictionaries" / sketch.id / name


class Library:
    """The directions, dictionaries and named sliders for one checkpoint. Each file is read once, so make one Library
    for many look-ups.

    A file that cannot be read is skipped with a warning that names it: it may belong to another checkpoint.
    """

    def __init__(self, model: Checkpoint) -> None:
        self.model = model

    @cached_property
    def directions(self) -> dict[str, Direction]:
        """The directions found on this checkpoint, by name."""
        return directions_of(self.model.sketch())

    @cached_property
    def dictionaries(self) -> dict[str, Path]:
        """The directories of the dictionaries trained on this checkpoint, by name."""
        return dictionaries_of(self.model.sketch())

    @cached_property
    def rows(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """The named sliders of those dictionaries: name -> (the dictionary's directory, the row of its
        sliders.yaml)."""
        out: dict[str, tuple[Path, dict[str, Any]]] = {}
        for place in self.dictionaries.values():
            for row in _read_or_skip(place, slider_rows) or ():
                out.setdefault(row["name"], (place, row))
        return out

    def sliders(self) -> dict[str, Slider]:
        """All named sliders for this checkpoint: directions first, then features."""
        out = {name: Slider(d) for name, d in self.directions.items()}
        for name, (place, row) in self.rows.items():
            if name not in out and (slider := _read_or_skip(place, lambda place, row=row: _slider(place, row))):
                out[name] = slider
        return out

    def slider(self, name: str) -> Slider:
        """The slider `name`: a direction, a named feature of a dictionary, or a latent as `L<site>/<index>`.
        `NAME:OPERATION` gives the slider another operation.

        Errors: UnknownNameError, a UsageError, which lists the known names.
        """
        base, operation = parse_name(name)
        found = self._slider(base)
        return found if operation is None else Slider(found.target, operation, when=found.when, label=name)

    def _slider(self, name: str) -> Slider:
        if name in self.directions:
            return Slider(self.directions[name])
        if name in self.rows:
            return _slider(*self.rows[name])
        if match := LATENT.fullmatch(name):
            return self._latent(int(match[1]), int(match[2]))
        known = [*self.directions, *(n for n in self.rows if n not in self.directions)]
        trait = name if is_name(name) else "TRAIT"
        raise UnknownNameError(
            f"slider {shown(name)}: expected a direction or a feature of that name for {self.model.name}, "
            f"found {', '.join(known) or 'none'}; make it with: steer find {self.model.name} {trait}"
        )

    def _latent(self, site: int, index: int) -> Slider:
        sites = {name: _site(place) for name, place in self.dictionaries.items()}
        for name, place in self.dictionaries.items():
            if sites[name] == site:
                return Slider(Feature.latent(dictionary_at(place), index))
        found = ", ".join(f"{name} at site {at}" for name, at in sites.items()) or "none"
        raise UsageError(
            f"slider 'L{site}/{index}': expected a dictionary for {self.model.name} at site {site}, found {found}; "
            "train one with steer train"
        )


def directions_of(sketch: Sketch) -> dict[str, Direction]:
    """The directions on this machine that were found on the checkpoint with this sketch, by name."""
    out: dict[str, Direction] = {}
    for file in direction_files():
        found = _read_or_skip(file, lambda file: _direction(file, stamp(file)))
        if found is not None and found[0].name not in out and found[1].same_as(sketch):
            out[found[0].name] = found[0]
    return out


def dictionaries_of(sketch: Sketch) -> dict[str, Path]:
    """Directories of the dictionaries that were trained on the checkpoint with this sketch, by name. Only manifests are
    read."""
    out: dict[str, Path] = {}
    for place in dictionary_places():
        found = _read_or_skip(place / MANIFEST, lambda file: _manifest(file, stamp(file)))
        if found is None or found[0] in out or not found[1].same_as(sketch):
            continue
        name, _, directory = found
        if _read_or_skip(directory, _check_exists):
            out[name] = directory
    return out


def register_dictionary(place: Path, name: str, sketch: Sketch) -> None:
    """Make a dictionary findable by name on the checkpoint with this sketch. Dictionaries are large, so it stays where
    it is, and the library stores only its path. A later registration replaces an earlier one of the same name. If the
    library cannot be written, there is a warning."""
    place = place.resolve()
    if place in [p.resolve() for p in dictionaries_of(sketch).values()]:
        return
    folder = own_dictionary_place(sketch, re.sub(r"[^\w-]+", "-", name))
    if (folder / WEIGHTS).is_file():
        return  # a complete dictionary of that name is already in the library
    entry = {"name": name, "place": str(place), "sketch": sketch.to_header()}
    try:
        write_atomic(folder / MANIFEST, json.dumps(entry, indent=1) + "\n")
    except SteerError as e:
        skip(folder, e)  # no error, because the dictionary itself, hours of work, is already saved


def dictionary_at(place: Path) -> Dictionary:
    """The dictionary in a directory. While it is in use and its files are unchanged, the same object is returned."""
    return _load(place, tuple(stamp(place / f) for f in (WEIGHTS, CONFIG, MANIFEST)))


def find_slider(model: Checkpoint, name: str) -> Slider:
    """The slider `name` for this checkpoint, as in `Library.slider`."""
    return Library(model).slider(name)


def find_direction(model: Checkpoint, name: str) -> Direction:
    """The direction `name` for this checkpoint. Errors: UsageError that lists the known directions."""
    known = directions_of(model.sketch())
    if name not in known:
        listing = f"found {', '.join(known)}" if known else "found none"
        raise UsageError(
            f"slider {shown(name)}: expected a direction of that name for {model.name}, {listing}; "
            f"make it with: steer find {model.name} {name if is_name(name) else 'TRAIT'}"
        )
    return known[name]


def _read_or_skip(place: Path, read: Callable[[Path], _T]) -> _T | None:
    """The result of `read(place)`; if it fails, None, with a warning. Any exception counts, because strangers' files
    make libraries raise anything."""
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
    """(name, sketch, directory) of the dictionary of a manifest, or of an entry that `register_dictionary` wrote."""
    manifest = read_manifest(file.parent)
    place = Path(manifest["place"]) if isinstance(manifest.get("place"), str) else file.parent
    return str(manifest.get("name") or file.parent.name), _sketch(manifest), place


def _sketch(provenance: Mapping[str, Any]) -> Sketch:
    """The sketch stored in a library file; an empty one if the file has none."""
    sketch = Sketch.from_header(provenance)
    if provenance.get("sketch", "") != "" and not sketch.values.size:
        raise CheckpointError("sketch: expected bf16 values in base64, found something else; find or train it again")
    return sketch


def _check_exists(place: Path) -> bool:
    if not (place / WEIGHTS).is_file():
        raise CheckpointError(
            f"{place}: expected a dictionary that was used here, found none; if it was moved, name its new "
            "place once: steer find MODEL TRAIT --dictionary DIR"
        )
    return True


def _site(place: Path) -> int | None:
    """The site of a dictionary; one from elsewhere has it only in its config."""
    site = read_manifest(place).get("site")
    return dictionary_at(place).site if site is None else site


_LOADED: WeakValueDictionary[tuple[object, ...], Dictionary] = WeakValueDictionary()
"""Dictionaries in use."""


def _load(place: Path, stamps: tuple[tuple[int, ...], ...]) -> Dictionary:
    found = _LOADED.get((place, stamps))
    if found is None:
        found = _LOADED[place, stamps] = load_dictionary(place)
    return found


def _slider(place: Path, row: dict[str, Any]) -> Slider:
    feature = Feature(row["name"], dictionary_at(place), tuple(row["latents"]), tuple(row["units"]))
    return Slider(feature, row.get("operation", "add"))

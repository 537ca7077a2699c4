"""Finds directions and dictionaries by name for a checkpoint: those made on this machine, and those that ship.

Files belong to a checkpoint if their sketch matches its weights. Chat, server and bakes look up slider names here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from steer.files import write_atomic_json

_T = TypeVar("_T")


class Checkpoint(Protocol):
    """The thing that names are looked up for: a live model, or a checkpoint on disk."""

    @property
    def name(self) -> str: ...
    def sketch(self) -> Sketch: ...
    def library(self) -> Library: ...


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint on disk, to look up names of sliders without loading it."""

    name: str
    found: Sketch

    def sketch(self) -> Sketch:
        """Return the sketch of its weights."""
        return self.found

    def library(self) -> Library:
        """Return what names of sliders mean on it."""
        return Library(self)


def direction_files() -> Iterator[Path]:
    """Every direction file on this machine, the user's first, then those that ship."""
    yield from sorted((home() / "directions").glob("*/*.safetensors"))
    yield from sorted(present(DICTIONARIES).glob("*/directions/*.safetensors"))


def direction_place(sketch: Sketch, name: str) -> Path:
    """File for a direction that was found on the checkpoint with this sketch."""
    return home() / "directions" / sketch.id / f"{name}.safetensors"


def dictionary_place(sketch: Sketch, name: str) -> Path:
    """Directory for a dictionary that was trained on the checkpoint with this sketch."""
    return home() / "dictionaries" / sketch.id / name


class Library:
    """The directions, dictionaries and named sliders for one checkpoint. Each file is read once, so make one Library
    for many look-ups.

    A file that cannot be read is skipped with a warning that names it: it may belong to another checkpoint.
    """

    def __init__(self, model: Checkpoint) -> None:
        self.model = model
        self.fixed: dict[str, str] = {}
        """Sliders that are listed and cannot be moved -> why, and what to do."""

    @cached_property
    def directions(self) -> dict[str, Direction]:
        return directions_of(self.model.sketch())

    @cached_property
    def dictionaries(self) -> dict[str, Path]:
        return dictionaries_of(self.model.sketch())

    @cached_property
    def rows(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Named features: name -> (the dictionary's directory, the row of its sliders.yaml)."""
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
        if base in self.directions:
            found = Slider(self.directions[base])
        elif base in self.rows:
            found = _slider(*self.rows[base])
        elif match := LATENT.fullmatch(base):
            found = self._latent(int(match[1]), int(match[2]))
        else:
            known = dict.fromkeys([*self.directions, *self.rows])
            raise UnknownNameError(
                f"slider {shown(base)}: expected a direction or a feature of that name for {self.model.name}, "
                f"found {', '.join(known) or 'none'}; make it with: steer find {self.model.name} "
                f"{base if is_name(base) else 'TRAIT'}"
            )
        return found if operation is None else Slider(found.target, operation, when=found.when, label=name)

    def _latent(self, site: int, index: int) -> Slider:
        sites = {}
        for name, place in self.dictionaries.items():
            sites[name] = read_manifest(place).get("site")
            if sites[name] is None:  # a dictionary from elsewhere has it only in its config
                found = _read_or_skip(place, dictionary_at)
                sites[name] = found and found.site
            if sites[name] == site:
                return Slider(Feature.latent(dictionary_at(place), index))
        known = ", ".join(f"{name} at site {at}" for name, at in sites.items()) or "none"
        raise UsageError(
            f"slider 'L{site}/{index}': expected a dictionary for {self.model.name} at site {site}, found {known}; "
            "train one with steer train"
        )


def directions_of(sketch: Sketch) -> dict[str, Direction]:
    """The directions on this machine that were found on the checkpoint with this sketch, by name."""
    return {name: direction for name, (direction, _) in placed_directions(sketch).items()}


def placed_directions(sketch: Sketch) -> dict[str, tuple[Direction, Path]]:
    """The same directions with the file of each."""
    out: dict[str, tuple[Direction, Path]] = {}
    for file in direction_files():
        found = _read_or_skip(file, lambda file: _direction(file, stamp(file)))
        if found is not None and found[0].name not in out and found[1].same_as(sketch):
            out[found[0].name] = found[0], file
    return out


def dictionaries_of(sketch: Sketch) -> dict[str, Path]:
    """Directories of the dictionaries that were trained on the checkpoint with this sketch, by name, the user's first.
    Only manifests are read; a directory without one is incomplete and left out."""
    out: dict[str, Path] = {}
    for root in (home() / "dictionaries", present(DICTIONARIES)):
        for manifest in sorted(root.glob(f"*/*/{MANIFEST}")):
            found = _read_or_skip(manifest, lambda file: _manifest(file, stamp(file)))
            if found is None or found[0] in out or not found[1].same_as(sketch):
                continue
            if place := _read_or_skip(found[2], _complete):
                out[found[0]] = place
    return out


def register_dictionary(place: Path, name: str, sketch: Sketch) -> None:
    """Make a dictionary findable by name on the checkpoint with this sketch. It is large, so the library stores only
    its path, in place of an earlier one of the same name. If the library cannot be written, there is a warning."""
    place = place.resolve()
    if place in [p.resolve() for p in dictionaries_of(sketch).values()]:
        return
    folder = dictionary_place(sketch, re.sub(r"[^\w-]+", "-", name))
    if (folder / WEIGHTS).is_file():
        return  # a complete dictionary of that name is already in the library
    entry = {"name": name, "place": str(place), "sketch": sketch.to_header()}
    try:
        write_atomic_json(folder / MANIFEST, entry)
    except SteerError as e:
        skip(folder, e)  # no error, because the dictionary itself, hours of work, is already saved


_LOADED: WeakValueDictionary[tuple[object, ...], Dictionary] = WeakValueDictionary()
"""Dictionaries in use."""


def dictionary_at(place: Path) -> Dictionary:
    """The dictionary in a directory. While it is in use and its files are unchanged, the same object is returned."""
    key = (place, *(stamp(place / f) for f in (WEIGHTS, CONFIG, MANIFEST)))
    found = _LOADED.get(key)
    if found is None:
        found = _LOADED[key] = load_dictionary(place)
    return found


def _read_or_skip(place: Path, read: Callable[[Path], _T]) -> _T | None:
    """The result of `read(place)`; if it fails, None, with a warning. Any exception counts, because strangers' files
    make libraries raise anything."""
    try:
        return read(place)
    except Exception as e:
        skip(place, e)
        return None


def _complete(place: Path) -> Path:
    if not (place / WEIGHTS).is_file():
        raise CheckpointError(
            f"{place}: expected a dictionary that was used here, found none; if it was moved, name its new "
            "place once: steer find MODEL TRAIT --dictionary DIR"
        )
    return place


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


def _slider(place: Path, row: dict[str, Any]) -> Slider:
    feature = Feature(row["name"], dictionary_at(place), tuple(row["latents"]), tuple(row["units"]))
    return Slider(feature, row.get("operation", "add"))

"""A profile: sliders, a sampler preset and notes, in one small YAML file that users exchange.

A profile names its sliders; `steer.model` looks the names up for a checkpoint. Files come from strangers, so every key
and value is checked.
"""

from __future__ import annotations

import difflib
import math
import os
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.sampler import PRESETS, Sampler, preset
from steer.core.schedule import Gate, Part, Schedule
from steer.core.slider import OPERATIONS, Operation, check_amount
from steer.core.small_files import dump_yaml, load_yaml, read_small, shown
from steer.errors import SteerError, UsageError
from steer.files import one_line, write_atomic

SIZE_LIMIT = 1_000_000
"""Largest profile file, in bytes."""

_KEYS = ("name", "notes", "sampler", "sliders")
_SLIDER_KEYS = ("slider", "amount", "operation", "when", "range", "enabled")
_WHEN_KEYS = ("part", "first", "after", "ramp", "while")
_WHILE_KEYS = ("slider", "above", "below")
_SAMPLER_KEYS = tuple(f.name for f in fields(Sampler))
_FILES = ".safetensors"
_NAME_LIMIT = 80


@dataclass(frozen=True)
class ScheduleSpec:
    """When a slider of a profile acts: a `Schedule` whose gate is still a name, to be looked up on a model later."""

    part: Part = "text"
    first: int | None = None
    """Only while the first n tokens of the reply are written."""
    after: int | None = None
    """Only once n tokens of the reply are written."""
    ramp: int | None = None
    """The effect grows evenly over n tokens of the reply, until all of it acts."""
    while_slider: str | None = None
    """Name of a direction or feature. The slider acts only on tokens where its value is above `above` and below
    `below`; one of the two may be None."""
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        Schedule(self.part, self.first, self.after, self.ramp)
        limits = [k for k in ("above", "below") if getattr(self, k) is not None]
        for key in limits:
            object.__setattr__(self, key, _number(f"when: while: {key}", getattr(self, key)))
        if self.while_slider is None and limits:
            raise UsageError(f"when: while: expected a slider beside {limits[0]}, found none; name what is read")
        if self.while_slider is not None:
            _check_text("when: while: slider", self.while_slider)
            if not limits:
                raise UsageError("when: while: expected above, below or both, found neither; give one, such as 0.3")
        if self.above is not None and self.below is not None and not self.above < self.below:
            raise UsageError(f"when: while: expected above < below, found {self.above} and {self.below}")

    @classmethod
    def of(cls, when: Schedule) -> ScheduleSpec | None:
        """The spec of a `Schedule`, its gate by name; None for a schedule that acts on every token."""
        if when.always:
            return None
        spec = cls(when.part, when.first, when.after, when.ramp)
        gate = when.gate
        return spec if gate is None else replace(spec, while_slider=gate.on.name, above=gate.above, below=gate.below)

    def on(self, target: Direction | Feature | None) -> Schedule:
        """The `Schedule`, with `target` (the direction or feature named by `while_slider`) as its gate."""
        gate = None if target is None else Gate(target, self.above, self.below)
        return Schedule(self.part, self.first, self.after, self.ramp, gate)

    def dump(self) -> dict[str, Any]:
        """The spec as written in a file."""
        gate = {"slider": self.while_slider, "above": self.above, "below": self.below}
        out = {"first": self.first, "after": self.after, "ramp": self.ramp, "while": _present(gate) or None}
        return {"part": self.part} | _present(out)


@dataclass(frozen=True)
class ProfileSlider:
    """A slider of a profile: its name, the amount it is set to, and when it acts."""

    slider: str
    """Name of a direction or feature, `L14/123`, or a direction's file (relative to the profile's file)."""
    amount: float
    """In gaps of a direction or units of a feature; for `ablate` a share, for `scale` a factor."""
    operation: Operation | None = None
    """None: the default operation of the slider."""
    when: ScheduleSpec | None = None
    """None: it acts on every token."""
    range: tuple[float, float] | None = None
    """Lowest and highest amount at which replies stay coherent, as measured by `steer calibrate`."""
    enabled: bool = True
    """False: the slider is listed but not applied."""

    def __post_init__(self) -> None:
        _check_text("slider", self.slider)
        if self.operation is not None and self.operation not in OPERATIONS:
            raise UsageError(
                f"operation: expected one of {', '.join(OPERATIONS)}, found {shown(self.operation)}; "
                "leave it out for the slider's own"
            )
        amount = check_amount(self.slider, self.operation or "add", _number("amount", self.amount))
        object.__setattr__(self, "amount", amount)
        if self.range is not None:
            if not isinstance(self.range, list | tuple) or len(self.range) != 2:
                raise UsageError(f"range: expected [LOW, HIGH], found {shown(self.range)}; `steer calibrate` writes it")
            low, high = (_number("range", x) for x in self.range)
            if low > high:
                raise UsageError(f"range: expected [LOW, HIGH] with LOW <= HIGH, found [{low}, {high}]; swap them")
            object.__setattr__(self, "range", (low, high))
        if not isinstance(self.enabled, bool):
            raise UsageError(f"enabled: expected true or false, found {shown(self.enabled)}")

    def dump(self) -> dict[str, Any]:
        """The slider as written in a file."""
        out = {
            "operation": self.operation,
            "when": self.when and self.when.dump(),
            "range": self.range and list(self.range),
            "enabled": None if self.enabled else False,
        }
        return {"slider": self.slider, "amount": self.amount} | _present(out)


@dataclass(frozen=True)
class Profile:
    """A named set of sliders, with the sampler that draws replies.

    Example:
        profile = steer.Profile.load("calm.yaml")
        for slider in profile.sliders:
            print(slider.slider, slider.amount)
    """

    name: str
    notes: str = ""
    """For people: what the profile is for."""
    sampler: Sampler = PRESETS["plain"]
    preset: str | None = "plain"
    """The preset that `sampler` starts from; a file holds the differences from it. None: differences from Sampler's
    defaults."""
    sliders: tuple[ProfileSlider, ...] = ()
    folder: Path | None = field(default=None, compare=False, repr=False)
    """Directory of the profile's file; paths of direction files are relative to it. None: it came from no file."""
    among: Path | None = field(default=None, compare=False, repr=False)
    """The profile's file, if it was found among others in a folder: if broken, it may be skipped with a warning."""

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        if len(self.name) > _NAME_LIMIT or any(c in self.name for c in "/\\@"):
            raise UsageError(
                f"name: expected at most {_NAME_LIMIT} characters without /, \\ and @, found {shown(self.name)}; "
                "rename it"
            )
        _check_text("notes", self.notes, lines=True)
        if self.preset is not None:
            preset(self.preset)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile's YAML file.

        Errors: SteerError for a file that is missing, too large, not YAML, or not a profile.
        """
        path = Path(path)
        raw = load_yaml(read_small(path, SIZE_LIMIT, "a profile"), str(path), "a profile")
        return cls.parse(raw, str(path), path.parent)

    @classmethod
    def parse(cls, data: Any, where: str, folder: Path | None = None) -> Profile:
        """Build a profile from parsed YAML or JSON. `where` begins every error message; optional keys may be null.

        Errors: SteerError that names the key, what was expected and what was found.
        """
        raw = _mapping(data, _KEYS, where, ("name",))
        chosen, base = _sampler(raw.get("sampler"), f"{where}: sampler")
        rows = raw.get("sliders", [])
        if not isinstance(rows, list):
            raise SteerError(f"{where}: sliders: expected a list, found {shown(rows)}; begin each slider with a dash")
        sliders = tuple(_slider(row, f"{where}: sliders[{i}]") for i, row in enumerate(rows))
        return _made(where, cls, raw["name"], raw.get("notes", ""), chosen, base, sliders, folder)

    def dump(self) -> dict[str, Any]:
        """Plain data for YAML or JSON, which `parse` can read."""
        base = Sampler() if self.preset is None else preset(self.preset)
        changed = {k: getattr(self.sampler, k) for k in _SAMPLER_KEYS if getattr(self.sampler, k) != getattr(base, k)}
        named = {} if self.preset is None else {"preset": self.preset}
        sampler = self.preset if named and not changed else named | {k: _lists(v) for k, v in changed.items()}
        out = {"name": self.name, "notes": self.notes or None, "sampler": sampler}
        return _present(out) | {"sliders": [s.dump() for s in self.sliders]}

    def save(self, path: str | Path) -> Path:
        """Write the YAML file, whole or not at all. Paths of direction files are rewritten to reach the same files from
        there. Notes are kept; comments in a replaced file are lost. Errors: SteerError if it cannot be written."""
        path = Path(path)
        return write_atomic(path, dump_yaml(self.in_folder(path.parent).dump()))

    def with_ranges(self, ranges: Mapping[int | str, tuple[float, float]]) -> Profile:
        """The same profile with these ranges. A key is a slider's index in the list or its name.

        Errors: UsageError for a slider that does not exist, or a name that several sliders have.
        """
        sliders = list(self.sliders)
        for key, found in ranges.items():
            at = [i for i, s in enumerate(sliders) if key in (i, s.slider)]
            if len(at) != 1:
                names = ", ".join(s.slider for s in sliders) or "none"
                raise UsageError(
                    f"profile {self.name!r}: expected one slider {key!r}, found {len(at)} among {names}; "
                    "give its place in the list, from 0"
                )
            sliders[at[0]] = replace(sliders[at[0]], range=found)
        return replace(self, sliders=tuple(sliders))

    def file_of(self, slider: str) -> Path | None:
        """The path of the direction file if `slider` (a slider of this profile, or the one that a gate reads) is one;
        None for a name."""
        return (self.folder or Path()) / slider if slider.endswith(_FILES) else None

    def files(self) -> list[str]:
        """All direction files of this profile, as written in it."""
        texts = (t for s in self.sliders for t in (s.slider, s.when and s.when.while_slider) if t)
        return [t for t in texts if t.endswith(_FILES)]

    def in_folder(self, folder: Path) -> Profile:
        """The same profile for a file in another folder: relative paths of direction files are adapted."""

        def moved(text: str) -> str:
            file = self.file_of(text)
            return text if file is None or Path(text).is_absolute() else Path(os.path.relpath(file, folder)).as_posix()

        if self.folder is None or not self.files():
            return replace(self, folder=folder)
        sliders = []
        for s in self.sliders:
            when = s.when
            if when is not None and when.while_slider is not None:
                when = replace(when, while_slider=moved(when.while_slider))
            sliders.append(replace(s, slider=moved(s.slider), when=when))
        return replace(self, sliders=tuple(sliders), folder=folder)


def _sampler(raw: Any, where: str) -> tuple[Sampler, str | None]:
    if raw is None:
        return PRESETS["plain"], "plain"
    if isinstance(raw, str):
        return _made(where, preset, raw), raw
    given = _mapping(raw, ("preset", *_SAMPLER_KEYS), where, ())
    name = given.pop("preset", None)
    if name is not None and not isinstance(name, str):
        raise SteerError(f"{where}: preset: expected one of {', '.join(PRESETS)}, found {shown(name)}")
    base = Sampler() if name is None else _made(where, preset, name)
    return _made(where, lambda: replace(base, **given)), name


def _slider(data: Any, where: str) -> ProfileSlider:
    raw = _mapping(data, _SLIDER_KEYS, where, ("slider", "amount"))
    when = None
    if "when" in raw:
        given = _mapping(raw.pop("when"), _WHEN_KEYS, f"{where}: when", ())
        gate: dict[str, Any] = {}
        if "while" in given:
            gate = _mapping(given.pop("while"), _WHILE_KEYS, f"{where}: when: while", ("slider",))
        when = _made(where, ScheduleSpec, **given, while_slider=gate.pop("slider", None), **gate)
    return _made(where, ProfileSlider, **raw, when=when)


def _mapping(data: Any, keys: tuple[str, ...], where: str, required: tuple[str, ...]) -> dict[str, Any]:
    """Check that `data` is a mapping of known keys. Keys that hold null count as absent."""
    if not isinstance(data, Mapping):
        raise SteerError(f"{where}: expected a mapping with {', '.join(keys)}, found {shown(data)}")
    for key in data:
        if key not in keys:
            similar = difflib.get_close_matches(key[:60], keys, 1) if isinstance(key, str) else []
            do = f"did you mean {similar[0]!r}?" if similar else "take it out"
            raise SteerError(f"{where}: expected keys among {', '.join(keys)}, found {shown(key)}; {do}")
        if isinstance(data[key], int) and data[key].bit_length() > 64:
            raise SteerError(f"{where}: {key}: expected a smaller number, found {shown(data[key])}; mend it")
    out = _present(data)
    for key in required:
        if key not in out:
            raise SteerError(f"{where}: expected {', '.join(required)}, found no {key!r}; add it")
    return out


_T = TypeVar("_T")


def _made(where: str, make: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Call `make`; the message of a UsageError from it is raised as a SteerError that begins with `where`."""
    try:
        return make(*args, **kwargs)
    except UsageError as e:
        raise SteerError(f"{where}: {str(e)[:500]}") from e
    except (OverflowError, ValueError) as e:  # a whole number too large for a float, or too long to print
        raise SteerError(f"{where}: expected numbers of a usual size, found {one_line(e)}; make it smaller") from e


def _number(name: str, value: Any) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        out = float(value) if fine else math.nan
    except OverflowError:
        out = math.inf
    if not math.isfinite(out):
        raise UsageError(f"{name}: expected a finite number, found {shown(value)}; write one such as -0.5 or 1.0e-3")
    return out


def _check_text(name: str, value: Any, lines: bool = False) -> None:
    """Raise UsageError unless `value` is text that every file and terminal can hold; `lines` allows newlines and
    tabs."""
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected text, found {shown(value)}; put it in quotes")
    if not lines and not value.strip():
        raise UsageError(f"{name}: expected text, found none; fill it in")
    for c in value:
        if unicodedata.category(c) in ("Cc", "Cs") and not (lines and c in "\n\t"):
            raise UsageError(f"{name}: expected plain text, found the character {c!a}; take it out")


def _present(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if v is not None}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value

"""A profile: sliders, a sampler preset and notes, in one small YAML file that users exchange.

A profile names its sliders; `steer.model` looks the names up for a checkpoint. Files come from strangers, so every key
and value is checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, model_validator
from pydantic_core import ArgsKwargs, to_jsonable_python

from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.sampler import PRESETS, PresetName, Sampler
from steer.core.schedule import Gate, Part, Schedule
from steer.core.slider import Operation
from steer.core.small_files import dump_yaml, load_yaml, read_small, shown
from steer.core.validation import Bool, Count, Line, Lines, Number, checked, from_file, known_keys
from steer.errors import UsageError
from steer.files import write_atomic

SIZE_LIMIT = 1_000_000
"""Largest profile file, in bytes."""

_FILES = ".safetensors"
_NAME_LIMIT = 80


@checked
class GateSpec:
    """A `Gate` on a direction or feature that is still a name."""

    slider: Line
    """Name of a direction or feature. The gate is open on tokens where its value is above `above` and below `below`."""
    above: Number | None = None
    below: Number | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError("expected above, below or both, found neither; give one, such as 0.3")
        if self.above is not None and self.below is not None and not self.above < self.below:
            raise ValueError(f"expected above < below, found {self.above} and {self.below}")


_Tokens = Annotated[Count, Field(ge=1)]


@checked
class ScheduleSpec:
    """When a slider of a profile acts: a `Schedule` whose gate is still a name, to be looked up on a model later."""

    part: Part = "text"
    first: _Tokens | None = None
    """Only while the first n tokens of the reply, or of that part of it, are written."""
    after: Count | None = None
    """Only once n tokens of the reply, or of that part of it, are written."""
    ramp: _Tokens | None = None
    """The effect grows evenly over n tokens of the reply or part, until all of it acts."""
    gate: Annotated[GateSpec | None, Field(alias="while")] = None

    def __post_init__(self) -> None:
        if self.first is not None and self.after is not None and self.first <= self.after:
            raise ValueError(f"expected first > after, found first {self.first} and after {self.after}")

    @classmethod
    def of(cls, when: Schedule) -> ScheduleSpec | None:
        """The spec of a `Schedule`, its gate by name; None for a schedule that acts on every token."""
        gate = when.gate and GateSpec(when.gate.on.name, when.gate.above, when.gate.below)
        return None if when.always else cls(when.part, when.first, when.after, when.ramp, gate)

    def on(self, target: Direction | Feature | None) -> Schedule:
        """The `Schedule`, with `target` (the direction or feature that the gate names) as its gate."""
        gate = Gate(target, self.gate.above, self.gate.below) if target is not None and self.gate is not None else None
        return Schedule(self.part, self.first, self.after, self.ramp, gate)


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"expected [LOW, HIGH] with LOW <= HIGH, found {list(ends)}; swap them")
    return ends


@checked
class ProfileSlider:
    """A slider of a profile: its name, the amount it is set to, and when it acts."""

    slider: Line
    """Name of a direction or feature, `L14/123`, or a direction's file (relative to the profile's file)."""
    amount: Number
    """In gaps of a direction or units of a feature; for `ablate` a share, for `scale` a factor."""
    operation: Operation | None = None
    """None: the default operation of the slider."""
    when: ScheduleSpec | None = None
    """None: it acts on every token."""
    range: Annotated[tuple[Number, Number], AfterValidator(_ordered)] | None = None
    """Lowest and highest amount at which replies stay coherent, as measured by `steer calibrate`."""
    enabled: Bool = True
    """False: the slider is listed but not applied."""

    def __post_init__(self) -> None:
        if self.operation == "ablate" and not 0 <= self.amount <= 1:
            raise ValueError(f"slider {self.slider!r}: ablate takes an amount from 0 to 1, found {self.amount}")


_SLIDERS = TypeAdapter(tuple[ProfileSlider, ...])


def _short_name(name: str) -> str:
    if len(name) > _NAME_LIMIT or any(c in name for c in "/\\@"):
        expected = f"at most {_NAME_LIMIT} characters without /, \\ and @"
        raise ValueError(f"expected {expected}, found {shown(name)}; rename it")
    return name


@checked
class Profile:
    """A named set of sliders, with the sampler that draws replies.

    Example:
        profile = steer.Profile.load("calm.yaml")
        for slider in profile.sliders:
            print(slider.slider, slider.amount)
    """

    name: Annotated[Line, AfterValidator(_short_name)]
    notes: Lines = ""
    """For people: what the profile is for."""
    sampler: Sampler = PRESETS["plain"]
    preset: PresetName | None = "plain"
    """The preset that `sampler` starts from; a file holds the differences from it. None: differences from Sampler's
    defaults."""
    sliders: tuple[ProfileSlider, ...] = ()
    folder: Path | None = field(default=None, compare=False, repr=False)
    """Directory of the profile's file; paths of direction files are relative to it. None: it came from no file."""
    among: Path | None = field(default=None, compare=False, repr=False)
    """The profile's file, if it was found among others in a folder: if broken, it may be skipped with a warning."""

    @model_validator(mode="before")
    @classmethod
    def from_mapping(cls, data: Any) -> Any:
        """The arguments for a profile as a file has it: `sampler` is a preset, or fields that differ from one."""
        if isinstance(data, ArgsKwargs | cls):
            return data
        raw = known_keys(data, ("name", "notes", "sampler", "sliders"))
        given = raw.get("sampler", "plain")
        if isinstance(given, str):
            given = {"preset": given}
        given = known_keys(given, ("preset", *vars(PRESETS["plain"])), "sampler: ")
        chosen = given.pop("preset", None)
        if chosen not in (None, *PRESETS):
            raise ValueError(f"sampler: preset: expected one of {', '.join(PRESETS)}, found {shown(chosen)}")
        return raw | {"sampler": vars(_base(chosen)) | given, "preset": chosen}

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
        return replace(from_file(cls, data, where), folder=folder)

    def dump(self) -> dict[str, Any]:
        """Plain data for YAML or JSON, which `parse` can read."""
        base = _base(self.preset)
        sampler = {k: v for k, v in vars(self.sampler).items() if v != getattr(base, k)}
        if self.preset is not None:
            sampler = {"preset": self.preset, **sampler} if sampler else self.preset
        notes = {"notes": self.notes} if self.notes else {}
        sliders = _SLIDERS.dump_python(self.sliders, mode="json", by_alias=True, exclude_defaults=True)
        return {"name": self.name, **notes, "sampler": to_jsonable_python(sampler), "sliders": sliders}

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
        texts = (t for s in self.sliders for t in (s.slider, s.when and s.when.gate and s.when.gate.slider) if t)
        return [t for t in texts if t.endswith(_FILES)]

    def in_folder(self, folder: Path) -> Profile:
        """The same profile for a file in another folder: relative paths of direction files are adapted."""

        def moved(text: str) -> str:
            file = self.file_of(text)
            return text if file is None or Path(text).is_absolute() else Path(os.path.relpath(file, folder)).as_posix()

        if self.folder is None:
            return replace(self, folder=folder)
        sliders = []
        for s in self.sliders:
            when = s.when
            if when is not None and when.gate is not None:
                when = replace(when, gate=replace(when.gate, slider=moved(when.gate.slider)))
            sliders.append(replace(s, slider=moved(s.slider), when=when))
        return replace(self, sliders=tuple(sliders), folder=folder)


def _base(name: PresetName | None) -> Sampler:
    return Sampler() if name is None else PRESETS[name]

"""Profiles on a model: look up the names in a profile, set its sliders, and write sliders back as a profile.

`core.profile` reads and writes the file; this module needs a checkpoint to know what the names mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from steer.checkpoint.library import Checkpoint, Library
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import PRESETS, PresetName, Sampler
from steer.core.schedule import ALWAYS
from steer.core.slider import Slider
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.model.sliders import Sliders


def sliders_in(model: Checkpoint, profile: Profile) -> list[tuple[Slider, ProfileSlider]]:
    """(slider, entry) for each entry of a profile, in its order; no two sliders have the same name.

    Errors: UsageError for a name that is unknown on this checkpoint, SteerError for a file that is not a direction.
    """
    out: list[tuple[Slider, ProfileSlider]] = []
    names: set[str] = set()
    library = model.library()
    for entry in profile.sliders:
        with _named(profile):
            found = _slider(library, profile, entry.slider)
            operation = entry.operation or found.operation
            label = base = found.name if entry.operation in (None, found.operation) else f"{found.name}:{operation}"
            number = 1
            while label in names:
                label = f"{base} ({(number := number + 1)})"
            names.add(label)
            gate = None if entry.when is None else entry.when.gate
            on = None if gate is None else _slider(library, profile, gate.slider).target
            when = ALWAYS if entry.when is None else entry.when.on(on)
            slider = Slider(found.target, operation, when=when, label=label)
            slider.check(entry.amount)
        out.append((slider, entry))
    return out


def edit_of(model: Checkpoint, profile: Profile) -> Edit | None:
    """The enabled entries of a profile as one Edit; None when it moves nothing. Errors: as `sliders_in`."""
    found = sliders_in(model, profile)
    with _named(profile):
        return Edit.of([slider.at(entry.amount) for slider, entry in found if entry.enabled])


def use(sliders: Sliders, profile: Profile) -> None:
    """Set the profile's enabled sliders and delete all others, from the next token on. Errors: as `sliders_in`."""
    found = sliders_in(sliders.model, profile)
    amounts = {slider.name: entry.amount for slider, entry in found if entry.enabled}
    with _named(profile):
        sliders.replace(amounts, [slider for slider, _ in found])
    for slider, entry in found:
        # A slider of the same name may have had a range, from another profile.
        sliders.ranges.pop(slider.name, None)
        if entry.range is not None:
            sliders.ranges[slider.name] = entry.range


@contextmanager
def _named(profile: Profile) -> Iterator[None]:
    """Errors inside begin with the profile's name."""
    try:
        yield
    except SteerError as e:
        raise type(e)(f"profile {profile.name!r}: {e}") from e


def _slider(library: Library, profile: Profile, text: str) -> Slider:
    file = profile.file_of(text)
    return library.slider(text) if file is None else Slider(Direction.load(file))


def as_profile(name: str, sliders: Sliders, sampler: Sampler) -> Profile:
    """The current amounts of sliders, and a sampler, as a profile to save.

    Errors: UsageError for a gate on a direction or feature that cannot be found by a name.
    """
    entries = []
    for label, amount in sliders.items():
        slider = sliders.slider(label)
        when = ScheduleSpec.of(slider.when)
        default = sliders.model.library().slider(slider.target.name).operation
        operation = None if slider.operation == default else slider.operation
        entries.append(ProfileSlider(slider.target.name, amount, operation, when, sliders.ranges.get(label)))
    free = {"seed": sampler.seed, "max_new_tokens": sampler.max_new_tokens}
    preset: PresetName | None = next((n for n, p in PRESETS.items() if replace(p, **free) == sampler), None)
    return Profile(name, sampler=sampler, preset=preset, sliders=tuple(entries))

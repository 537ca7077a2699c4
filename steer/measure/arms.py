"""The arms of an evaluation in this process: checkpoints, each as it is, under sliders, or damaged on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.fetch import fetch, resolve
from steer.checkpoint.library import Checkpoint, Library, OnDisk
from steer.checkpoint.sketch import sketch_files
from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.profile import Profile, ProfileSlider
from steer.core.slider import Slider
from steer.measure.damage import FACTOR, SAFE_SHARE, damages
from steer.measure.readers import LocalReader
from steer.model.loading import release_memory
from steer.model.profiles import edit_of
from steer.model.steered import SteeredModel, load

Load = Callable[[], SteeredModel]
FindEdit = Callable[[Checkpoint], Edit | None]
"""Looks up sliders on a checkpoint."""


class Source:
    """A checkpoint that arms are made of. At most one is in memory: `Loader` lets go of the one before."""

    def __init__(self, loader: Loader, model: str | Path | SteeredModel) -> None:
        """`model`: a directory, a hub id, the default model's name, or a model that is loaded already.

        Errors: CheckpointError when there is no such model.
        """
        self.loader = loader
        self.live = model if isinstance(model, SteeredModel) else None
        self.place = None if isinstance(model, SteeredModel) else fetch(resolve(model))
        self.name = Path(model.name if isinstance(model, SteeredModel) else str(model)).name or "model"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, to look up names of sliders without loading it."""
        if self.live is not None:
            return self.live
        assert self.place is not None
        return OnDisk(self.name, sketch_files(self.place))

    @cached_property
    def key(self) -> dict[str, Any]:
        """What its figures depend on: its files' hashes, or the sketch of a model that is loaded already."""
        loaded = {k: str(v) for k, v in sorted(self.loader.options.items()) if v}
        if self.live is not None:
            return {"sketch": self.live.sketch().id, "dtype": str(self.live.hf.dtype),
                    "template": self.live.tokenizer.chat_template}  # fmt: skip
        assert self.place is not None
        files = [p for p in sorted(self.place.iterdir()) if p.suffix in _FILES and not p.name.startswith(".")]
        template = chosen_template(self.loader.options.get("chat_template"))
        return {"files": {p.name: hash_file(p) for p in files}, "template": template, **loaded}

    def load(self, damage: str | None = None) -> SteeredModel:
        """Return the model in memory, damaged or whole."""
        return self.live or self.loader.load(self, damage)


_FILES = (".safetensors", ".json", ".jinja", ".model")
"""Files of a checkpoint that its figures depend on. Cards and certificates of a bake are text about it."""


@dataclass
class Loader:
    """Loads models, and lets go of one before it loads the next."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `steer.load`."""
    _loaded: tuple[Source, str | None, SteeredModel] | None = None

    def load(self, source: Source, damage: str | None) -> SteeredModel:
        """Return a source's model with the damage of that name done to it."""
        if self._loaded is None or self._loaded[:2] != (source, damage):
            self._loaded = None
            release_memory()
            model = load(source.place or source.name, **self.options)
            model.name = source.name
            if damage is not None:
                damages()[damage](model)
            self._loaded = source, damage, model
        return self._loaded[2]


@dataclass(eq=False)
class LocalArm:
    """A checkpoint under an edit, or damaged: an `evaluation.Arm`."""

    name: str
    about: str
    source: Source
    find_edit: FindEdit = lambda _: None
    damage: str | None = None
    control: bool = False

    @cached_property
    def edit(self) -> Edit | None:
        """The sliders at their amounts. Errors: SteerError for a name that the checkpoint does not know."""
        return self.find_edit(self.source.checkpoint)

    @property
    def key(self) -> dict[str, Any]:
        return {"source": self.source.key, "edit": edit_key(self.edit), "damage": self.damage}

    def reader(self) -> LocalReader:
        return LocalReader(self.source.load(self.damage), self.edit, self.name)


def edit_of_amounts(amounts: Mapping[str, float]) -> FindEdit:
    """Return what finds the edit of amounts by name."""

    def find(checkpoint: Checkpoint) -> Edit | None:
        library = Library(checkpoint)
        return Edit.of([library.slider(name).at(amount) for name, amount in amounts.items()])

    return find


def edit_of_profile(profile: Profile) -> FindEdit:
    """Return what finds the edit of a profile's sliders."""
    return lambda checkpoint: edit_of(checkpoint, profile)


def damaged_arms(source: Source, first: LocalArm, profiles: Sequence[Profile] = ()) -> list[LocalArm]:
    """Return arms of the first model that every probe should detect: damaged weights, and a slider far too far.

    That is the first slider of `profiles` with a calibrated range, or else any direction of the model, `FACTOR` times
    as far as is safe.
    """
    arms = [
        LocalArm(name, f"{source.name}, damaged on purpose: {name}", source, first.find_edit, damage=name, control=True)
        for name in damages()
    ]
    profile = _too_far(profiles) or _too_far_anywhere(source)
    if profile is not None:
        name = ", ".join(f"{s.slider} {s.amount:+g}" for s in profile.sliders)
        about = f"{source.name}, slider {name}: {FACTOR} times as far as is safe"
        arms.append(LocalArm(name, about, source, edit_of_profile(profile), control=True))
    return arms


def _too_far(profiles: Sequence[Profile]) -> Profile | None:
    """A profile with the first calibrated slider alone, too far to the side on which more is safe."""
    for profile in profiles:
        for slider in profile.sliders:
            if slider.range is not None and slider.operation in (None, "add"):
                amount = round(FACTOR * max(slider.range, key=abs), 2)
                return replace(profile, sliders=(replace(slider, amount=amount, enabled=True),))
    return None


def _too_far_anywhere(source: Source) -> Profile | None:
    """A profile with a direction that `source` knows, too far away from its trait."""
    direction = next(iter(Library(source.checkpoint).directions.values()), None)
    if direction is None or direction.share(1.0) <= 0:
        return None
    amount = round(-FACTOR * SAFE_SHARE / direction.share(1.0), 2)
    return Profile("too far", sliders=(ProfileSlider(direction.name, amount),))


def edit_key(edit: Edit | None) -> list[dict[str, Any]] | None:
    """Return what an edit does, as JSON: equal for edits that do the same."""
    return None if edit is None else [_move_key(m) for m in edit.moves]


def _move_key(move: Slider) -> dict[str, Any]:
    gate, target = move.when.gate, move.target
    direction = target if isinstance(target, Direction) else target.direction
    return {
        "slider": move.describe(),
        "vector": hashlib.sha256(direction.vector.double().cpu().numpy().tobytes()).hexdigest()[:16],
        "coefficients": [[str(x) for x in row] for row in move.coefficients],
        "window": [str(x) for x in move.when.window],
        "gate": gate and [gate.on.name, gate.on.site, gate.above, gate.below],
    }

"""`steer bake`: from names of directions, or a profile, to a checked Edit and what is written of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steer.errors import UsageError
from steer.live.library import directions_of, own_place
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.lists import as_list
from steer.values.method import PLAIN, Kernel, Method, Projection, Strengths
from steer.values.move import Move
from steer.values.profile import Profile
from steer.values.trait import Trait, shipped_traits
from steer.weights.anatomy import Anatomy
from steer.weights.bakeable import FORMS, Form, Verdict, bakeable, check_bakeable
from steer.weights.certify import Certificate
from steer.weights.fetch import resolve
from steer.weights.sketch import Sketch, sketch_files
from steer.weights.staging import check_output
from steer.weights.stream import CheckpointFiles

Named = Direction | str | Path
"""A Direction, a file that holds one, or the name of one."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class HowToAblate:
    """How directions are taken out, where not plainly, from every writer, at once."""

    strength: float = 1.0
    """Share of the directions that goes, up to 1."""
    blocks: tuple[int, int] | None = None
    """First and last block whose writers are edited; None: every writer, the embedding included."""
    strengths: Strengths | None = None
    """Strengths by kind of writer, constant or by a kernel, in place of `strength`."""
    method: Projection = "plain"
    """What the directions are made orthogonal to first: nothing, or neutral means."""
    norm_preserving: bool = False
    """Whether each column of a weight keeps its norm."""
    neutral: Path | None = None
    """A file of neutral means, measured into it where it is not there yet; by default one beside the directions."""

    def check(self) -> None:
        """Raise UsageError for what no edit can be: looking for a direction may take minutes."""
        probe = Direction("probe", 0, torch.ones(1))
        Edit((probe,), self.strength, self.blocks, strengths=self.strengths)
        Method(self.method, self.norm_preserving, None if self.method == "plain" else torch.ones(1, 1))
        if self.neutral is not None and self.method == "plain":
            raise UsageError("--neutral: expected --method projected or biprojected beside it, found plain")

    def applied(self, edit: Edit, place: Path, sketch: Sketch, *, force: bool) -> Edit:
        """The edit, its directions taken out in this way. Measures neutral means where they are needed and missing."""
        if not edit.ablate:
            if self != HowToAblate():
                raise UsageError(
                    "--strength, --blocks, --method and the like: expected something to ablate, found none"
                )
            return edit
        method = PLAIN
        if self.method != "plain":
            from steer.neutral import neutral_for

            method = Method(self.method, self.norm_preserving, neutral_for(place, sketch, self.neutral, force=force))
        elif self.norm_preserving:
            method = Method(norm_preserving=True)
        strength = edit.strength if self.strength == 1.0 else self.strength
        return replace(edit, strength=strength, blocks=self.blocks, strengths=self.strengths, method=method)


def bake(
    source: str | Path,
    out: str | Path,
    *,
    ablate: Named | Sequence[Named] = (),
    add: Mapping[Any, float] | None = None,
    profile: Profile | str | Path | None = None,
    form: Form = "checkpoint",
    force: bool = False,
    command: str | None = None,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> Certificate:
    """Write a checkpoint with directions removed from its weights, and amounts added as biases; or, by `form`, the
    same as an adapter, or what is added as a control vector.

    `ablate`, one or several, is removed from every writer, embedding included; `how` has the fields of `HowToAblate`.
    `add` maps directions to amounts. A `profile` stands in place of both; all that it has which cannot be baked is told
    at once. `say` is told the plan before anything is written. Streams: memory stays near the largest tensor.
    Errors: SteerError and its kinds, one line each; `out` is complete or absent.
    """
    out, ablate = Path(out), as_list(ablate)
    check_output(out)
    if form not in FORMS:
        raise UsageError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
    way = HowToAblate(**how)
    way.check()
    if profile is not None and (ablate or add):
        raise UsageError("profile: expected no ablate or add beside it; put them into the profile")
    place = checkpoint_dir(source)
    if profile is not None:
        edit = profile_edit(place, profile, form, force=force, say=say)
        sketch = sketch_files(place)
    else:
        found = locate(place, [*ablate, *(add or {})], force=force)
        added = [(found[d], amount) for d, amount in (add or {}).items()]
        edit = Edit(tuple(d for name in ablate for d in found[name]), add=tuple((d, a) for ds, a in added for d in ds))
        sketch = sketch_files(place)
    return write(place, out, way.applied(edit, place, sketch, force=force), form, command, say, progress)


def write(
    place: Path,
    out: Path,
    edit: Edit,
    form: Form = "checkpoint",
    command: str | None = None,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write an edit in any form, after telling the plan. Errors: as `bake`."""
    check_bakeable(verdicts_on(edit.as_moves(), place, form), str(place))
    if form == "gguf":
        from steer.weights.control_vector import bake_control_vector as run
    elif form == "adapter":
        from steer.weights.adapter import AdapterPlan
        from steer.weights.adapter import bake_adapter as run

        say(AdapterPlan.of(place, edit).summary())
    else:
        from steer.weights.bake import bake as run
        from steer.weights.plan import Plan
        from steer.weights.quantised import dequantised

        say(Plan.of(dequantised(CheckpointFiles.open(place)), edit).summary())
    return run(place, out, edit, command=command, progress=progress)


def profile_edit(
    place: Path,
    profile: Profile | str | Path,
    form: Form = "checkpoint",
    *,
    force: bool = False,
    say: Say = lambda line: None,
) -> Edit:
    """What a profile's sliders do, as an edit of the checkpoint at `place`; `say` is told what becomes of each.

    Errors: UsageError for a name that means nothing there or a profile that moves nothing, MismatchError for a
    direction of another checkpoint unless `force`, UnsupportedError naming every slider that cannot be baked.
    """
    from steer.live.profiles import sliders_in

    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    sketch = sketch_files(place)
    found = [(slider, entry) for slider, entry in sliders_in(OnDisk(str(place), sketch), profile) if entry.enabled]
    for slider, _ in found:
        target = slider.target
        if isinstance(target, Direction) and not force:
            sketch.check(target.name, target.provenance, str(place))
    moves = [slider.at(entry.amount) for slider, entry in found]
    verdicts = verdicts_on(moves, place, form)
    check_bakeable(verdicts, f"profile {profile.name!r}")
    edit = Edit.of(moves)
    if edit is None:
        raise UsageError(f"profile {profile.name!r}: nothing to bake, expected a slider that moves, found none")
    say("\n".join([f"profile {profile.name}:", *(f"  {v}" for v in verdicts)]))
    return edit


def verdicts_on(moves: Sequence[Move], place: Path, form: Form = "checkpoint") -> list[Verdict]:
    """What of these moves can be baked into the checkpoint at `place`, move by move."""
    return bakeable(moves, form, Anatomy.of(CheckpointFiles.open(place).config, str(place)))


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint that names are looked up for, without loading it."""

    name: str
    found: Sketch

    def sketch(self) -> Sketch:
        """Of its weights."""
        return self.found


def checkpoint_dir(source: str | Path) -> Path:
    """The directory of a checkpoint on disk. Errors: UsageError for a hub id that is not here yet."""
    place = Path(resolve(source))
    if not place.is_dir():
        raise UsageError(f"{source}: expected a checkpoint on disk, found a hub id; run: steer fetch {source}")
    return place


def locate(place: Path, named: Sequence[Named], *, force: bool = False) -> dict[Named, tuple[Direction, ...]]:
    """The directions for the checkpoint at `place`, checked to belong to it; a control vector (.gguf) may have several.

    A trait's name without a direction at hand is found first, which loads the model and keeps the result; that
    waits until all the others are known to be good.
    Errors: UsageError for an unknown name, MismatchError for a direction of another checkpoint.
    """
    sketch = sketch_files(place)
    known = directions_of(sketch)
    out: dict[Named, tuple[Direction, ...]] = {}
    missing: list[str] = []
    for name in named:
        if isinstance(name, str | Path) and str(name).endswith(".gguf"):
            from steer.weights.control_vector import load_control_vector

            out[name] = tuple(load_control_vector(name).values())
            continue
        if isinstance(name, str) and not name.endswith(".safetensors"):
            if name in known:
                out[name] = (known[name],)
            else:
                _check_trait(name)
                missing.append(name)
            continue
        direction = name if isinstance(name, Direction) else Direction.load(name)
        if not force:
            sketch.check(direction.name, direction.provenance, str(place))
        out[name] = (direction,)
    return out | {name: (find_and_keep(place, name, sketch),) for name in missing}


def _check_trait(name: str) -> None:
    if name not in shipped_traits() and not name.endswith((".yaml", ".yml")):
        raise UsageError(
            f"unknown trait {name!r}: expected one of {', '.join(shipped_traits())}, a direction's file "
            "(.safetensors, or a control vector's .gguf) or a trait of your own (.yaml)"
        )
    Trait.load(name)


def find_and_keep(place: Path, trait: str, sketch: Sketch) -> Direction:
    """Find a trait's direction and keep it where it is looked for by name."""
    from steer.finding import find
    from steer.live.model import load

    direction = find(load(place), trait)
    direction.save(own_place(sketch, direction.name))
    return direction


def parse_strength(text: str, what: str) -> float | Kernel:
    """`0.8`, or `PEAK,WIDTH,FLOOR[,HEIGHT]` for a kernel over blocks. Errors: UsageError."""
    try:
        numbers = [float(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) not in (3, 4):
        raise UsageError(
            f"{what}: expected a number, or PEAK,WIDTH,FLOOR[,HEIGHT] as in 14,6,0,0.8, found {text!r}; "
            "peak and width are in blocks"
        )
    return Kernel(*numbers)

"""`steer bake`: from names of directions, or a profile, to a checked Edit, and to the files that are written from it.

`bake` is the public function (`steer.bake`). It finds the directions, builds the Edit, refuses what cannot be baked,
and calls a writer of `steer.baking` (checkpoint, adapter or control vector).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steer.baking.bake import bake as bake_edit
from steer.baking.certificate import FORMS, Certificate, Form
from steer.baking.control_vector import load_control_vector
from steer.baking.plan import bakeable, check_bakeable, check_mtp
from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.fetch import resolve
from steer.checkpoint.library import OnDisk, direction_place, directions_of
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.sketch import Sketch, sketch_files
from steer.checkpoint.staging import check_output
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.lists import as_list
from steer.core.method import PLAIN, Kernel, Method, Projection, Strengths
from steer.core.profile import Profile
from steer.core.trait import Trait, shipped_traits
from steer.errors import UsageError

Named = Direction | str | Path
"""A Direction, the path of a file that holds one, or the name of one."""
Say = Callable[[str], None]
"""Called with each line of the plan."""


@dataclass(frozen=True)
class HowToAblate:
    """Options of ablation. The defaults remove the directions wholly and plainly from every writer."""

    strength: float = 1.0
    """Share of the directions that is removed, up to 1. Less changes the model less, and removes less of the trait."""
    blocks: tuple[int, int] | None = None
    """First and last block whose writers are edited; None for every writer, including the embedding."""
    strengths: Strengths | None = None
    """Strengths for attention and for MLPs, constant or a kernel over blocks, in place of `strength`."""
    method: Projection = "plain"
    """What the directions are made orthogonal to first: nothing (`plain`), or neutral means, which spares what ordinary
    text needs (`projected`, `biprojected`)."""
    norm_preserving: bool = False
    """Whether each column of a weight keeps its norm."""
    neutral: Path | None = None
    """A file of neutral means. If it does not exist, the means are measured and written to it. By default a file beside
    the directions."""

    def check(self) -> None:
        """Raise UsageError for options that no edit can have, before a direction is looked for, which takes minutes."""
        probe = Direction("probe", 0, torch.ones(1))
        Edit((probe,), self.strength, self.blocks, strengths=self.strengths)
        Method(self.method, self.norm_preserving, None if self.method == "plain" else torch.ones(1, 1))
        if self.neutral is not None and self.method == "plain":
            raise UsageError("--neutral: expected --method projected or biprojected beside it, found plain")

    def applied(self, edit: Edit, place: Path, sketch: Sketch, *, force: bool) -> Edit:
        """Return the edit with these options. Measures neutral means if they are needed and do not exist."""
        if not edit.ablate:
            if self != HowToAblate():
                raise UsageError(
                    "--strength, --blocks, --method and the like: expected something to ablate, found none"
                )
            return edit
        method = Method(norm_preserving=True) if self.norm_preserving else PLAIN
        if self.method != "plain":
            from steer.measure.neutral_means import neutral_for

            method = Method(self.method, self.norm_preserving, neutral_for(place, sketch, self.neutral, force=force))
        strength = edit.strength if self.strength == 1.0 else self.strength
        return Edit(edit.ablate, strength, self.blocks, edit.add, edit.others, method, self.strengths)


def bake(
    source: str | Path,
    out: str | Path,
    *,
    ablate: Named | Sequence[Named] = (),
    add: Mapping[Any, float] | None = None,
    profile: Profile | str | Path | None = None,
    form: Form = "checkpoint",
    edit_mtp: bool = False,
    force: bool = False,
    chat_template: str | Path | None = None,
    command: str | None = None,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> Certificate:
    """Write a checkpoint with directions removed from its weights and amounts added as biases; return its certificate.

    `source`: a checkpoint on disk, or a hub id that is fetched already. `out`: a new directory, complete or absent
    afterwards. `ablate`: one or several directions, removed from every writer, including the embedding; a trait without
    a known direction is found first. `add`: direction -> amount, written as a bias. `profile`: sliders in place of
    both; all sliders that cannot be baked are named in one error. `form`: `checkpoint`, `adapter` (a PEFT LoRA) or
    `gguf` (for llama.cpp: a LoRA for each ablation, a control vector of all shifts). `edit_mtp`: also edit layers
    for multi-token prediction that have the shape of a block, which pass through otherwise; only a checkpoint has them.
    `force`: accept a direction that was found on another checkpoint. `chat_template`: as in `steer.load`; it is written
    beside what is baked. `command`: the command line, for the certificate. `say`: called with the plan before anything
    is written. `progress`: called with bytes done and bytes in all. `how`: fields of `HowToAblate`.

    Tensors are streamed, so memory stays near the size of the largest one.
    Errors: SteerError and its subclasses, one line each.

        certificate = steer.bake("merged", "calm", ablate="moralizing", strength=0.8)
        steer.bake("merged", "calm-adapter", add={"moralizing": -1.0}, form="adapter")
    """
    out, ablate = Path(out), as_list(ablate)
    check_output(out)
    if form not in FORMS:
        raise UsageError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
    ablation = HowToAblate(**how)
    ablation.check()
    if profile is not None and (ablate or add):
        raise UsageError("profile: expected no ablate or add beside it; put them into the profile")
    place = checkpoint_dir(source)
    if edit_mtp:
        check_mtp_of(place, form)
    sketch = sketch_files(place)
    if profile is not None:
        edit = _profile_edit(place, sketch, profile, form, force, say)
    else:
        found = _locate(place, sketch, [*ablate, *(add or {})], force)
        added = [(d, amount) for name, amount in (add or {}).items() for d in found[name]]
        edit = Edit(tuple(d for name in ablate for d in found[name]), add=tuple(added))
    edit = ablation.applied(edit, place, sketch, force=force)
    return bake_edit(
        place, out, edit, form, edit_mtp=edit_mtp, chat_template=chat_template, command=command, say=say,
        progress=progress,
    )  # fmt: skip


def check_mtp_of(place: Path, form: Form) -> None:
    """Raise UsageError or UnsupportedError if a bake of this form cannot edit layers for multi-token prediction of the
    checkpoint, before anything that takes long."""
    files = dequantised(CheckpointFiles.open(place))
    anatomy = Anatomy.of(files.config, str(place))
    check_mtp(anatomy.find(files.config, files.tensors), form, anatomy)


def checkpoint_dir(source: str | Path) -> Path:
    """Return the directory of a checkpoint on disk. Errors: UsageError for a hub id that is not fetched yet."""
    place = Path(resolve(source))
    if not place.is_dir():
        raise UsageError(f"{source}: expected a checkpoint on disk, found a hub id; run: steer fetch {source}")
    return place


def _profile_edit(
    place: Path, sketch: Sketch, profile: Profile | str | Path, form: Form, force: bool, say: Say
) -> Edit:
    """Return the effect of a profile's sliders as an edit. `say` is called with a line on how each of them is baked.

    Errors: UsageError for a name that the checkpoint does not have or a profile that moves nothing, MismatchError for a
    direction of another checkpoint unless `force`, UnsupportedError naming every slider that cannot be baked.
    """
    from steer.model.profiles import sliders_in

    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    found = [(slider, entry) for slider, entry in sliders_in(OnDisk(str(place), sketch), profile) if entry.enabled]
    for slider, _ in found:
        if isinstance(slider.target, Direction) and not force:
            sketch.check(slider.target.name, slider.target.provenance, str(place))
    moves = [slider.at(entry.amount) for slider, entry in found]
    verdicts = bakeable(moves, form, Anatomy.of(CheckpointFiles.open(place).config, str(place)))
    check_bakeable(verdicts, f"profile {profile.name!r}")
    edit = Edit.of(moves)
    if edit is None:
        raise UsageError(f"profile {profile.name!r}: nothing to bake, expected a slider that moves, found none")
    say("\n".join([f"profile {profile.name}:", *(f"  {v}" for v in verdicts)]))
    return edit


def _locate(place: Path, sketch: Sketch, named: Sequence[Named], force: bool) -> dict[Named, tuple[Direction, ...]]:
    """Return name -> directions for the checkpoint at `place`, checked to belong to it.

    Each name has one direction, except a control vector (.gguf), which may hold several. If a trait has no direction
    yet, the model is loaded to find it, and the result is saved; that happens after all other names are checked.
    Errors: UsageError for an unknown name, MismatchError for a direction of another checkpoint unless `force`.
    """
    known = directions_of(sketch)
    out: dict[Named, tuple[Direction, ...]] = {}
    missing: list[str] = []
    for name in named:
        if isinstance(name, str | Path) and str(name).endswith(".gguf"):
            out[name] = tuple(load_control_vector(name).values())
        elif not isinstance(name, str) or name.endswith(".safetensors"):
            direction = name if isinstance(name, Direction) else Direction.load(name)
            if not force:
                sketch.check(direction.name, direction.provenance, str(place))
            out[name] = (direction,)
        elif name in known:
            out[name] = (known[name],)
        elif name in shipped_traits() or name.endswith((".yaml", ".yml")):
            Trait.load(name)
            missing.append(name)
        else:
            raise UsageError(
                f"unknown trait {name!r}: expected one of {', '.join(shipped_traits())}, a direction's file "
                "(.safetensors, or a control vector's .gguf) or your own trait (.yaml)"
            )
    for name in missing:
        from steer.finding.traits import find
        from steer.model.steered import load

        direction = find(load(place), name)
        direction.save(direction_place(sketch, direction.name))
        out[name] = (direction,)
    return out


def parse_strength(text: str, what: str) -> float | Kernel:
    """Parse a number, or `PEAK,WIDTH,FLOOR[,HEIGHT]` as a kernel over blocks. `what`: the option, for errors.

    Errors: UsageError.

    >>> parse_strength("0.8", "--mlp")
    0.8
    """
    try:
        numbers = [float(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3, 4):
        raise UsageError(
            f"{what}: expected a number, or PEAK,WIDTH,FLOOR[,HEIGHT] as in 14,6,0,0.8, found {text!r}; "
            "peak and width are in blocks"
        )
    return numbers[0] if len(numbers) == 1 else Kernel(*numbers)

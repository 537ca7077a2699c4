"""`steer bake`: from names of directions to a checked Edit and a baked checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steer.errors import UsageError
from steer.live.library import directions_of, own_place
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.trait import Trait, shipped_traits
from steer.weights.bake import bake as bake_edit
from steer.weights.certify import Certificate
from steer.weights.fetch import resolve
from steer.weights.sketch import Sketch, sketch_files
from steer.weights.staging import check_output

Named = Direction | str | Path
"""A Direction, a file that holds one, or the name of one."""


def bake(
    source: str | Path,
    out: str | Path,
    *,
    ablate: Sequence[Named] = (),
    add: Mapping[Any, float] | None = None,
    strength: float = 1.0,
    blocks: tuple[int, int] | None = None,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write a checkpoint with directions removed from its weights, and amounts added as biases.

    `ablate` is removed from every writer, embedding included, or from the writers of `blocks` only;
    `strength` below 1 leaves a share. `add` maps directions to amounts. Streams: memory stays near the
    largest tensor. Errors: SteerError and its kinds, one line each; `out` is complete or absent.
    """
    out = Path(out)
    check_output(out)
    # The numbers first: looking for a direction may take minutes.
    probe = Direction("probe", 0, torch.ones(1))
    Edit((probe,), strength, blocks)
    place = checkpoint_dir(source)
    add = add or {}
    found = locate(place, [*ablate, *add], force=force)
    added = tuple((found[d], amount) for d, amount in add.items())
    edit = Edit(tuple(found[d] for d in ablate), strength, blocks, added)
    return bake_edit(place, out, edit, command=command, progress=progress)


def checkpoint_dir(source: str | Path) -> Path:
    """The directory of a checkpoint on disk. Errors: UsageError for a hub id that is not here yet."""
    place = Path(resolve(source))
    if not place.is_dir():
        raise UsageError(f"{source}: expected a checkpoint on disk, found a hub id; run: steer fetch {source}")
    return place


def locate(place: Path, named: Sequence[Named], *, force: bool = False) -> dict[Named, Direction]:
    """The directions for the checkpoint at `place`, checked to belong to it.

    A trait's name without a direction at hand is found first, which loads the model and keeps the result; that
    waits until all the others are known to be good.
    Errors: UsageError for an unknown name, MismatchError for a direction of another checkpoint.
    """
    sketch = sketch_files(place)
    known = directions_of(sketch)
    out: dict[Named, Direction] = {}
    missing: list[str] = []
    for name in named:
        if isinstance(name, str) and not name.endswith(".safetensors"):
            if name in known:
                out[name] = known[name]
            else:
                _check_trait(name)
                missing.append(name)
            continue
        out[name] = name if isinstance(name, Direction) else Direction.load(name)
        if not force:
            sketch.check(out[name].name, out[name].provenance, str(place))
    return out | {name: find_and_keep(place, name, sketch) for name in missing}


def _check_trait(name: str) -> None:
    if name not in shipped_traits() and not name.endswith((".yaml", ".yml")):
        raise UsageError(
            f"unknown trait {name!r}: expected one of {', '.join(shipped_traits())}, a direction's file "
            "(.safetensors) or a trait of your own (.yaml)"
        )
    Trait.load(name)


def find_and_keep(place: Path, trait: str, sketch: Sketch) -> Direction:
    """Find a trait's direction and keep it where it is looked for by name."""
    from steer.finding import find
    from steer.live.model import load

    direction = find(load(place), trait)
    direction.save(own_place(sketch, direction.name))
    return direction


def searched_edit(source: str | Path, trait: str) -> Edit:
    """The edit that a search on the trait's fit topics chooses; loads the model.

    Errors: as `locate`; UsageError when `trait` is a direction's file, which has no topics.
    """
    if trait.endswith(".safetensors"):
        raise UsageError(f"--search: expected a trait, which has topics to search on, found the file {trait}")
    from steer.finding import find_trait
    from steer.live.model import load
    from steer.measure.search import search_edit
    from steer.progress import bar

    described = Trait.load(trait)
    model = load(checkpoint_dir(source))
    found = find_trait(model, described)
    with bar("searching", None, "tokens") as advance:
        search = search_edit(
            model, found.direction, found.scorer, found.candidates.contrast.neutral[:24], on_tokens=advance
        )
    assert search.chosen.edit is not None
    return search.chosen.edit

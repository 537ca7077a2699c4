"""Building a generation: its children are merged, hashed and measured, then its file is written.

    LINEAGE/
      building.json    the generation that is being built; a process that is killed leaves it, and the next goes on
      models/3b.yml    the recipe of a node in the race, beside its checkpoint
      gate/            what `steer eval --quick` measured; each figure is asked for once
      directions/      the directions of the profiles that nodes carry

A child lost its mind if, beyond noise, its perplexity on plain prose is at least `PERPLEXITY` times the start's, or if
`SHARE` more of its phrases repeat, or `SHARE` fewer of its words are English. People are not shown it then.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.merge import MANIFEST, is_merge_of, merge, merge_bytes
from steer.checkpoint.staging import hash_file, sweep
from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider
from steer.core.small_files import dump_yaml
from steer.core.validation import from_file
from steer.errors import MismatchError, OutputExistsError, SteerError, UsageError
from steer.files import locked, one_line, read_json_object, write_atomic, write_atomic_json
from steer.lineage.lineage import MODELS, Gate, Generation, Lineage, Move, Node
from steer.lineage.proposing import Proposal
from steer.lineage.recipes import child, describe
from steer.measure.arms import Loader, Source
from steer.measure.evaluation import evaluate_arms, shown
from steer.measure.probes.library import probes_named
from steer.measure.probes.probe import Size
from steer.measure.readers import LocalReader
from steer.model.profiles import edit_of, sliders_in

PLAN, GATE, DIRECTIONS = "building.json", "gate", "directions"
PROBES = ("capability", "prose", "positions")
"""The probes of the gate. Perplexity rises first under any damage and costs one reading of a thousand tokens; prose
finds loops and non-words; positions measures, for people to read, damage that shows only in long scenes."""
PERPLEXITY, SHARE = 2.0, 0.3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Say = Callable[[str], None]
Json = dict[str, Any]


@contextmanager
def building(lineage: Lineage) -> Iterator[None]:
    """Inside the block no other process builds in this lineage.

    Errors: OutputExistsError if one does. A process that dies lets go.
    """
    with locked(lineage.place, "a generation is being built by another process; wait for it"):
        yield


def start(lineage: Lineage, recipe: Json, why: str, *, say: Say = lambda line: None) -> Generation:
    """Build generation 0, the start alone, inside of `building`. Errors: as `finish`."""
    _plan(lineage, Generation(0, [Node("0", Move("start"), why, recipe)]))
    return _finished(lineage, say)


def build(lineage: Lineage, proposals: Sequence[Proposal], *, say: Say = lambda line: None) -> Generation:
    """Build the next generation: a child for each proposal, inside of `building`.

    Errors: UsageError for a move that its parent does not allow, before anything is merged; as `finish`.
    """
    number = len(lineage.generations)
    if not 1 <= len(proposals) <= len(LETTERS):
        raise UsageError(f"a generation: expected 1 to {len(LETTERS)} children, found {len(proposals)}")
    nodes = [child(lineage.node(p.parent), f"{number}{LETTERS[i]}", p.move, p.why) for i, p in enumerate(proposals)]
    _plan(lineage, Generation(number, nodes))
    return _finished(lineage, say)


def finish(lineage: Lineage, *, say: Say = lambda line: None) -> Generation | None:
    """Go on with the generation that a process left unfinished, inside of `building`; None if there is none.

    Children that mergekit cannot merge do not pass the gate. Errors: SteerError if the disk lacks room for the next
    merge, CheckpointError for a model that is gone; the same call goes on afterwards.
    """
    file = lineage.place / PLAN
    if file.is_file() and _planned(lineage).number == len(lineage.generations):
        return _finished(lineage, say)
    file.unlink(missing_ok=True)  # that generation was written, and the process died before it removed the plan
    return None


def checkpoint(lineage: Lineage, name: str, *, say: Say = lambda line: None) -> Path:
    """Return the directory of a node's merged checkpoint, which is merged again if it was discarded.

    Errors: MismatchError if that gives other weights than those of the node, because a model has changed; as `merge`.
    """
    return _checkpoint(lineage, lineage.node(name), say)


def discard(lineage: Lineage, keep: Collection[str]) -> None:
    """Remove the checkpoints of all nodes but these. Their recipes stay, in the files of the generations."""
    for name in lineage.nodes.keys() - set(keep):
        sweep(lineage.model(name))
        for place in (lineage.model(name), _recipe_file(lineage, name)):
            _remove(place)


def _remove(place: Path) -> None:
    """Remove a checkpoint, or a recipe. What a kill leaves looks like no checkpoint, and the next call removes it."""
    hidden = place.with_name(f".{place.name}")
    with suppress(FileNotFoundError):
        shutil.rmtree(hidden)
    if place.is_dir():
        place.rename(hidden)
        shutil.rmtree(hidden)
    else:
        place.unlink(missing_ok=True)


def _recipe_file(lineage: Lineage, name: str) -> Path:
    """Where the recipe of a node is, while its checkpoint is on the disk."""
    return lineage.place / MODELS / f"{name}.yml"


def profile_of(lineage: Lineage, node: Node) -> Profile | None:
    """Return the profile that a node carries."""
    if node.profile is None:
        return None
    return Profile.parse(node.profile, f"{lineage.place}: node {node.id}: profile", lineage.place)


def adopted(lineage: Lineage, profile: Profile, parent: str) -> Json:
    """Return a profile that children of `parent` can carry: the directions of its sliders, as they are on the parent,
    are copied into the lineage, since names mean nothing on another checkpoint.

    Errors: UsageError for a slider that is no direction: a dictionary belongs to one checkpoint.
    """
    source = Source(Loader(), checkpoint(lineage, parent)).checkpoint
    entries: list[ProfileSlider] = []
    for slider, entry in sliders_in(source, profile):
        if not isinstance(slider.target, Direction) or slider.when.gate is not None:
            raise UsageError(f"profile {profile.name!r}: slider {entry.slider!r}: expected a direction without a gate, "
                             "which every merge of a lineage has, found another; take it out")  # fmt: skip
        if not entry.enabled:
            continue
        made = slider.target.save(lineage.place / DIRECTIONS / f".{os.getpid()}.safetensors")
        file = made.with_name(f"{hash_file(made)[:16]}.safetensors")
        made.replace(file)
        operation = entry.operation or slider.operation
        entries.append(replace(entry, slider=str(file.relative_to(lineage.place)), operation=operation))
    return replace(profile, sliders=tuple(entries), folder=None).dump()


def _plan(lineage: Lineage, generation: Generation) -> None:
    write_atomic_json(lineage.place / PLAN, to_jsonable_python(generation))


def _planned(lineage: Lineage) -> Generation:
    file = lineage.place / PLAN
    return from_file(Generation, read_json_object(file, what="a generation", do="delete it"), str(file))


def _finished(lineage: Lineage, say: Say) -> Generation:
    plan = _planned(lineage)
    made: list[Node] = []
    for i, node in enumerate(plan.nodes, 1):
        say(f"{i} of {len(plan.nodes)}: {node.id}: {describe(node.move)}: merging")
        try:
            merged = _hashed(lineage, node)
        except SteerError as e:
            # A recipe that mergekit fails on says something of the child. A disk or a model can be mended.
            if type(e) is not SteerError or isinstance(e.__cause__, OSError) or plan.number == 0:
                raise
            reason = one_line(e).removeprefix(f"{_recipe_file(lineage, node.id)}: ")
            made.append(replace(node, gate=Gate(False, {}, [reason])))
            continue
        say(f"{i} of {len(plan.nodes)}: {node.id}: measuring")
        made.append(replace(merged, gate=_gate(lineage, merged)))
    generation = Generation(plan.number, made)
    lineage.write(generation)
    (lineage.place / PLAN).unlink()
    return generation


def _hashed(lineage: Lineage, node: Node) -> Node:
    """Return a node with the hashes of its merged checkpoint, which is on the disk then."""
    place, recipe = lineage.model(node.id), _recipe_file(lineage, node.id)
    text = dump_yaml(node.recipe)
    if not recipe.is_file() or recipe.read_bytes() != text or (place.exists() and not is_merge_of(place, recipe)):
        _remove(place)
        write_atomic(recipe, text)
    if not place.exists():
        _check_room(lineage, node, recipe)
        merge(recipe, place)
    manifest = _manifest(place)
    return replace(node, inputs=manifest["inputs"], weights=manifest["weights"])


def _checkpoint(lineage: Lineage, node: Node, say: Say) -> Path:
    place = lineage.model(node.id)
    if place.is_dir() and _manifest(place).get("weights") == node.weights:
        return place
    if not node.weights:
        raise UsageError(f"{lineage.place}: node {node.id}: expected one that could be merged, found one that mergekit "
                         "failed on; name another node")  # fmt: skip
    say(f"{node.id}: merging it again")
    made = _hashed(lineage, node)
    if made.weights != node.weights:
        _remove(place)
        changed = [f"{model}: {file}" for model, files in made.inputs.items() for file, digest in files.items()
                   if node.inputs.get(model, {}).get(file) != digest]  # fmt: skip
        why = f"{changed[0]} has changed since" if changed else "mergekit or torch is another version"
        raise MismatchError(f"{lineage.place}: node {node.id}: expected the weights of its first merge, found others; "
                            f"{why}")  # fmt: skip
    return place


def _manifest(place: Path) -> Json:
    return read_json_object(place / MANIFEST, what="what a merge read and wrote", do="delete the directory")


def _check_room(lineage: Lineage, node: Node, recipe: Path) -> None:
    needed, free = merge_bytes(recipe), shutil.disk_usage(lineage.place).free
    if needed > free:
        raise SteerError(
            f"{lineage.place}: expected {needed / 1e9:.1f} GB free for the merge of {node.id}, found {free / 1e9:.1f}; "
            "free some space, then run the command again"
        ) from OSError(errno.ENOSPC, "no room")


def _gate(lineage: Lineage, node: Node) -> Gate:
    """Measure a node beside the start. What was measured before is read from the disk.

    Errors: SteerError for a start that cannot be measured.
    """
    first = node if node.parent is None else lineage.generations[0].nodes[0]
    arms = [_Arm(lineage, n) for n in {n.id: n for n in (first, node)}.values()]
    probes, out = probes_named(PROBES), lineage.place / GATE
    try:
        result = evaluate_arms(arms, probes, Size(quick=True), out)
    except OutputExistsError:  # of another version of steer: both are measured again
        result = evaluate_arms(arms, probes, Size(quick=True), out, fresh=True)
    figures: dict[str, float] = {}
    reasons: list[str] = []
    for probe in result["probes"]:
        rows = {(r["arm"], r["metric"]): r for r in probe["summary"]}
        skipped = {arm: part["skipped"] for arm, part in probe["arms"].items()}
        if skipped[node.id] and not skipped[first.id]:
            reasons.append(skipped[node.id])
        for metric in probe["metrics"]:
            row = rows.get((node.id, metric["name"]))
            if row is None:
                continue
            if metric is probe["metrics"][0]:
                figures[probe["name"]] = shown(metric, float(row["value"]))
            if _lost(row):
                before, after = shown(metric, rows[first.id, metric["name"]]["value"]), shown(metric, row["value"])
                reasons.append(f"{probe['name']}: {metric['name']} {before:.3g} -> {after:.3g}")
        if first is node and skipped[node.id] and probe["name"] == PROBES[0]:
            raise SteerError(f"{lineage.place}: the start cannot be measured: {skipped[node.id]}; mend its recipe")
    return Gate(not reasons, figures, reasons)


def _lost(row: Json) -> bool:
    """Whether a row of a summary says so, beyond noise. A perplexity's difference is one of nats."""
    limits = {"perplexity": math.log(PERPLEXITY), "repetition": SHARE, "known": -SHARE}  # below 0: less is worse
    limit = limits.get(row["metric"])
    if limit is None or not row.get("moved"):
        return False
    return row["difference"] >= limit if limit > 0 else row["difference"] <= limit


class _Arm:
    """A node as an `evaluation.Arm`. It is merged again if it must be asked something and is not on the disk."""

    control: bool = False

    def __init__(self, lineage: Lineage, node: Node) -> None:
        self.lineage, self.node = lineage, node
        self.name, self.about = node.id, describe(node.move)

    @property
    def key(self) -> Json:
        profile = profile_of(self.lineage, self.node)
        files = {f: hash_file(self.lineage.place / f) for f in (profile.files() if profile else ())}
        template = chosen_template(None)
        return {"inputs": self.node.inputs, "weights": self.node.weights, "profile": self.node.profile,
                "directions": files, "template": template}  # fmt: skip

    def reader(self) -> LocalReader:
        source = Source(Loader(), _checkpoint(self.lineage, self.node, lambda line: None))
        profile = profile_of(self.lineage, self.node)
        return LocalReader(source.load(), edit_of(source.checkpoint, profile) if profile else None, self.name)

"""`steer evolve`: lineages of merges, from a recipe and a pool of models to a merge that people like best."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from steer.checkpoint.kin import kin, mismatches
from steer.checkpoint.merge import MANIFEST, absolute_name, read_recipe, recipe_models, with_absolute_paths
from steer.checkpoint.staging import check_output, staged, write_json, write_text
from steer.core.profile import Profile
from steer.core.small_files import dump_yaml
from steer.errors import SteerError, UsageError
from steer.files import read_json_object
from steer.lineage.building import (
    PLAN,
    adopted,
    build,
    building,
    checkpoint,
    discard,
    finish,
    profile_of,
)
from steer.lineage.building import start as build_start
from steer.lineage.family_tree import model_card, tree_text
from steer.lineage.lineage import BY_HAND, SETTINGS, Lineage, Move, Node, Settings
from steer.lineage.proposing import New, Proposal, propose
from steer.lineage.ratings import Rating, rate, standing
from steer.lineage.recipes import as_written, child, describe, models_of, same_merge, short_name
from steer.lineage.recipes import check_start as check_recipe
from steer.lineage.tree_report import write_tree
from steer.progress import byte_bar
from steer.verbs.bake import bake
from steer.verbs.tables import text_table

Say = Callable[[str], None]
Json = dict[str, Any]
CHECKPOINT = "checkpoint"
"""The directory with weights in an export that was baked."""
CARD, MERGEKIT_RECIPE = "README.md", "mergekit_config.yml"
"""Files of a merge in which mergekit names the models."""


def start(
    recipe: str | Path,
    place: str | Path,
    pool: Sequence[str] = (),
    *,
    children: int = 3,
    seed: int = 0,
    say: Say = lambda line: None,
) -> Json:
    """Begin a lineage in the directory `place` with the merge of a recipe, and build its first generation; or go on
    with one that was stopped. Returns what `show` does.

    `pool`: models that may be added, paths or hub ids. `children`: of each generation.
    Errors: UsageError for a recipe without models, and if `place` holds the lineage of another recipe or pool.
    """
    recipe, place = Path(recipe), Path(place)
    raw = read_recipe(recipe)
    absolute = with_absolute_paths(raw, recipe)
    check_recipe(absolute, str(recipe))
    written = {absolute_name(name, recipe): name for name in recipe_models(raw)}
    extra = {_absolute(name, "--pool"): _beside(name, recipe) for name in pool}
    if (place / SETTINGS).is_file():
        lineage = Lineage(place)
        _check_same(lineage, absolute, list(extra))
    else:
        check_output(place)
        for line in _misfits([*models_of(absolute), *extra], absolute):
            say(line)
        lineage = Lineage.create(place, Settings(list(extra), children, seed, extra | written))
    with building(lineage):
        _finish(lineage, say)
        if not lineage.generations:
            build_start(lineage, absolute, f"the recipe {recipe.name}", say=say)
        if len(lineage.generations) == 1:
            _propose_and_build(lineage, "0", say)
    return show(place)


def next_generation(place: str | Path, *, parent: str | None = None, say: Say = lambda line: None) -> Json:
    """Build the next generation: the most promising children, which are those of the node that leads by votes unless
    its moves are used up or did badly; or children of `parent`; or go on with one that was stopped. Returns what `show`
    does.

    Errors: UsageError without votes on the newest generation unless `parent` is given, and if no move is left.
    """
    lineage = Lineage(place)
    with building(lineage):
        if not _finish(lineage, say):
            _propose_and_build(lineage, _parent(lineage, parent), say)
    return show(place)


def add(
    place: str | Path,
    model: str | None = None,
    *,
    remove: str | None = None,
    base: str | None = None,
    weight: tuple[str, float] | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    profile: str | Path | None = None,
    parent: str | None = None,
    say: Say = lambda line: None,
) -> Json:
    """Build a child by hand, which joins the newest generation. Returns what `show` does.

    One move: `model` to add, or `remove` or weigh or make `base` one of the lineage's models by path or short name; a
    merge `method` with its `parameters`; the file of a `profile` whose sliders the child carries, "none" to carry none.
    `parent`: by default that of the newest generation.
    Errors: UsageError for no move or several, for one that the parent does not allow, and for a merge that is there.
    """
    lineage = Lineage(place)
    moves = {"a model": model, "--remove": remove, "--base": base, "--weight": weight, "--method": method,
             "--profile": profile}  # fmt: skip
    given = [name for name, value in moves.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"add: expected one of {', '.join(moves)}, found {' and '.join(given) or 'none'}; make one "
                         "move at a time")  # fmt: skip
    if parameters and method is None:
        raise UsageError("--parameter: expected --method beside it, found none; parameters are those of a method")
    with building(lineage):
        _finish(lineage, say)
        node = _passed(lineage, parent or _begun(place).newest[0].parent or "0")
        found, name = None, model or remove or base or (weight[0] if weight else None)
        if name is not None:
            found = _named(lineage, node, name)
        if profile is not None:
            carried = None if str(profile) == "none" else adopted(lineage, Profile.load(profile), node.id)
            move = Move("profile", profile=carried)
        elif method is not None:
            move = Move("method", None, method, dict(parameters or {}))
        else:
            kind = "add" if model else "remove" if remove else "base" if base else "weight"
            move = Move(kind, found, weight[1] if weight else None)
        made = child(node, "?", move, BY_HAND)
        merges = {same_merge(n.recipe, n.profile): n for n in lineage.nodes.values()}
        twin = merges.get(same_merge(made.recipe, made.profile))
        if twin is not None:
            raise UsageError(f"{place}: expected a new merge, found that of node {twin.id}; make another move")
        if found is not None and move.kind in ("add", "base") and found not in _known(lineage, node):
            for line in _misfits([found], node.recipe):
                say(line)
            lineage.admit(found, str(name))
        build(lineage, [Proposal(node.id, move, BY_HAND)], say=say)
        _discard(lineage)
    return show(place)


def show(place: str | Path) -> Json:
    """Return a lineage as JSON: every node with its move, gate, rating and votes, and how sure the ratings are."""
    lineage = Lineage(place)
    now, ratings = standing(lineage) if lineage.generations else None, _ratings(lineage)
    return {
        "lineage": str(place),
        "pool": [short_name(m) for m in lineage.settings.pool],
        "unfinished": (lineage.place / PLAN).is_file() or not lineage.generations,
        "votes": len(lineage.votes),
        "leader": now and now.leader,
        "known": bool(now and now.known),
        "settled": bool(now and now.settled),
        "standing": now.line if now else "",
        "race": list(now.ratings) if now else [],
        "nodes": [
            {
                "id": node.id, "parent": node.parent, "move": describe(node.move), "why": node.why,
                "models": [short_name(m) for m in models_of(node.recipe)],
                "profile": node.profile and node.profile.get("name"), "passed": node.passed,
                "figures": node.gate.figures if node.gate else {}, "reasons": node.gate.reasons if node.gate else [],
                "rating": asdict(ratings[node.id]) if node.id in ratings else None,
            }
            for node in lineage.nodes.values()
        ],
    }  # fmt: skip


def best(place: str | Path) -> Json:
    """Return the node that leads by votes: its recipe with models named as the user did, and how sure that is."""
    lineage = _begun(place)
    now = standing(lineage)
    node = lineage.node(now.leader)
    return {"node": node.id, "standing": now.line, "known": now.known, "rating": asdict(now.ratings[node.id]),
            "recipe": as_written(lineage, node), "profile": node.profile}  # fmt: skip


def export(
    place: str | Path, out: str | Path, *, node: str | None = None, bake_it: bool = False, say: Say = lambda line: None
) -> Json:
    """Write a node, by default the one that leads, to the new directory `out`: recipe.yml, a plain mergekit recipe;
    README.md, its model card with the lineage; profile.yaml with its directions, if it carries one. `bake_it`: also
    checkpoint/, its merge with the profile's sliders in its weights.

    Errors: OutputExistsError if `out` has contents; as `checkpoint` and `steer.bake`.
    """
    lineage, out = _begun(place), Path(out)
    chosen = _passed(lineage, node or standing(lineage).leader)
    profile, recipe = profile_of(lineage, chosen), as_written(lineage, chosen)
    with staged(out) as work:
        write_text(work / "recipe.yml", dump_yaml(recipe).decode())
        write_text(work / "README.md", model_card(lineage, chosen, _ratings(lineage), recipe))
        if profile is not None:
            for file in profile.files():
                (work / file).parent.mkdir(exist_ok=True)
                (work / file).write_bytes((lineage.place / file).read_bytes())
            replace(profile, folder=work).save(work / "profile.yaml")
        if bake_it:
            merged = checkpoint(lineage, chosen.id, say=say)
            if profile is None:
                _copy_as_written(lineage, chosen, merged, work / CHECKPOINT, shutil.copy2)
            else:
                say(f"baking {chosen.id}")
                with tempfile.TemporaryDirectory(prefix=".export-", dir=lineage.place) as folder:
                    source = Path(folder) / chosen.id
                    _copy_as_written(lineage, chosen, merged, source, os.link)
                    # A slider is inherited by merges that its direction was not found on.
                    bake(source, work / CHECKPOINT, profile=profile, force=True, say=say)
    return {"node": chosen.id, "out": str(out), "recipe": str(out / "recipe.yml"),
            "checkpoint": str(out / CHECKPOINT) if bake_it else None}  # fmt: skip


def lineage_table(result: Json) -> str:
    """Return what `show` found as text: a row for each node, and one sentence on the votes."""
    names = list(dict.fromkeys(name for node in result["nodes"] for name in node["figures"]))
    rows = []
    for node in result["nodes"]:
        r = node["rating"]
        rated = [f"{r['value']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]", str(r["votes"])] if r else ["", ""]
        figures = [f"{node['figures'][n]:.3g}" if n in node["figures"] else "" for n in names]
        mark = "in" if node["id"] in result["race"] else "" if node["passed"] else "failed"
        rows.append([node["id"], *rated, mark, *figures, node["parent"] or "", node["move"]])
    columns = ["node", "rating", "votes", "race", *names, "parent", "move"]
    lines = [text_table(columns, rows, left=2).rstrip()] if rows else []
    lines += [f"{n['id']} did not pass: {'; '.join(n['reasons'])}" for n in result["nodes"] if not n["passed"]]
    if result["unfinished"]:
        lines.append(f"A generation is not finished: steer evolve next {result['lineage']}")
    return "\n".join([*lines, *filter(None, [result["standing"]])])


def tree(place: str | Path) -> str:
    """Return the tree of a lineage as text."""
    lineage = Lineage(place)
    return tree_text(lineage, _ratings(lineage))


def write_page(place: str | Path, out: str | Path) -> Path:
    """Write the family tree of a lineage as a self-contained page, and return its path.

    Errors: UsageError for a lineage without a generation.
    """
    lineage = _begun(place)
    return write_tree(lineage, standing(lineage), Path(out))


def _propose_and_build(lineage: Lineage, parent: str | None, say: Say) -> None:
    """Build children of a node, or of the most promising ones."""
    ratings = {name: rating.value for name, rating in _ratings(lineage).items()}
    new = _new(lineage.node(parent or standing(lineage).leader), lineage, say)
    proposals = propose(lineage, ratings, count=lineage.settings.children, parent=parent, new=new)
    for proposal in proposals:
        say(f"{proposal.parent}: {describe(proposal.move)}: {proposal.why}")
    build(lineage, proposals, say=say)
    _discard(lineage)


def _finish(lineage: Lineage, say: Say) -> bool:
    """Whether a generation that was stopped, and not the start alone, is whole now."""
    done = finish(lineage, say=say)
    if done is not None:
        _discard(lineage)
    return done is not None and done.number > 0


def _discard(lineage: Lineage) -> None:
    discard(lineage, standing(lineage).ratings)


def _ratings(lineage: Lineage) -> dict[str, Rating]:
    """The ratings of the nodes that votes were given on."""
    if not lineage.generations:
        return {}
    found = rate(list(lineage.nodes), lineage.votes, lineage.settings.seed).ratings
    return {name: rating for name, rating in found.items() if rating.votes}


def _new(node: Node, lineage: Lineage, say: Say) -> New | None:
    """Kinship of the models that could be in a child, beside the base of `node`; None where it is not known."""
    base, inside = node.recipe.get("base_model"), [m for n in lineage.nodes.values() for m in models_of(n.recipe)]
    models = [m for m in dict.fromkeys([*inside, *lineage.settings.pool]) if m != base]
    if base is None or len(models) < 2:
        return None
    try:
        with byte_bar("comparing the models") as advance:
            found = kin(*models, base=base, advance=advance)
    except SteerError as e:
        say(f"proposals do without kinship: {e}")
        return None
    return lambda model, beside: 0.0 if model == base else found.new(model, [m for m in beside if m != base])


def _parent(lineage: Lineage, parent: str | None) -> str | None:
    """Return the parent that was named; None for none, if there are votes to go by."""
    _begun(lineage.place)
    if parent is not None:
        return _passed(lineage, parent).id
    newest = {node.id for node in lineage.newest if node.parent and node.passed}
    if newest and not any({vote.a, vote.b} & newest for vote in lineage.votes):
        raise UsageError(f"{lineage.place}: expected votes on {', '.join(sorted(newest))}, found none; vote with steer "
                         f"evolve vote {lineage.place}, or name --parent NODE")  # fmt: skip
    # Children whose gates all failed leave a race of one, and their parent goes on.
    return None


def _begun(place: str | Path) -> Lineage:
    lineage = Lineage(place)
    if not lineage.generations:
        raise UsageError(f"{place}: expected a generation, found none; begin with steer evolve START.yml {place}")
    return lineage


def _passed(lineage: Lineage, name: str) -> Node:
    node = lineage.node(name)
    if not node.passed:
        raise UsageError(f"{lineage.place}: node {name}: expected one that passed its gate, found one that did not; "
                         "name another node")  # fmt: skip
    return node


def _known(lineage: Lineage, node: Node) -> list[str]:
    base = node.recipe.get("base_model")
    return list(dict.fromkeys([*models_of(node.recipe), *([base] if base else []), *lineage.settings.pool]))


def _named(lineage: Lineage, node: Node, name: str) -> str:
    """Return the reference of a model that a person named: one that the lineage knows, or any other."""
    known = _known(lineage, node)
    written = lineage.settings.written
    found = [m for m in known if name in (m, short_name(m), short_name(m).rpartition("+")[2], written.get(m))]
    if len(found) > 1:
        raise UsageError(f"{name}: expected the name of one model, found {', '.join(found)}; write the whole path")
    return found[0] if found else _absolute(name, "add")


def _absolute(name: str, where: str) -> str:
    try:
        return absolute_name(name)
    except SteerError as e:
        raise type(e)(f"{where}: {e}") from e


def _beside(name: str, recipe: Path) -> str:
    """Return a model's name with paths that are relative to the recipe's directory where the user's were relative."""
    folder = recipe.resolve().parent

    def beside(part: str) -> str:
        relative = Path(part).is_dir() and not Path(part).is_absolute()
        return os.path.relpath(Path(part).resolve(), folder) if relative else part

    return "+".join(map(beside, name.split("+")))


def _copy_as_written(lineage: Lineage, node: Node, merged: Path, out: Path, copy: Callable[[str, str], Any]) -> None:
    """Copy a node's checkpoint, with models named as the user did in the files that name them: nobody else has this
    machine's folders."""
    shutil.copytree(merged, out, copy_function=copy, ignore=shutil.ignore_patterns(MANIFEST, CARD, MERGEKIT_RECIPE))
    recipe, written = as_written(lineage, node), lineage.settings.written
    manifest = read_json_object(merged / MANIFEST)
    inputs = {written.get(name, name): files for name, files in manifest["inputs"].items()}
    write_json(out / MANIFEST, {**manifest, "recipe": recipe, "inputs": inputs})
    write_text(out / MERGEKIT_RECIPE, dump_yaml(recipe).decode())
    parts = {part: name for pair in written.items() for part, name in zip(*(n.split("+") for n in pair), strict=True)}
    card = (merged / CARD).read_text(encoding="utf-8")
    for part in sorted(parts, key=len, reverse=True):
        card = card.replace(part, parts[part])
    write_text(out / CARD, card)


def _misfits(models: Sequence[str], recipe: Json) -> list[str]:
    """Return a line for each thing in which models do not fit the recipe's base."""
    base = recipe.get("base_model") or models_of(recipe)[0]
    others = [m for m in models if m != base]
    return mismatches(others, base) if others else []


def _check_same(lineage: Lineage, recipe: Json, pool: Sequence[str]) -> None:
    first = lineage.nodes.get("0")
    if first is not None and first.recipe != recipe:
        raise UsageError(f"{lineage.place}: expected the lineage of this recipe, found that of another; name another "
                         "directory")  # fmt: skip
    if strange := [short_name(m) for m in pool if m not in lineage.settings.pool]:
        raise UsageError(f"{lineage.place}: expected the pool that it began with, found {strange[0]} besides; add it "
                         f"with steer evolve add {lineage.place}")  # fmt: skip

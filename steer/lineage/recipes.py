"""Moves on mergekit recipes: a child's recipe from its parent's, moves in words, and which two merges are the same.

Recipes in a lineage have `models`, whose paths are absolute. mergekit says which parameters a merge method takes, and
how many models.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from steer.checkpoint.merge import renamed, validated
from steer.errors import UsageError
from steer.lineage.lineage import Lineage, Move, Node

Recipe = dict[str, Any]


def apply(move: Move, recipe: Recipe) -> Recipe:
    """Return the recipe that a move makes of its parent's. A move of the profile leaves it as it is.

    Errors: UsageError of one line for a move that the recipe does not allow, or that changes nothing.
    """
    changed = deepcopy(recipe)
    _MOVES[move.kind](changed, move)
    if move.kind != "profile" and changed == recipe:
        raise UsageError(f"{describe(move)}: expected a change, found a recipe that has it already; make another move")
    _check(changed, describe(move))
    return changed


def child(parent: Node, name: str, move: Move, why: str) -> Node:
    """Return the node that a move makes of a node, not yet merged. Errors: as `apply`."""
    profile = move.profile if move.kind == "profile" else parent.profile
    if move.kind == "profile" and profile == parent.profile:
        raise UsageError(f"{describe(move)}: expected a change, found a parent that has it already; make another move")
    return Node(name, move, why, apply(move, parent.recipe), parent.id, profile)


def describe(move: Move) -> str:
    """Return a move in words, in one line."""
    name, value = short_name(move.model or ""), move.value
    number = f"{value:g}" if isinstance(value, int | float) else value
    settings = ", ".join(f"{k} {v}" for k, v in move.parameters.items())
    return {
        "start": "start",
        "add": f"add {name}" + ("" if value is None else f" with weight {number}"),
        "remove": f"remove {name}",
        "base": f"swap the base to {name}",
        "weight": f"weight of {name} {number}",
        "method": f"merge by {value}" + (settings and f" ({settings})"),
        "profile": f"carry the profile {move.profile.get('name')}" if move.profile else "carry no profile",
    }[move.kind]


def short_name(model: str) -> str:
    """Return a model's name for people, without folders: `base+adapter` for an adapter's path."""
    return "+".join(Path(part).name for part in model.split("+"))


def models_of(recipe: Recipe) -> list[str]:
    """Return the models that a recipe merges into its base, in its order."""
    return [entry["model"] for entry in recipe["models"]]


def needs_base(recipe: Recipe) -> bool:
    """Whether the recipe's method merges differences to a base."""
    return _spec(recipe).contract.base.value == "required"


def has_weights(recipe: Recipe) -> bool:
    """Whether the recipe's method takes a weight for each model."""
    return "weight" in _per_model(recipe)


def weight_of(model: str, recipe: Recipe) -> float | None:
    """Return the weight of a model in a recipe; None where it has none, or one that differs between layers."""
    found = _parameter(_entry(model, recipe, "weight"), "weight", recipe)
    return float(found) if isinstance(found, int | float) else None


def same_merge(recipe: Recipe, profile: dict[str, Any] | None) -> str:
    """Return text that is equal for nodes of the same merge and profile, whatever the order of the models."""
    models = sorted(recipe["models"], key=lambda entry: entry["model"])
    return json.dumps([{**recipe, "models": models}, profile], sort_keys=True)


def as_written(lineage: Lineage, node: Node) -> Recipe:
    """Return a node's recipe with models named as the user did: nobody else has this machine's folders."""
    written = lineage.settings.written
    return renamed(node.recipe, lambda name: written.get(name, name))


def check_start(recipe: Recipe, where: str) -> None:
    """Raise UsageError unless moves can be made on a recipe."""
    if "models" not in recipe:
        raise UsageError(f"{where}: expected a recipe with models, found slices or modules; a lineage adds and removes "
                         "whole models")  # fmt: skip
    _check(recipe, where)


def _add(recipe: Recipe, move: Move) -> None:
    model = _named(move)
    if model in models_of(recipe) or (needs_base(recipe) and model == recipe.get("base_model")):
        what = "its base" if model == recipe.get("base_model") else "one of its models"
        raise UsageError(f"{describe(move)}: expected a model that the recipe has not, found {what}; add another")
    if move.value is not None and not has_weights(recipe):
        raise UsageError(_no_weights(recipe, move))
    parameters = {} if move.value is None else {"weight": _number(move)}
    others, everywhere = recipe["models"], recipe.get("parameters") or {}
    for name in sorted(_per_model(recipe, required=True) - parameters.keys() - everywhere.keys()):
        found = [v for e in others if isinstance(v := _parameter(e, name, recipe), int | float)]
        parameters[name] = sum(found) / len(found) if found else 1.0
    recipe["models"] = [*others, {"model": model, **({"parameters": parameters} if parameters else {})}]


def _remove(recipe: Recipe, move: Move) -> None:
    entry = _entry(_named(move), recipe, describe(move))
    recipe["models"] = [e for e in recipe["models"] if e is not entry]
    if not recipe["models"]:
        raise UsageError(f"{describe(move)}: expected a recipe with more models, found its last one; add one first")


def _base(recipe: Recipe, move: Move) -> None:
    """Exchange the base. A new base that was one of the models leaves its place to the old one."""
    if not needs_base(recipe):
        raise UsageError(f"{describe(move)}: expected a method with a base, found {recipe['merge_method']}; change the "
                         "method first")  # fmt: skip
    new, old = _named(move), recipe["base_model"]
    for entry in recipe["models"]:
        if entry["model"] == new:
            entry["model"] = old
    recipe["models"] = list({e["model"]: e for e in recipe["models"]}.values())  # the old base may be there already
    recipe["base_model"] = new


def _weight(recipe: Recipe, move: Move) -> None:
    if not has_weights(recipe):
        raise UsageError(_no_weights(recipe, move))
    entry = _entry(_named(move), recipe, describe(move))
    entry["parameters"] = {**(entry.get("parameters") or {}), "weight": _number(move)}


def _method(recipe: Recipe, move: Move) -> None:
    if not isinstance(move.value, str):
        raise UsageError(f"method: expected the name of a merge method, found {move.value!r}; name one of mergekit's")
    recipe["merge_method"] = move.value
    recipe.pop("parameters", None)
    if move.parameters:
        recipe["parameters"] = deepcopy(move.parameters)
    takes = _per_model(recipe) - move.parameters.keys()
    needs = _per_model(recipe, required=True) & takes
    for entry in recipe["models"]:
        before = entry.pop("parameters", None) or {}
        kept = dict.fromkeys(sorted(needs), 1.0) | {k: v for k, v in before.items() if k in takes}
        if kept:
            entry["parameters"] = kept


def _start(recipe: Recipe, move: Move) -> None:
    raise UsageError("start: expected a move on a recipe, found the one that is the start; make another move")


_MOVES = {
    "start": _start,
    "add": _add,
    "remove": _remove,
    "base": _base,
    "weight": _weight,
    "method": _method,
    "profile": lambda recipe, move: None,
}


def _check(recipe: Recipe, where: str) -> None:
    """Raise UsageError for a recipe that mergekit would refuse for its shape, before any weights are read."""
    validated(recipe, where)
    base, models, spec = recipe.get("base_model"), models_of(recipe), _spec(recipe)
    twice = next((m for i, m in enumerate(models) if m in models[:i]), None)
    if twice is not None:
        raise UsageError(f"{where}: expected each model once, found {short_name(twice)} twice; take one out")
    ids = dict.fromkeys([*models, *([base] if base and spec.contract.base.value != "ignored" else [])])
    missing = [
        p.name for p in spec.parameters
        if p.required and p.name not in _per_model(recipe) and p.name not in (recipe.get("parameters") or {})
    ]  # fmt: skip
    if missing:
        raise UsageError(f"{where}: expected the parameter {missing[0]} of {spec.name}, found none; give it")
    try:
        spec.contract.validate_ids(list(ids), base)
    except ValueError as e:
        raise UsageError(f"{where}: mergekit does not accept it: {spec.name}: {e}; make another move") from e


def _spec(recipe: Recipe) -> Any:
    """What mergekit says of the recipe's method: its parameters, and the models that it takes."""
    from mergekit.merge_methods.registry import get, registered_methods

    try:
        return get(recipe["merge_method"]).spec
    except RuntimeError as e:
        known = ", ".join(sorted(m.spec.name for m in registered_methods()))
        raise UsageError(f"method: expected one of {known}, found {recipe['merge_method']!r}; name one") from e


def _per_model(recipe: Recipe, *, required: bool = False) -> set[str]:
    """Parameters of the recipe's method that each model has, or those without which it does not merge."""
    return {p.name for p in _spec(recipe).parameters if p.scope.value != "shared" and (p.required or not required)}


def _parameter(entry: dict[str, Any], name: str, recipe: Recipe) -> Any:
    everywhere = recipe.get("parameters") or {}
    return (entry.get("parameters") or {}).get(name, everywhere.get(name))


def _entry(model: str, recipe: Recipe, what: str) -> dict[str, Any]:
    found = next((e for e in recipe["models"] if e["model"] == model), None)
    if found is None:
        names = ", ".join(map(short_name, models_of(recipe)))
        hint = "it is the base; swap the base first" if model == recipe.get("base_model") else "name one of them"
        raise UsageError(f"{what}: expected one of {names}, found {short_name(model)}; {hint}")
    return found


def _named(move: Move) -> str:
    if move.model is None:
        raise UsageError(f"{move.kind}: expected a model, found none; name one")
    return move.model


def _number(move: Move) -> float:
    if not isinstance(move.value, int | float):
        raise UsageError(f"{describe(move)}: expected a number as weight, found {move.value!r}; write one such as 0.5")
    return float(move.value)


def _no_weights(recipe: Recipe, move: Move) -> str:
    return (f"{describe(move)}: expected a method with weights, found {recipe['merge_method']}, which has none; change "
            "the method first")  # fmt: skip

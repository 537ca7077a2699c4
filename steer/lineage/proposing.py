"""Which children are made next: those that are expected to beat the leader by most.

Every child of every node with votes, one move away and not made yet, has a rating before it is made: by the votes so
far on merges that share its models (`ratings`). A child that may be much better is worth more than one that is surely
a little better, so the untried comes first where nothing is known (expected improvement, Mockus 1975). Where kinship is
known, a child is its parent but for the share of the model that is new beside the parent's other models: a copy of what
is there changes little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from steer.errors import UsageError
from steer.lineage.lineage import Lineage, Move, MoveKind, Node
from steer.lineage.ratings import Standing, rate_all
from steer.lineage.recipes import child, contents, has_weights, models_of, needs_base, same_merge, short_name, weight_of

SMALL = 0.25
"""Share of a child that is taken as new where a weight changes, which changes little, or the base, which changes too
much at once."""
PROPOSED: tuple[MoveKind, ...] = ("add", "remove", "base", "weight")
"""Moves that are made without being asked for. Methods and profiles are up to people."""
New = Callable[[str, Collection[str]], float]
"""(model, models beside it) -> the share of its difference to the base that is new, 0 to 1."""


@dataclass(frozen=True)
class Proposal:
    """A child that could be made."""

    parent: str
    move: Move
    why: str
    """Who proposes it, and for which reason, in one line."""


def propose(
    lineage: Lineage, *, count: int, parent: str | None = None, new: New | None = None,
    kinds: Collection[MoveKind] = PROPOSED,
) -> list[Proposal]:  # fmt: skip
    """Return up to `count` children, the most promising first.

    None of them is a merge that the lineage has, no two are one merge, and no two move one model. Deterministic: equal
    promises are ordered by the lineage's seed. `parent`: whose children they are; by default those of any node that
    passed its gate and has votes, or of the start before there are votes. `new`: kinship, where it is known. `kinds`:
    of moves.
    Errors: UsageError if no move is left.
    """
    nodes = lineage.nodes
    passed = rate_all(lineage).among([node.id for node in nodes.values() if node.passed])
    rated = [name for name, rating in passed.ratings.items() if rating.votes] or [lineage.generations[0].nodes[0].id]
    known = {same_merge(n.recipe, n.profile) for n in nodes.values()}
    found = []
    for node in [nodes[name] for name in rated] if parent is None else [lineage.node(parent)]:
        for move in _moves(lineage, node, kinds):
            try:
                made = child(node, "?", move, "a try")
            except UsageError:  # the recipe does not allow it
                continue
            if (merge := same_merge(made.recipe, made.profile)) not in known:
                share = _share(move, node, new)
                promise = round(passed.expected_gain(node.id, contents(made.recipe, made.profile), share), 6)
                found.append((-promise, _shuffled(lineage, node, move), merge, Proposal(node.id, move, "")))
    chosen: dict[str | None, Proposal] = {}
    for _, _, merge, proposal in sorted(found, key=lambda row: row[:2]):
        if merge not in known and proposal.move.model not in chosen:
            chosen[proposal.move.model] = proposal
            known.add(merge)  # another move on another node may make the same merge
    if not chosen:
        where = "on every merge of it" if parent is None else f"on {parent}"
        other = "" if parent is None else "name another --parent, or "
        raise UsageError(f"{lineage.place}: nothing new is left: every move {where} was tried; {other}add a model: "
                         f"steer evolve add {lineage.place} MODEL")  # fmt: skip
    voted = [models_of(nodes[name].recipe) for name, rating in passed.ratings.items() if rating.votes]
    best = list(chosen.values())[:count]
    return [replace(p, why=_why(p.move, nodes[p.parent], voted, passed, new)) for p in best]


def _moves(lineage: Lineage, node: Node, kinds: Collection[MoveKind]) -> list[Move]:
    inside, pool = models_of(node.recipe), lineage.settings.pool
    moves = [Move("add", model) for model in pool] + [Move("remove", model) for model in inside]
    if needs_base(node.recipe):
        moves += [Move("base", model) for model in dict.fromkeys([*inside, *pool])]
    if has_weights(node.recipe):
        weights = {model: weight_of(model, node.recipe) for model in inside}
        moves += [Move("weight", m, w * f) for m, w in weights.items() if w for f in (2.0, 0.5)]
    return [move for move in moves if move.kind in kinds]


def _share(move: Move, node: Node, new: New | None) -> float:
    """The share of a child that is not as in its parent."""
    if move.kind not in ("add", "remove"):
        return SMALL
    return 1.0 if new is None or move.model is None else new(move.model, _others(move, node))


def _others(move: Move, node: Node) -> list[str]:
    return [model for model in models_of(node.recipe) if model != move.model]


def _why(move: Move, node: Node, voted: list[list[str]], ratings: Standing, new: New | None) -> str:
    """`voted`: the models of each merge with votes."""
    model, adds = move.model or "", move.kind != "remove"
    if move.kind not in ("add", "remove"):
        return "not tried yet"
    if 0 < sum(model in models for models in voted) < len(voted):
        effect = ratings.effect(model)
        return f"ratings {'with' if adds else 'without'} {short_name(model)} so far: {effect if adds else -effect:+.2f}"
    if new is None:
        return "not tried yet"
    share = f"{new(model, _others(move, node)):.0%} of {short_name(model)}"
    return f"{share} is new beside the parent's {'' if adds else 'other '}models"


def _shuffled(lineage: Lineage, node: Node, move: Move) -> str:
    text = f"{lineage.settings.seed} {node.id} {move.kind} {short_name(move.model or '')} {move.value}"
    return hashlib.sha256(text.encode()).hexdigest()

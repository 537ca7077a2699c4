"""Which children are made next: moves that did well elsewhere in the lineage, and moves that nobody has tried.

A bandit over moves. The promise of a child is its parent's rating, plus the mean gain of its move so far, pulled
towards 0 by one imagined child that gained nothing, plus what is hoped of the move: `HOPE` while it is untried, less
with each try (explore and exploit, as in UCB). A gain is the difference between a child's rating and its parent's, in
log-odds. Adding a model and removing it are one question with two signs. Where kinship is known, the hope of both is
the share of the model that is new beside the node's other models: a copy of what is there changes little.

Children of every rated node are compared, so that a lineage goes wider where the moves on the leader are used up or did
badly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from steer.errors import UsageError
from steer.lineage.lineage import Lineage, Move, MoveKind, Node
from steer.lineage.recipes import child, has_weights, models_of, needs_base, same_merge, short_name, weight_of

HOPE, SMALL = 1.0, 0.25
"""Log-odds hoped of an untried addition or removal, and of an untried weight, which changes little, or base, which
changes too much at once."""
LOST = -2.0
"""Gain of a child that did not pass the gate."""
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


@dataclass(frozen=True)
class _Trial:
    gains: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return sum(self.gains) / (len(self.gains) + 1)


def propose(
    lineage: Lineage, ratings: Mapping[str, float], *, count: int, parent: str | None = None, new: New | None = None,
    kinds: Collection[MoveKind] = PROPOSED,
) -> list[Proposal]:  # fmt: skip
    """Return up to `count` children, the most promising first.

    None of them is a merge that the lineage has, no two are one merge, and no two move one model. Deterministic: equal
    promises are ordered by the lineage's seed. `ratings`: of nodes, in log-odds. `parent`: whose children they are; by
    default that of any rated node that passed its gate, or of the start before there are ratings. `new`: kinship, where
    it is known. `kinds`: of moves.
    Errors: UsageError if no move is left.
    """
    nodes, trials = lineage.nodes, _trials(lineage, ratings)
    known = {same_merge(n.recipe, n.profile) for n in nodes.values()}
    rated = [n for n in nodes.values() if n.passed and n.id in ratings] or [lineage.generations[0].nodes[0]]
    found = []
    for node in rated if parent is None else [lineage.node(parent)]:
        for move in _moves(lineage, node, kinds):
            try:
                made = child(node, "?", move, "a try")
            except UsageError:  # the recipe does not allow it
                continue
            if (merge := same_merge(made.recipe, made.profile)) not in known:
                value, why = _value(move, node, trials, new)
                promise = round(ratings.get(node.id, 0.0) + value, 9)
                found.append((-promise, _shuffled(lineage, node, move), merge, Proposal(node.id, move, why)))
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
    return list(chosen.values())[:count]


def _moves(lineage: Lineage, node: Node, kinds: Collection[MoveKind]) -> list[Move]:
    inside, pool = models_of(node.recipe), lineage.settings.pool
    moves = [Move("add", model) for model in pool] + [Move("remove", model) for model in inside]
    if needs_base(node.recipe):
        moves += [Move("base", model) for model in dict.fromkeys([*inside, *pool])]
    if has_weights(node.recipe):
        weights = {model: weight_of(model, node.recipe) for model in inside}
        moves += [Move("weight", m, w * f) for m, w in weights.items() if w for f in (2.0, 0.5)]
    return [move for move in moves if move.kind in kinds]


def _value(move: Move, node: Node, trials: Mapping[str, _Trial], new: New | None) -> tuple[float, str]:
    trial, sign = trials.get(_question(move, node), _Trial()), -1 if move.kind == "remove" else 1
    tried, gain, name = len(trial.gains), sign * trial.mean, short_name(move.model or "")
    hope, why = HOPE if move.kind in ("add", "remove") else SMALL, "not tried yet"
    if new is not None and move.kind in ("add", "remove") and move.model is not None:
        share = new(move.model, [m for m in models_of(node.recipe) if m != move.model])
        hope *= share
        why = f"{share:.0%} of {name} is new beside the parent's {'' if sign > 0 else 'other '}models"
    if tried:
        did = f"with {name}" if sign > 0 else f"without {name}"
        children = "1 child" if tried == 1 else f"{tried} children"
        why = f"{did} ratings changed by {sign * sum(trial.gains) / tried:+.2f} on average ({children} so far)"
    return gain + hope / math.sqrt(1 + tried), why


def _trials(lineage: Lineage, ratings: Mapping[str, float]) -> dict[str, _Trial]:
    """Return what each question has gained so far. A removal counts, with the sign reversed, for adding the model."""
    out: dict[str, _Trial] = {}
    nodes = lineage.nodes
    for node in nodes.values():
        if node.parent is None or (node.passed and not {node.id, node.parent} <= ratings.keys()):
            continue
        gain = ratings[node.id] - ratings[node.parent] if node.passed else LOST
        question, sign = _question(node.move, nodes[node.parent]), -1 if node.move.kind == "remove" else 1
        out[question] = _Trial((*out.get(question, _Trial()).gains, sign * gain))
    return out


def _question(move: Move, parent: Node) -> str:
    """Return the question that a move answers, independent of the other models."""
    if move.kind in ("add", "remove"):
        return f"member {move.model}"
    if move.kind == "weight" and isinstance(move.value, int | float) and move.model:
        return f"{'more' if move.value > (weight_of(move.model, parent.recipe) or 0) else 'less'} {move.model}"
    return f"{move.kind} {move.model or move.value}"


def _shuffled(lineage: Lineage, node: Node, move: Move) -> str:
    text = f"{lineage.settings.seed} {node.id} {move.kind} {short_name(move.model or '')} {move.value}"
    return hashlib.sha256(text.encode()).hexdigest()

"""The family tree of a lineage: a self-contained page from its generations, its votes and its ratings.

At its top a picture shows the generations from top to bottom, with the path to the winner marked. A card for each node
follows, then any two nodes beside each other, and the winner's recipe. The template is tree.html.j2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.core.small_files import dump_yaml
from steer.files import write_atomic
from steer.lineage.lineage import Generation, Lineage, Move, Node, Vote, ancestors
from steer.lineage.ratings import Rating, Standing, rate
from steer.lineage.recipes import as_written, describe
from steer.measure.drawing import page
from steer.plain_text import plain, plain_line, shortened

TREE = "tree.html"
_DESK, _PHONE = 1000, 340
"""Widths of the picture in pixels."""
_NARROW, _WIDE = 80, 180
"""Least and most pixels that a box is wide."""
_BOX, _GAP, _BETWEEN = 58, 5, 34
"""Height of a box, the space between boxes, and that between generations, where the edges are drawn."""
_LETTER = 6.6
"""Pixels of a letter in a box, at most, on the average."""
_SIGNS = {"add": "+ ", "remove": "− ", "base": "base ", "weight": "weight of ", "method": "", "profile": "sliders "}


def write_tree(lineage: Lineage, standing: Standing, path: Path) -> Path:
    """Write the family tree as a self-contained page and return its path. `standing`: of the nodes in the race."""
    generations, votes = lineage.generations, lineage.votes
    nodes = {node.id: node for generation in generations for node in generation.nodes}
    winner = nodes[standing.leader]
    trail = [node.id for node in ancestors(winner, nodes)]
    everyone = rate(list(nodes), votes, lineage.settings.seed).ratings
    cards: dict[str, dict[str, Any]] = {
        node.id: _card(node, nodes) | {"rating": _rating(node.id, everyone[node.id], standing)}
        for node in nodes.values()
    }
    values = {
        "name": plain_line(lineage.place.resolve().name),
        "line": plain_line(standing.line),
        "generations": [(g.number, [cards[node.id] for node in g.nodes]) for g in generations],
        "pictures": [_picture(generations, trail if votes else [], width) for width in (_DESK, _PHONE)],
        "cards": cards,
        "trail": trail,
        "winner": winner.id,
        "recipe": _yaml(as_written(lineage, winner)),
        "profile": _yaml(winner.profile) if winner.profile else "",
        "scale": _scale([end for r in everyone.values() for end in (r.low, r.high)]),
        "scales": {
            name: _scale([c["figures"][name] for c in cards.values() if name in c["figures"]])
            for name in dict.fromkeys(name for c in cards.values() for name in c["figures"])
        },
        "start": next(iter(cards.values()))["figures"],
        "voters": len({vote.voter for vote in votes}),
        "votes": [_vote(vote) for vote in votes],
        "at": _at,
    }
    return write_atomic(path, page("tree.html.j2", "lineage", **values))


@dataclass(frozen=True)
class Box:
    """A node's place in the picture, in pixels from the upper left corner."""

    node: str
    x: float
    y: float
    text: str
    """What the node changes, cut to the width of the box."""


def layout(generations: Sequence[Generation], width: float) -> tuple[list[Box], float]:
    """Return a box for each node, and the width of all boxes.

    A generation is a line of boxes, or several where it does not fit into the picture's `width`.
    """
    most = max((len(g.nodes) for g in generations), default=1)
    box = min(_WIDE, max(_NARROW, width / most - _GAP))
    places, y, fit = [], 0.0, max(1, int((width + _GAP) // (box + _GAP)))
    for generation in generations:
        for first in range(0, len(generation.nodes), fit):
            line = generation.nodes[first : first + fit]
            left = (width - len(line) * (box + _GAP) + _GAP) / 2
            letters = int((box - 12) / _LETTER)
            places += [
                Box(node.id, left + i * (box + _GAP), y, shortened(label(node.move), letters))
                for i, node in enumerate(line)
            ]
            y += _BOX + _GAP
        y += _BETWEEN - _GAP
    return places, box


def label(move: Move) -> str:
    """Return what a move changes in as few letters as a narrow box has: `+ prose`, of the adapter alone."""
    if move.kind == "start":
        return "start"
    model = (move.model or "").rstrip("/").rpartition("/")[2]
    if move.kind == "profile":
        changed = move.profile.get("name", "") if move.profile else "away"
    else:
        value = f"{move.value:g}" if isinstance(move.value, float | int) else move.value or ""
        changed = ": ".join(part for part in (model, value) if part)
    return plain_line(_SIGNS[move.kind] + str(changed)).strip()


def _picture(generations: Sequence[Generation], trail: Sequence[str], width: int) -> dict[str, Any]:
    """Return what the template draws: boxes, and edges as (from, to, whether on the path to the winner)."""
    boxes, box = layout(generations, width)
    places = {place.node: place for place in boxes}
    parents = {node.id: node.parent for generation in generations for node in generation.nodes}
    edges = [
        (places[parent], place, node in trail and parent in trail)
        for node, place in places.items()
        if (parent := parents[node]) in places
    ]
    edges.sort(key=lambda edge: edge[2])  # the path to the winner lies on top
    height = max((place.y for place in places.values()), default=0) + _BOX
    return {"width": width, "height": height, "box": box, "tall": _BOX, "boxes": boxes, "edges": edges}


def _card(node: Node, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Return what is shown of a node, and what the page compares two nodes by."""
    return {
        "id": node.id,
        "parent": node.parent,
        "label": plain_line(describe(node.move)),
        "moves": [f"{n.id}: {plain_line(describe(n.move))}" for n in reversed(ancestors(node, nodes))],
        "why": plain_line(node.why),
        "passed": node.passed,
        "reasons": [plain_line(reason) for reason in node.gate.reasons] if node.gate else [],
        "figures": {plain_line(name): figure for name, figure in node.gate.figures.items()} if node.gate else {},
    }


def _rating(node: str, rating: Rating, standing: Standing) -> dict[str, Any] | None:
    """Return a node's rating, with its probability of being the best of the race; None for one without votes."""
    if not rating.votes:
        return None
    race = standing.ratings.get(node)
    return {"value": rating.value, "low": rating.low, "high": rating.high, "best": race and race.best,
            "votes": rating.votes, "bad": rating.bad}  # fmt: skip


def _vote(vote: Vote) -> dict[str, Any]:
    return {
        "a": vote.a, "b": vote.b, "outcome": vote.outcome, "voter": plain_line(vote.voter),
        "chat": [[plain(role), plain(text)] for role, text in vote.chat],
        "replies": [plain(reply) for reply in vote.replies],
    }  # fmt: skip


def _yaml(value: Any) -> str:
    return plain(dump_yaml(value).decode())


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that has all values on it."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    space = (high - low) * 0.06 or 1.0
    return low - space, high + space


def _at(value: float, scale: tuple[float, float]) -> float:
    """Return where a value lies on an axis, from 0 to 100."""
    return 100 * (value - scale[0]) / (scale[1] - scale[0])

"""Proposed children: what is new, what did well before, never the same merge twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steer.errors import UsageError
from steer.lineage.lineage import Gate, Generation, Lineage, Move, Node, Settings
from steer.lineage.proposing import Proposal, propose
from steer.lineage.recipes import child, models_of, same_merge, short_name

POOL = ["/m/calm", "/m/dry", "/m/loud"]


def stock(*names: str) -> dict[str, Any]:
    return {"merge_method": "model_stock", "base_model": "/m/base", "models": [{"model": f"/m/{n}"} for n in names]}


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """A start of three models, without children."""
    lineage = Lineage.create(tmp_path / "lineage", Settings(POOL))
    root = child_of_nothing(stock("prose", "roleplay", "plain"))
    lineage.write(Generation(0, [root]))
    return lineage


def child_of_nothing(recipe: dict[str, Any]) -> Node:
    return Node("0", Move("start"), "given", recipe)


def grow(lineage: Lineage, parent: str, *moves: Move, gate: Gate | None = None) -> None:
    number = len(lineage.generations)
    nodes = [child(lineage.node(parent), f"{number}{'abc'[i]}", move, "a test") for i, move in enumerate(moves)]
    lineage.write(Generation(number, [replace(n, gate=gate) for n in nodes]))


def new(model: str, beside: Collection[str]) -> float:
    """loud is all new, calm and dry are not; roleplay is what the others have too."""
    return {"/m/loud": 0.9, "/m/calm": 0.4, "/m/dry": 0.3, "/m/roleplay": 0.05}.get(model, 0.8)


def moves(
    lineage: Lineage, parent: str | None = "0", ratings: dict[str, float] | None = None, **options: Any
) -> list[Move]:
    return [p.move for p in propose(lineage, ratings or {}, **{"count": 3, "parent": parent, "new": new} | options)]


def test_the_models_that_are_most_new_beside_the_others_come_and_go_first(lineage: Lineage) -> None:
    proposals = propose(lineage, {}, count=9, new=new, kinds=("add", "remove"))
    order = [short_name(p.move.model or "") for p in proposals]
    assert (order[0], set(order[1:3])) == ("loud", {"prose", "plain"})
    assert order[3:] == ["calm", "dry", "roleplay"]  # a copy of what is there changes little
    assert [proposals[i].why for i in (0, 5)] == [
        "90% of loud is new beside the parent's models", "5% of roleplay is new beside the parent's other models",
    ]  # fmt: skip


def test_a_move_that_did_well_is_repeated_and_one_that_did_badly_is_not(lineage: Lineage) -> None:
    grow(lineage, "0", Move("add", "/m/calm"), Move("add", "/m/loud"), Move("remove", "/m/roleplay"))
    ratings = {"0": 0.0, "1a": 2.0, "1b": -2.0, "1c": 0.1}
    found = propose(lineage, ratings, count=9, parent="1c", new=new)
    assert found[0] == Proposal(
        "1c", Move("add", "/m/calm"), "with calm ratings changed by +2.00 on average (1 child so far)"
    )
    assert Move("add", "/m/loud") not in [p.move for p in found[:3]]
    # What was worse with a model is better without it.
    grow(lineage, "1b", Move("add", "/m/dry"))
    better = next(p for p in propose(lineage, ratings, count=2, parent="2a", new=new) if p.move.kind == "remove")
    assert better.move == Move("remove", "/m/loud")
    assert better.why == "without loud ratings changed by +2.00 on average (1 child so far)"


def test_a_model_that_the_start_has_is_taken_out_sooner_or_later(lineage: Lineage) -> None:
    """Where all models are new beside each other, a removal is worth a try as an addition is."""
    grow(lineage, "0", Move("add", "/m/calm"), Move("add", "/m/dry"), Move("add", "/m/loud"))
    found = moves(lineage, "1a", {"0": 0.0, "1a": 0.2, "1b": -0.3, "1c": -0.3}, new=lambda model, beside: 0.95)
    assert {m.kind for m in found} == {"remove"}
    assert {m.model for m in found} == {"/m/prose", "/m/roleplay", "/m/plain"}


def test_where_the_moves_on_the_leader_are_used_up_the_next_best_node_has_children(lineage: Lineage) -> None:
    grow(lineage, "0", Move("add", "/m/calm"), Move("add", "/m/dry"))
    ratings = {"0": 0.0, "1a": 3.0, "1b": 1.0}
    both = {"new": new, "kinds": ("add",)}
    assert {p.parent for p in propose(lineage, ratings, count=2, **both)} == {"1a"}
    for model in ("/m/dry", "/m/loud"):
        grow(lineage, "1a", Move("add", model))
        ratings[f"{len(lineage.generations) - 1}a"] = -1.0
    assert propose(lineage, ratings, count=9, **both)[0].parent == "1b"
    with pytest.raises(UsageError, match=r"every move on 1a was tried; name another --parent, or add a model: steer"):
        propose(lineage, ratings, count=9, parent="1a", **both)


def test_a_child_that_did_not_pass_counts_against_its_move(lineage: Lineage) -> None:
    grow(lineage, "0", Move("add", "/m/loud"), gate=Gate(False, {}, ["lost its mind"]))
    grow(lineage, "0", Move("add", "/m/dry"))
    assert Move("add", "/m/loud") not in moves(lineage, "2a")


def test_nodes_without_votes_change_no_proposal(lineage: Lineage) -> None:
    grow(lineage, "0", Move("add", "/m/calm"))
    grow(lineage, "0", Move("add", "/m/dry"))
    assert moves(lineage, "2a", {"0": 0.0, "1a": 5.0}, count=1) == [Move("add", "/m/calm")]
    assert moves(lineage, "2a", {"1a": 5.0}, count=1) == [Move("add", "/m/loud")]


def test_no_merge_is_proposed_twice_however_it_came_about(lineage: Lineage) -> None:
    grow(lineage, "0", Move("add", "/m/calm"), Move("add", "/m/dry"))
    grow(lineage, "1a", Move("add", "/m/dry"))
    known = {same_merge(n.recipe, n.profile) for n in lineage.nodes.values()}
    for parent in lineage.nodes:
        for move in moves(lineage, parent, count=99):
            made = child(lineage.node(parent), "?", move, "a test")
            assert same_merge(made.recipe, made.profile) not in known
    assert Move("add", "/m/calm") not in moves(lineage, "1b", count=99)  # 2a has it
    assert Move("remove", "/m/calm") not in moves(lineage, "2a", count=99)


def test_one_generation_makes_a_merge_once_where_two_parents_could(lineage: Lineage) -> None:
    """0 with calm and dry is one move away from 1a, and another from 1b."""
    grow(lineage, "0", Move("add", "/m/calm"), Move("add", "/m/dry"))
    found = propose(lineage, {"0": 0.0, "1a": 2.0, "1b": 2.0}, count=9, kinds=("add", "remove"))
    made = [child(lineage.node(p.parent), "?", p.move, p.why) for p in found]
    both = [n for n in made if {"/m/calm", "/m/dry"} <= set(models_of(n.recipe)) and len(models_of(n.recipe)) == 5]
    assert len(both) == 1
    assert len({same_merge(n.recipe, n.profile) for n in made}) == len(made)


def test_one_generation_moves_a_model_once_and_asks_for_no_more_than_there_is(lineage: Lineage) -> None:
    found = moves(lineage, count=99)
    assert len({m.model for m in found}) == len(found) == 6
    assert moves(lineage, count=2) == found[:2]


def test_proposals_follow_from_the_lineage_and_its_seed(tmp_path: Path, lineage: Lineage) -> None:
    orders = set()
    for seed in range(8):
        other = Lineage.create(tmp_path / f"{seed}", Settings(POOL, seed=seed))
        other.write(lineage.generations[0])
        assert moves(other, new=None) == moves(other, new=None)
        orders.add(str(moves(other, new=None)))
    assert len(orders) > 3


def test_weights_are_proposed_where_the_method_has_them(tmp_path: Path) -> None:
    lineage = Lineage.create(tmp_path / "lineage", Settings([]))
    entries = [{"model": f"/m/{n}", "parameters": {"weight": 0.5}} for n in "ab"]
    lineage.write(Generation(0, [child_of_nothing({"merge_method": "linear", "models": entries})]))
    found = moves(lineage, count=99, kinds=("weight",))
    assert {(m.kind, m.model) for m in found} == {("weight", "/m/a"), ("weight", "/m/b")}
    assert {m.value for m in found} <= {1.0, 0.25}


def test_when_all_was_tried_it_says_so(tmp_path: Path) -> None:
    lineage = Lineage.create(tmp_path / "lineage", Settings(["/m/calm"]))
    lineage.write(Generation(0, [child_of_nothing({"merge_method": "karcher", "models": [{"model": "/m/base"}]})]))
    grow(lineage, "0", Move("add", "/m/calm"))
    with pytest.raises(UsageError, match=r"nothing new is left: every move on every merge of it was tried; add a"):
        moves(lineage, None)

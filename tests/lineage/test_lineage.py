"""A lineage on disk: generations whole or absent and never changed, votes added one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.errors import CheckpointError, SteerError, UsageError
from steer.lineage.lineage import Gate, Generation, Lineage, Move, Node, Settings


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    lineage = Lineage.create(tmp_path / "lineage", Settings(["/models/prose", "someone/roleplay"]))
    recipe = {"merge_method": "model_stock", "base_model": "/models/base", "models": [{"model": "/models/calm"}]}
    lineage.write(Generation(0, [Node("0", Move("start"), "the recipe given", recipe)]))
    bigger = {**recipe, "models": [*recipe["models"], {"model": "/models/prose"}]}
    made = Node(
        "1a", Move("add", "/models/prose"), "adds most that is new", bigger, "0",
        gate=Gate(False, {"capability": 3.5}, ["perplexity 3.5 -> 900"]), weights={"0/model.safetensors": "ab"},
    )  # fmt: skip
    lineage.write(Generation(1, [made]))
    return lineage


def vote(lineage: Lineage, outcome: str = "a", voter: str = "kim") -> None:
    lineage.vote("0", "1a", outcome, chat=[("user", "Hello?")], replies=["Hi.", "No."], left="b", voter=voter)  # pyright: ignore


def test_what_is_written_is_read_again(lineage: Lineage) -> None:
    again = Lineage(lineage.place)
    assert again.settings == Settings(["/models/prose", "someone/roleplay"])
    assert again.generations == lineage.generations
    assert list(again.nodes) == ["0", "1a"]
    node = again.node("1a")
    assert (node.passed, node.gate and node.gate.reasons) == (False, ["perplexity 3.5 -> 900"])
    assert again.node("0").passed


def test_a_generation_is_never_changed(lineage: Lineage) -> None:
    before = lineage.generations
    with pytest.raises(UsageError, match="expected a new generation"):
        lineage.write(Generation(1, []))
    assert lineage.generations == before


def test_votes_of_several_people_are_kept_in_the_order_of_time(lineage: Lineage) -> None:
    for outcome, voter in (("a", "kim"), ("bad", "lee"), ("same", "kim")):
        vote(lineage, outcome, voter)
    assert [(v.outcome, v.voter) for v in lineage.votes] == [("a", "kim"), ("bad", "lee"), ("same", "kim")]
    assert lineage.votes[0].chat == [["user", "Hello?"]]


def test_a_vote_that_a_crash_cut_off_is_lost_and_nothing_else(lineage: Lineage) -> None:
    vote(lineage, "a")
    file = lineage.place / "votes" / "kim.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:50])
    assert len(lineage.votes) == 1
    vote(lineage, "b")
    assert [v.outcome for v in lineage.votes] == ["a", "b"]


def test_a_voter_takes_back_votes_one_by_one_and_those_of_nobody_else(lineage: Lineage) -> None:
    for outcome, voter in (("a", "kim"), ("b", "lee"), ("same", "kim")):
        vote(lineage, outcome, voter)
    before = (lineage.place / "votes" / "kim.jsonl").read_bytes()
    assert lineage.undo("kim").outcome == "same"
    vote(lineage, "bad", "kim")
    assert [v.outcome for v in lineage.votes] == ["a", "b", "bad"]
    assert [lineage.undo("kim").outcome for _ in range(2)] == ["bad", "a"]
    assert [(v.outcome, v.voter) for v in lineage.votes] == [("b", "lee")]
    assert (lineage.place / "votes" / "kim.jsonl").read_bytes().startswith(before)  # nothing is ever removed
    for voter in ("kim", "nobody"):
        with pytest.raises(UsageError, match=f"expected a vote of {voter} to take back, found none"):
            lineage.undo(voter)
    file = lineage.place / "votes" / "lee.jsonl"
    vote(lineage, "same", "lee")
    lineage.undo("lee")
    file.write_bytes(file.read_bytes() + file.read_bytes().splitlines(keepends=True)[-1])  # by two processes at once
    assert [(v.outcome, v.voter) for v in lineage.votes] == [("b", "lee")]
    file.write_text('{"undo": 3.5, "time": 4.0}\n')
    with pytest.raises(CheckpointError, match=r"lee\.jsonl: line 1: expected the time of a vote above, found 3\.5"):
        _ = lineage.votes


def test_rubbish_is_refused_by_file_and_line(lineage: Lineage, tmp_path: Path) -> None:
    vote(lineage)
    file = lineage.place / "votes" / "kim.jsonl"
    file.write_bytes(b"rubbish\n" + file.read_bytes())
    with pytest.raises(CheckpointError, match=r"kim\.jsonl: line 1: expected a vote, found no JSON"):
        _ = lineage.votes
    file.write_text(json.dumps({"a": "0", "b": "1a", "outcome": "great"}) + "\n")
    with pytest.raises(SteerError, match=r"kim\.jsonl: line 1: outcome: expected one of"):
        _ = lineage.votes
    with pytest.raises(UsageError, match="expected a name"):
        vote(lineage, voter="../kim")
    with pytest.raises(UsageError, match="one of 0, 1a, found '7c'"):
        lineage.node("7c")
    with pytest.raises(CheckpointError, match="expected the settings of a lineage, found none"):
        Lineage(tmp_path)

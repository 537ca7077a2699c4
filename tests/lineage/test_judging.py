"""Judging: pairs are blind, fair and written ahead; votes are kept as they were meant; nothing runs after close."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from tiny_chat import save_tiny_chat

from steer.checkpoint.merge import MANIFEST
from steer.checkpoint.staging import write_json
from steer.core.sampler import CHAT
from steer.errors import SteerError, UsageError
from steer.lineage import judging
from steer.lineage.judging import ALIKE, TURNS, BlindPair, Choice, Judge, Messages, Prompts
from steer.lineage.lineage import Gate, Generation, Lineage, Move, Node, Settings
from steer.lineage.ratings import ranked_pairs
from steer.model.steered import SteeredModel, load

SHORT = replace(CHAT, max_new_tokens=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """Checkpoints of the nodes 0, 1a, 1b and 1c, all different."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("0", "1a", "1b", "1c")):
        made = save_tiny_chat(tiny_llama, place / name, seed=seed)
        write_json(made / MANIFEST, {"weights": {}})  # those of the nodes
    return place


def make_lineage(place: Path, models: Path, *, profile: dict | None = None) -> Lineage:
    """A lineage with a start, two children, and a third that did not pass the gate."""
    lineage = Lineage.create(place, Settings(["/models/prose"]))
    lineage.write(Generation(0, [Node("0", Move("start"), "given", {})]))
    children = [Node(f"1{c}", Move("add", f"/m/{c}"), "new", {}, "0", gate=Gate(c != "c")) for c in "abc"]
    children[0] = replace(children[0], profile=profile)
    lineage.write(Generation(1, children))
    (place / "models").symlink_to(models)
    return lineage


@pytest.fixture
def lineage(tmp_path: Path, models: Path) -> Lineage:
    return make_lineage(tmp_path / "lineage", models)


@pytest.fixture
def judge(lineage: Lineage) -> Iterator[Judge]:
    with Judge(lineage, "kim", sampler=SHORT, seed=0) as judge:
        yield judge


def shown(judge: Judge) -> BlindPair:
    blind_pair = judge.blind_pair()
    assert blind_pair is not None
    return blind_pair


def test_the_prompts_are_many_and_none_twice() -> None:
    prompts = Prompts.shipped()
    assert len(prompts.openings) >= 40
    for texts in (prompts.openings, prompts.next):
        assert len(set(texts)) == len(texts)


def test_the_replies_are_those_of_the_nodes_with_one_seed_and_sampler(judge: Judge, models: Path) -> None:
    blind_pair = shown(judge)
    assert judge.blind_pair() is blind_pair  # until the vote
    ((role, text),) = blind_pair.chat
    assert role == "user"
    assert text in Prompts.shipped().openings
    for node, reply in zip(blind_pair.nodes, (blind_pair.left, blind_pair.right), strict=True):
        assert load(models / node).chat(text, sampler=SHORT).strip() == reply


@pytest.mark.parametrize("choice", ["left", "right", "same", "bad"])
def test_a_vote_is_kept_as_it_was_meant_whatever_the_sides(lineage: Lineage, judge: Judge, choice: Choice) -> None:
    for _ in range(4):  # with both orders of the sides, by the seed
        blind_pair = shown(judge)
        judge.vote(blind_pair, choice)
        kept = lineage.votes[-1]
        assert (kept.a, kept.b) == tuple(sorted(blind_pair.nodes))
        replies = dict(zip(blind_pair.nodes, (blind_pair.left, blind_pair.right), strict=True))
        assert kept.replies == [replies[kept.a], replies[kept.b]]
        assert (kept.a, kept.b)["ab".index(kept.left)] == blind_pair.nodes[0]
        assert (kept.voter, kept.chat) == ("kim", [list(m) for m in blind_pair.chat])
        chosen = blind_pair.nodes[0] if choice == "left" else blind_pair.nodes[1]
        assert kept.outcome == (choice if choice in ("same", "bad") else "a" if chosen == kept.a else "b")
    assert judge.standing.votes == 4
    assert {v.left for v in lineage.votes} == {"a", "b"}
    assert len({v.chat[0][1] for v in lineage.votes}) == 4  # no opening twice


def test_nothing_that_people_see_names_a_node_and_sides_are_even(judge: Judge) -> None:
    blind_pair = shown(judge)
    assert not any(node in repr(blind_pair) for node in ("'0'", "1a", "1b"))
    left = Counter()
    for _ in range(60):
        judge.say("hello friend")  # the same replies again, on sides drawn anew
        left[shown(judge).nodes[0]] += 1
    assert len(left) == 2
    assert min(left.values()) >= 15


def test_a_child_that_did_not_pass_is_never_shown_nor_asked(judge: Judge, lineage: Lineage) -> None:
    for _ in range(6):
        blind_pair = shown(judge)
        assert "1c" not in blind_pair.nodes
        judge.vote(blind_pair, "same")
    assert not list(lineage.place.glob("replies/*/1c.json"))


def test_a_pair_that_is_no_longer_shown_is_refused(judge: Judge, lineage: Lineage) -> None:
    blind_pair = shown(judge)
    judge.vote(blind_pair, "left")
    with pytest.raises(UsageError, match="expected the pair that is shown"):
        judge.vote(blind_pair, "left")
    assert len(lineage.votes) == 1


def test_undo_takes_the_vote_back_and_shows_its_pair_again(judge: Judge, lineage: Lineage) -> None:
    first = shown(judge)
    judge.vote(first, "left")
    judge.vote(shown(judge), "right")
    judge.undo()
    judge.undo()
    assert (lineage.votes, judge.standing.votes) == ([], 0)
    assert judge.blind_pair() is first
    judge.vote(first, "same")
    assert [v.outcome for v in lineage.votes] == ["same"]
    judge.undo()
    with pytest.raises(UsageError, match="expected a vote of kim"):
        judge.undo()


def test_a_prompt_of_ones_own_is_answered_once_and_the_openings_go_on(judge: Judge) -> None:
    shown(judge)
    judge.say(" hello friend ")
    blind_pair = shown(judge)
    assert blind_pair.chat == (("user", "hello friend"),)
    judge.vote(blind_pair, "left")
    assert shown(judge).chat[0][1] in Prompts.shipped().openings
    with pytest.raises(UsageError, match="message: expected some text"):
        judge.say(" ")


def test_one_prompt_for_all_chats_gets_new_replies_each_time(lineage: Lineage) -> None:
    with Judge(lineage, "kim", prompt="hello", sampler=SHORT) as judge:
        found = set()
        for _ in range(4):
            blind_pair = shown(judge)
            assert blind_pair.chat == (("user", "hello"),)
            found.add(frozenset([blind_pair.left, blind_pair.right]))
            judge.vote(blind_pair, "same")
    assert len(found) == 4


def test_a_scene_goes_on_with_the_reply_that_was_chosen(lineage: Lineage) -> None:
    with Judge(lineage, "kim", scene=True, sampler=SHORT, seed=1) as judge:
        assert judge.suggestion is None
        first = shown(judge)
        judge.vote(first, "right")
        assert judge.suggestion in Prompts.shipped().next
        suggested = judge.suggestion
        second = shown(judge)
        assert second.chat == (*first.chat, ("assistant", first.right), ("user", suggested))
        judge.vote(second, "same")
        judge.say("yes well")
        third = shown(judge)
        assert third.chat[:3] == second.chat
        assert third.chat[3] in {("assistant", second.left), ("assistant", second.right)}
        assert third.chat[4] == ("user", "yes well")
        judge.vote(third, "left")
        judge.undo()
        assert judge.blind_pair() is third
        for _ in range(TURNS - 2):
            judge.vote(shown(judge), "left")
        assert len(shown(judge).chat) == 1  # another scene, since this one was long
        assert shown(judge).chat != first.chat


def messages(chat: list[list[str]]) -> Messages:
    return tuple((role, text) for role, text in chat)


def next_is_written(lineage: Lineage, blind_pair: BlindPair, scene: bool) -> bool:
    """Whether 0, 1a and 1b have replied to a chat that may follow this one: in a scene, after either reply."""
    nodes: defaultdict[Messages, set[str]] = defaultdict(set)
    for file in lineage.place.glob("replies/*/*.json"):
        nodes[messages(json.loads(file.read_text())["chat"])].add(file.stem)
    answered = {chat for chat, some in nodes.items() if len(some) == 3}
    if not scene:
        return bool(answered - {messages(v.chat) for v in lineage.votes} - {blind_pair.chat})
    goes_on = {(*blind_pair.chat, ("assistant", reply)) for reply in (blind_pair.left, blind_pair.right)}
    return goes_on <= {chat[:-1] for chat in answered}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("most", [1, None])
@pytest.mark.parametrize("scene", [False, True])
def test_replies_are_there_before_the_vote_that_needs_them(
    lineage: Lineage, most: int | None, scene: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a pair is read, the replies that may be shown next are written, whatever the vote will be."""
    loaded: WeakSet[torch.nn.Module] = WeakSet()

    def watched(*args: Any, **options: Any) -> SteeredModel:
        model = load(*args, **options)
        loaded.add(model.hf)
        return model

    monkeypatch.setattr(judging, "load", watched)
    with Judge(lineage, "kim", scene=scene, sampler=SHORT, most=most) as judge:
        for choice in ("left", "same", "right", "left"):
            blind_pair = shown(judge)
            until(lambda pair=blind_pair: next_is_written(lineage, pair, scene))
            judge.vote(blind_pair, choice)  # pyright: ignore
            assert judge.blind_pair(wait=0) is not None
        assert len(loaded) == (most or 3)


def test_a_voter_who_can_wait_is_only_shown_the_pair_that_settles_most(lineage: Lineage) -> None:
    """A program that votes at once was shown the pair that was written first again and again."""
    with Judge(lineage, "kim", sampler=SHORT, most=1, patience=math.inf, seed=0) as judge:
        for _ in range(8):
            wanted = ranked_pairs(judge.standing)[0]
            blind_pair = shown(judge)
            assert sorted(blind_pair.nodes) == sorted(wanted)
            judge.vote(blind_pair, "left")


def test_replies_are_written_once_for_everyone(lineage: Lineage, judge: Judge) -> None:
    blind_pair = shown(judge)
    judge.close()
    written = {file: file.stat().st_mtime_ns for file in lineage.place.glob("replies/*/*.json")}
    with Judge(lineage, "kim", sampler=SHORT) as again:  # as after a kill
        other = shown(again)
        assert {other.left, other.right} == {blind_pair.left, blind_pair.right}
        until(lambda: len(list(lineage.place.glob("replies/*/*.json"))) > len(written))
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_nodes_that_write_the_same_are_not_shown(tmp_path: Path, models: Path, tiny_llama: Callable[..., Path]) -> None:
    place = tmp_path / "models"
    place.mkdir()
    for name, source in {"0": "0", "1a": "0", "1b": "1b"}.items():
        (place / name).symlink_to(models / source)
    lineage = make_lineage(tmp_path / "lineage", place)
    with Judge(lineage, "kim", sampler=SHORT) as judge:
        for _ in range(2 * ALIKE):
            blind_pair = shown(judge)
            assert set(blind_pair.nodes) != {"0", "1a"}
            assert blind_pair.left != blind_pair.right
            judge.vote(blind_pair, "same")
    (place / "1b").unlink()
    (place / "1b").symlink_to(models / "0")
    lineage = make_lineage(tmp_path / "copies", place)
    for scene in (False, True):
        with (
            Judge(lineage, "kim", scene=scene, sampler=SHORT) as judge,
            pytest.raises(UsageError, match="found that all of 0, 1a, 1b write the same replies"),
        ):
            judge.blind_pair()


def test_the_profile_of_a_node_is_applied(tmp_path: Path, models: Path, make_direction: Callable) -> None:
    profile = {"name": "noir", "sampler": "greedy", "sliders": [{"slider": "moral.safetensors", "amount": 9.0}]}
    lineage = make_lineage(tmp_path / "lineage", models, profile=profile)
    direction = make_direction()
    direction.save(lineage.place / "moral.safetensors")
    with Judge(lineage, "kim", sampler=SHORT, prompt="hello lie") as judge:
        blind_pair = shown(judge)
        while "1a" not in blind_pair.nodes:
            judge.vote(blind_pair, "same")
            blind_pair = shown(judge)
        plain = load(models / "1a")
        replies = dict(zip(blind_pair.nodes, (blind_pair.left, blind_pair.right), strict=True))
        seed = len(lineage.votes)  # all on this opening
        with plain.steered({direction: 9.0}):
            (ids,) = plain.replies([[{"role": "user", "content": "hello lie"}]], SHORT, keys=[seed])
        assert plain.text(ids).strip() == replies["1a"]
        (ids,) = plain.replies([[{"role": "user", "content": "hello lie"}]], SHORT, keys=[seed])
        assert plain.text(ids).strip() != replies["1a"]


def test_close_stops_in_the_middle_of_a_reply_and_leaves_nothing_running(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, loaded, threads = threading.Event(), WeakSet(), set(threading.enumerate())

    def watched(*args: Any, **options: Any) -> SteeredModel:
        model = load(*args, **options)
        loaded.add(model.hf)
        model.hf.get_submodule(model.anatomy.block_module(0)).register_forward_hook(lambda *_: started.set())
        return model

    monkeypatch.setattr(judging, "load", watched)
    with Judge(lineage, "kim", sampler=replace(SHORT, max_new_tokens=90)) as judge:
        assert started.wait(60)
    assert set(threading.enumerate()) <= threads
    assert not loaded
    assert not list(lineage.place.glob("replies/*/*.json"))
    judge.close()
    with pytest.raises(UsageError, match="expected one that is not closed"):
        judge.blind_pair()


def test_a_model_that_is_gone_is_one_line_and_can_be_put_back(tmp_path: Path, models: Path) -> None:
    lineage = make_lineage(tmp_path / "lineage", models)
    places = {"0": models / "0", "1a": tmp_path / "none", "1b": tmp_path / "none"}
    with Judge(lineage, "kim", sampler=SHORT, checkpoint=places.__getitem__) as judge:
        with pytest.raises(SteerError, match="expected a model directory, found none"):
            judge.blind_pair()
        places.update({name: models / name for name in places})
        while True:
            try:
                assert judge.blind_pair() is not None
                break
            except SteerError:  # of a try that was under way
                continue


def test_a_chat_that_is_too_long_is_refused_or_loses_its_oldest_turns(lineage: Lineage, judge: Judge) -> None:
    judge.say("hello " * 200)
    with pytest.raises(UsageError, match="128"):
        judge.blind_pair()
    assert shown(judge).chat[0][1] in Prompts.shipped().openings
    with Judge(lineage, "lee", scene=True, sampler=SHORT) as scene:
        for _ in range(4):
            scene.vote(shown(scene), "left")
            scene.say("well " * 40)
        assert len(shown(scene).chat) == 9


def test_there_have_to_be_two_nodes(tmp_path: Path) -> None:
    lineage = Lineage.create(tmp_path / "lineage", Settings(["/models/prose"]))
    lineage.write(Generation(0, [Node("0", Move("start"), "given", {})]))
    with pytest.raises(UsageError, match="expected two nodes to compare, found 0 alone"):
        Judge(lineage, "kim")


def test_two_people_vote_into_one_lineage(lineage: Lineage) -> None:
    with Judge(lineage, "kim", sampler=SHORT) as kim, Judge(lineage, "lee", sampler=SHORT) as lee:
        for _ in range(3):
            for judge in (kim, lee):
                judge.vote(shown(judge), "left")
        assert lee.standing.votes == 6
    lines = {name: (lineage.place / "votes" / f"{name}.jsonl").read_text().splitlines() for name in ("kim", "lee")}
    assert {name: len(several) for name, several in lines.items()} == {"kim": 3, "lee": 3}
    assert all(json.loads(line)["voter"] == name for name, several in lines.items() for line in several)

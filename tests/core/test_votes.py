"""Files of votes: what is written is read again, whole lines survive crashes and neighbours, and what counts."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from steer.core.votes import LEAST, Outcome, Vote, VotedReply, append_vote, counted, read_votes, usable_votes
from steer.errors import SteerError, UsageError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea?"}]


def pair(outcome: Outcome = "first", message: str = "Tea?", texts: tuple[str, str] = ("Yes.", "No.")) -> Vote:
    replies = tuple(VotedReply(t, s, {"sliders": []}) for t, s in zip(texts, ("plain", "now"), strict=True))
    return Vote.of("m", [CHAT[0], {"role": "user", "content": message}], replies, outcome, seed=3, blind=True, left=1)


def thumb(outcome: Outcome, text: str = "Yes.", message: str = "Tea?") -> Vote:
    return Vote.of("m", [{"role": "user", "content": message}], (VotedReply(text),), outcome)


def test_votes_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "votes.jsonl"
    written = [pair(), thumb("bad", "\u00e9\n\ufffd"), pair("neither")]
    for vote in written:
        append_vote(file, vote)
    assert read_votes(file) == written
    assert json.loads(file.read_text().splitlines()[0])["chat"] == CHAT


def test_a_pair_has_a_liked_and_a_disliked_reply_and_a_thumb_one_of_them() -> None:
    assert [(v.liked, v.disliked) for v in (pair("first"), pair("second"), pair("neither"))] == [
        ("Yes.", "No."), ("No.", "Yes."), (None, None)]  # fmt: skip
    assert [(v.liked, v.disliked) for v in map(thumb, ("good", "bad", "withdrawn"))] == [
        ("Yes.", None), (None, "Yes."), (None, None)]  # fmt: skip
    assert pair().message == "Tea?"


def test_an_outcome_must_fit_the_number_of_replies() -> None:
    with pytest.raises(UsageError, match="expected one of good, bad, withdrawn for 1 replies, found 'first'"):
        thumb("first")
    with pytest.raises(UsageError, match="expected one of first, second, neither for 2 replies"):
        pair("good")


def test_a_line_that_a_crash_cut_off_is_left_out_and_replaced_by_the_next_vote(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, pair())
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:30])
    assert read_votes(file) == [pair_at(file, 0)]
    append_vote(file, thumb("good"))
    assert [v.outcome for v in read_votes(file)] == ["first", "good"]
    file.write_bytes(whole[:30])
    append_vote(file, thumb("bad"))
    assert [v.outcome for v in read_votes(file)] == ["bad"]


def pair_at(file: Path, line: int) -> Vote:
    return replace(pair(), at=json.loads(file.read_bytes().split(b"\n")[line])["at"])


def test_votes_of_several_threads_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    threads = [
        threading.Thread(target=lambda n=n: [append_vote(file, thumb("good", f"{n} {i}")) for i in range(8)])
        for n in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {v.liked for v in read_votes(file)} == {f"{n} {i}" for n in range(4) for i in range(8)}


def test_a_line_that_is_no_vote_is_named(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, pair())
    good = file.read_text()
    for bad, says in (("{}", "model"), ("[", "Expecting value"), (good[:-2] + ',"x":1}', "found 'x'"),
                      (good.replace('"first"', '"third"')[:-1], "outcome")):  # fmt: skip
        file.write_text(good + bad + "\n")
        with pytest.raises(SteerError, match=f"votes.jsonl, line 2: expected a vote, found .*{says}"):
            read_votes(file)
    with pytest.raises(SteerError, match="expected votes, found none"):
        read_votes(tmp_path / "none.jsonl")


def test_the_last_vote_on_the_same_replies_counts_and_ties_do_not() -> None:
    again = [thumb("good"), thumb("bad"), pair("first"), pair("second"), pair("neither", "Milk?")]
    assert [(v.outcome, v.liked) for v in counted(again)] == [("bad", None), ("second", "No.")]
    assert counted([thumb("good"), thumb("withdrawn")]) == []
    assert counted([pair(texts=("Same.", "Same."))]) == []


def test_votes_that_no_direction_can_be_made_of_are_one_clear_line(tmp_path: Path) -> None:
    def votes(count: int, messages: int, outcome: Outcome = "first") -> list[Vote]:
        return [pair(outcome, str(i % messages), (f"a{i}", f"b{i}")) for i in range(count)]

    assert len(usable_votes(votes(LEAST, 5))) == LEAST
    file = tmp_path / "votes.jsonl"
    for vote in votes(7, 5):
        append_vote(file, vote)
    with pytest.raises(UsageError, match=r"votes.jsonl: expected at least 20 votes that prefer a reply, found 7; "
                                         r"vote 13 times more"):  # fmt: skip
        usable_votes(file)
    with pytest.raises(UsageError, match="found 0"):
        usable_votes(votes(30, 5, "neither"))
    with pytest.raises(UsageError, match="at least 5 different messages, found 4"):
        usable_votes(votes(30, 4))
    with pytest.raises(UsageError, match="found thumbs up alone"):
        usable_votes([thumb("good", str(i), str(i)) for i in range(30)])

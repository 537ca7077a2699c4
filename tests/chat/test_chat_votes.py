"""Thumbs under replies, and the slider that the page makes of all votes."""

from __future__ import annotations

import json

import pytest

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.chat.session import Session
from steer.chat.voting import keep_vote, kept_votes, votes_place
from steer.core.sampler import Sampler
from steer.core.votes import counted
from steer.errors import UsageError
from steer.finding.new_slider import TasteJob


def said(chat: Chat, text: str):
    message = chat.say(text)
    assert chat.writer.wait(20)
    return message


def test_a_thumb_is_kept_with_the_chat_and_with_what_the_reply_answers(new_chat, model, home):
    chat = new_chat()
    chat.system = "be well"
    chat.panel.set("moral", -1.0)
    said(chat, "hello")
    reply = said(chat, "well")
    chat.rate(reply.id, "good")
    (vote,) = kept_votes()
    assert (vote.liked, vote.disliked, vote.message) == (reply.text, None, "well")
    assert [m.role for m in vote.chat] == ["system", "user", "assistant", "user"]
    profile = vote.replies[0].profile
    assert profile is not None
    assert profile["sliders"][0]["amount"] == -1.0
    assert reply.written is not None
    assert vote.seed == reply.written.seed
    again = Chat(LocalBackend(model), place=chat.saved)
    assert [m.thumb for m in again.path()] == [None, None, None, "good"]


def test_the_same_thumb_again_takes_it_back_and_the_other_one_replaces_it(new_chat):
    chat = new_chat()
    reply = said(chat, "hello")
    for thumb, shown, counts in (("good", "good", ["good"]), ("good", None, []), ("good", "good", ["good"]),
                                 ("bad", "bad", ["bad"])):  # fmt: skip
        chat.rate(reply.id, thumb)
        assert reply.thumb == shown
        assert [v.outcome for v in counted(kept_votes())] == counts
    assert len(kept_votes()) == 4  # the file only grows


def test_a_text_that_changes_has_no_thumb_any_more(new_chat):
    chat = new_chat()
    reply = said(chat, "hello")
    chat.rate(reply.id, "bad")
    chat.edit(reply.id, "truth")
    assert reply.thumb is None
    chat.rate(reply.id, "good")
    chat.lengthen()
    assert chat.writer.wait(20)
    assert reply.thumb is None
    assert {v.liked or v.disliked for v in counted(kept_votes())} >= {"truth"}


def test_only_a_reply_has_a_thumb(new_chat):
    chat = new_chat()
    said(chat, "hello")
    with pytest.raises(UsageError, match="thumb: expected a reply that is written"):
        chat.rate(chat.path()[0].id, "good")
    assert not votes_place().exists()


def test_a_session_rates_its_last_reply(model):
    session = Session(model, system="be well", sampler=Sampler(max_new_tokens=6))
    with pytest.raises(UsageError, match="thumb: expected a reply, found none"):
        session.rate("good")
    text = "".join(session.reply("hello"))
    vote = session.rate("bad")
    assert kept_votes() == [vote]
    assert (vote.disliked, [m.content for m in vote.chat]) == (text, ["be well", "hello"])


def test_too_few_votes_start_no_job(new_chat, model):
    chat = new_chat()
    reply = said(chat, "hello")
    chat.rate(reply.id, "good")
    with pytest.raises(UsageError, match="expected at least 20 votes that prefer a reply, found 1"):
        chat.make_taste()
    assert TasteJob.latest(model) is None
    assert chat.taste() is None


@pytest.mark.slow
def test_a_slider_of_the_votes_comes_into_the_chat_that_is_open(new_chat, model):
    chat = new_chat()
    words = ["hello", "well", "truth", "lie", "friend", "yes"]
    for i in range(24):
        replies = [(f"{w} {words[i % 6]}", "", None) for w in ("ba be bi", "ta te ti")]
        keep_vote(model.name, [{"role": "user", "content": f"{words[i % 6]} {i}"}], replies, "first")
    chat.make_taste()
    job = chat.taste()
    assert job is not None
    assert job.wait(120)
    assert job.error is None, list(job.lines)
    assert job.progress == 1.0
    assert any(line.startswith("2 of 5: reading") for line in job.lines)
    chat.taste()
    row = next(r for r in chat.panel.rows() if r.name == "my-taste")
    assert row.description.startswith("Your taste: my-taste predicts")
    assert row.verdict is not None
    assert row.calibrated
    chat.panel.set("my-taste", 0.5)
    votes = json.loads(votes_place().read_text().splitlines()[0])
    assert votes["outcome"] == "first"
    chat.make_taste()  # again: the slider that is moved becomes the new one
    assert chat.taste().wait(120)
    chat.taste()
    assert chat.sliders["my-taste"] == 0.5

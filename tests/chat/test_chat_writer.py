"""Replies are written in a separate thread: what it sees of the chat, what survives, what is never lost."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from serving import until
from tiny_chat import hooks_on

from steer.chat.session import Session
from steer.chat.writer import Writer
from steer.errors import SteerError


def test_a_reply_is_what_the_terminal_chat_would_have_said(chat, model):
    session = Session(model, sampler=chat.sampler)
    for text in ("hello", "well", "truth"):
        said = chat.say(text)
        assert chat.writer.wait(20)
        assert said.text == "".join(session.reply(text))
        assert model.text(said.written.ids) == said.text
        assert said.written.ending == "length"
    assert hooks_on(model) == 0


def test_a_slider_moved_in_mid_reply_changes_the_next_token_and_none_before(new_chat, model, moral):
    plain = new_chat(40).say
    chat = new_chat(40)
    reply = plain("hello")
    chat.say("hello")
    until(lambda: chat.writer.tokens >= 3)
    with chat.backend.turns.turn():  # the writer waits between two tokens
        seen = chat.writer.tokens
        chat.panel.set("moral", -3.0)
    assert chat.writer.wait(20)
    until(lambda: reply.written is not None)
    moved = chat.path()[-1].written
    assert moved.stretches[0].start == 0
    at = moved.stretches[1].start
    assert seen <= at <= seen + 1
    assert moved.ids[:at] == reply.written.ids[:at]
    assert moved.ids[at:] != reply.written.ids[at:]
    assert moved.profile.sliders[0].amount == -3.0
    # The same moves at the same tokens, in the terminal's chat.
    session, words = Session(model, sampler=chat.sampler), []
    pieces = session.reply("hello")
    for i in range(40):
        if i == at:
            session.sliders["moral"] = -3.0
        words.append(next(pieces))
    assert "".join(words) == chat.path()[-1].text


def test_a_reply_goes_on_without_anybody_who_looks(chat):
    chat.say("hello")
    assert chat.writer.wait(20)
    assert len(chat.path()[-1].written.ids) == 12


def test_whoever_follows_sees_it_grow_to_its_end(new_chat):
    chat = new_chat(30)
    reply = chat.say("hello")
    seen = []
    while chat.writer.running:
        with chat.backend.turns.turn():  # the writer waits between two tokens
            seen.append(reply.text)
    seen.append(reply.text)
    assert all(b.startswith(a) for a, b in pairwise(seen))
    assert len(set(seen)) > 2


def test_stopped_it_keeps_what_there_is_and_says_so(new_chat):
    chat = new_chat(400)
    reply = chat.say("hello")
    until(lambda: chat.writer.tokens >= 3)
    began = time.monotonic()
    chat.stop()
    assert time.monotonic() - began < 5
    assert reply.written.ending == "stopped"
    assert 3 <= len(reply.written.ids) < 300
    assert not chat.writer.running


def test_figures_of_a_reply(new_chat):
    chat = new_chat(40)
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    w = reply.written
    assert 0 < w.first_token < w.seconds
    assert w.rate == pytest.approx(39 / (w.seconds - w.first_token), rel=0.05)
    assert chat.writer.tokens == 40


def test_two_chats_write_at_once_with_sliders_that_do_not_touch(new_chat, model):
    alone = new_chat(60)
    plain = alone.say("hello")
    assert alone.writer.wait(20)
    alone.clear()
    alone.panel.set("moral", -1.0)
    steered = alone.say("hello")
    assert alone.writer.wait(20)
    one, two = new_chat(60), new_chat(60)
    two.panel.set("moral", -1.0)
    first, second = one.say("hello"), two.say("hello")
    assert one.writer.wait(20)
    assert two.writer.wait(20)
    assert first.text == plain.text != steered.text == second.text
    assert not one.sliders
    assert hooks_on(model) == 0


def test_chats_that_write_at_once_take_turns(new_chat):
    chats = [new_chat(60) for _ in range(3)]
    with chats[0].backend.turns.turn():
        for chat in chats:
            chat.say("hello")
        until(lambda: chats[0].backend.turns.waiting == 4)
    apart = []
    while any(c.writer.running for c in chats):
        time.sleep(0.0005)
        tokens = [c.writer.tokens for c in chats]
        if all(c.writer.running for c in chats) and all(tokens):
            apart.append(max(tokens) - min(tokens))
    assert apart
    assert max(apart) <= 3


def test_read_again_in_mid_reply_all_is_read_under_the_sliders_of_now(new_chat, model):
    texts = []
    for reread in (False, True):
        chat = new_chat(40)
        chat.say("hello")
        until(lambda chat=chat: chat.writer.tokens >= 3)
        with chat.backend.turns.turn():
            chat.panel.set("moral", -1.0)
            if reread:
                chat.reread()
        assert chat.writer.wait(20)
        texts.append(chat.path()[-1])
        assert chat.backend.memory.read >= (40 + 4 if reread else 40)
    assert texts[0].written.receipt["tokens"] < texts[1].written.receipt["tokens"]


class Broken:
    """A draft that fails."""

    text, tokens, ending, ids, stretches = "", 0, "length", (), ()

    def __init__(self, *steps: object) -> None:
        self.steps = list(steps)
        self.closed = False

    def step(self) -> bool:
        at = self.steps.pop(0)
        if isinstance(at, BaseException):
            raise at
        self.text += str(at)
        self.tokens += 1
        return True

    def close(self) -> None:
        self.closed = True

    def receipt(self) -> None:
        return None


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (SteerError("the disk is full; free some"), "the disk is full; free some"),
        (RuntimeError("two\nlines"), "the reply broke off: RuntimeError: two lines"),
    ],
)
def test_what_goes_wrong_is_reported_in_a_line_and_the_next_reply_is_written(problem, says):
    writer, ended = Writer(), []
    draft = Broken("so ", "far", problem)
    writer.start(draft, 1, on_end=lambda d: ended.append((d.text, d.ending, writer.error)))
    assert writer.wait(10)
    assert ended == [("so far", "error", says)]
    assert (writer.error, draft.text, writer.running, draft.closed) == (says, "so far", False, True)
    writer.start(Broken("x", SteerError("y")), 2)
    assert writer.wait(10)
    assert writer.error == "y"


def test_a_failure_while_it_is_kept_is_reported_as_well():
    writer = Writer()

    def fail(draft: object) -> None:
        raise OSError("no space")

    writer.start(Broken("x", SteerError("y")), on_end=fail)
    assert writer.wait(10)
    assert writer.error == "the reply broke off: OSError: no space"


def test_a_second_reply_is_refused_while_one_is_written():
    writer, go = Writer(), threading.Event()

    class Slow(Broken):
        def step(self) -> bool:
            go.wait(10)
            return False

    writer.start(Slow(), 1)
    with pytest.raises(SteerError, match="a reply is being written"):
        writer.start(Slow(), 2)
    go.set()
    assert writer.wait(10)


@pytest.mark.slow
def test_a_chat_of_a_hundred_messages_leaves_nothing_behind(new_chat, model):
    chat = new_chat(2, keep=False)
    chat.panel.set("moral", -0.1)

    def count() -> int:
        gc.collect()
        return sum(
            1 for o in gc.get_objects() if type(o).__name__ in ("LocalDraft", "Tally", "Draw", "ReplyText", "Thread")
        )

    for i in range(50):
        chat.say("hello")
        assert chat.writer.wait(20)
        if i == 4:
            early = count()
    assert count() <= early
    assert len(chat.path()) == 100
    assert chat.last_error is None


def test_the_seed_of_a_turn_is_its_own_whatever_else_is_written(new_chat):
    chat = new_chat()
    chat.sampler = replace(chat.sampler, seed=9)
    seeds = []
    for _ in range(2):
        reply = chat.say("hello")
        assert chat.writer.wait(20)
        seeds.append(reply.written.seed)
    assert seeds == [9, 10]

"""Two replies side by side: the same draws, separate edits, marked words, and votes that can be blind."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from tiny_chat import hooks_on

from steer.chat.comparison import marked, tally
from steer.chat.voting import kept_votes
from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import Sampler
from steer.errors import SteerError, UsageError


def until_written(message) -> None:
    end = time.monotonic() + 20
    while message.written is None and time.monotonic() < end:
        time.sleep(0.001)


def text_of(spans) -> str:
    return "".join(text for text, _ in spans)


def differing(spans) -> list[str]:
    return [text for text, differs in spans if differs]


def test_each_side_is_what_the_chat_would_have_said_alone(new_chat, model):
    chat = new_chat(20)
    chat.panel.set("moral", -2.0)
    comparison = chat.compare("hello", chat.side("plain"), chat.side("now"))
    assert comparison.wait(20)
    left, right = comparison.shown
    assert chat.path() == []
    alone, plain = chat.say("hello"), new_chat(20).say("hello")
    chat.writer.wait(20)
    until_written(plain)
    assert right.text == alone.text
    assert left.text == plain.text != right.text
    assert (left.title, right.title) == ("without sliders", "with these sliders")
    receipts = [comparison.written(place)[1].receipt["sliders"] for place in ("left", "right")]
    assert (receipts[0], receipts[1][0]["name"]) == ([], "moral")
    assert hooks_on(model) == 0


def test_the_thoughts_of_both_sides_stand_apart_from_what_is_compared(new_chat, model):
    open_, close = model.template.source(), "</think>"
    model.tokenizer.chat_template = open_.replace("<|assistant|> {% endif %}", "<|assistant|> <think> {% endif %}")
    chat = new_chat(8)
    comparison = chat.compare("hello", chat.side("plain"), chat.side("plain"))
    assert comparison.wait(20)
    for side in comparison.shown:
        assert (side.text, side.spans) == ("", [])
        assert side.thoughts
        assert "<think>" not in side.thoughts
    text = comparison.written("left")[0]
    assert text.startswith("<think>")
    assert close not in text


def test_equal_settings_draw_equal_words(chat):
    comparison = chat.compare("hello", chat.side("plain"), chat.side("plain"))
    assert comparison.wait(20)
    left, right = comparison.shown
    assert left.text == right.text
    assert differing(left.spans) == differing(right.spans) == []


def test_one_reply_may_end_before_the_other(new_chat, model):
    chat = new_chat(20)
    chat.panel.set("moral", -2.0)
    comparison = chat.compare("hello", chat.side("plain"), chat.side("now"))
    assert comparison.wait(20)
    texts = [s.text.split() for s in comparison.shown]
    ends = next(w for w in texts[0] if w not in texts[1])
    at = texts[0].index(ends)
    model.end_token_ids = frozenset([model.tokenizer.convert_tokens_to_ids(ends)])
    comparison = chat.compare("hello", chat.side("plain"), chat.side("now"))
    assert comparison.wait(20)
    assert [s.text.split() for s in comparison.shown] == [texts[0][:at], texts[1]]
    assert (comparison.written("left")[1].ending, comparison.written("right")[1].ending) == ("ended", "length")


def test_a_slider_that_moves_later_is_no_part_of_the_comparison(new_chat):
    chat = new_chat(30)
    chat.panel.set("moral", -1.0)
    side = chat.side("now")
    chat.panel.set("moral", 2.0)
    comparison = chat.compare("hello", side, chat.side("plain"))
    assert comparison.wait(20)
    assert comparison.written("left")[1].receipt["sliders"][0]["amount"] == -1.0


def test_profiles_are_compared_by_their_sliders_alone(chat):
    profile = Profile("calm", sampler=Sampler(temperature=0), preset=None, sliders=(ProfileSlider("moral", -1),))
    plain = chat.compare("hello", chat.side(Profile("none")), chat.side("plain"))
    calm = chat.compare("hello", chat.side(profile), chat.side(Profile("none")))
    assert plain.wait(20)
    assert calm.wait(20)
    assert plain.shown[0].text == plain.shown[1].text == calm.shown[1].text != calm.shown[0].text
    assert (calm.shown[0].title, calm.shown[1].title) == ("calm", "none")
    with pytest.raises(SteerError, match="kindness"):
        chat.side(Profile("x", sliders=(ProfileSlider("kindness", 1),)))


def test_the_last_message_is_answered_again_and_the_better_reply_taken_into_the_chat(chat):
    with pytest.raises(UsageError, match="expected a message to reply to"):
        chat.compare(None, chat.side("plain"), chat.side("now"))
    reply = chat.say("hello")
    assert chat.writer.wait(20)
    chat.panel.set("moral", -2.0)
    comparison = chat.compare(None, chat.side("plain"), chat.side("now"))
    assert comparison.wait(20)
    assert comparison.shown[0].text == reply.text
    taken = chat.take(comparison, "right")
    assert [m.text for m in chat.path()] == ["hello", comparison.shown[1].text]
    assert chat.place_of(taken.id) == (1, 2)
    assert taken.written.profile.sliders[0].amount == -2.0
    new = chat.compare("well", chat.side("plain"), chat.side("now"))
    assert new.wait(20)
    chat.take(new, "left")
    assert [m.text for m in chat.path()] == ["hello", taken.text, "well", new.shown[0].text]


def test_blind_it_reveals_nothing_before_the_vote_and_a_coin_decides_who_is_left(new_chat, home):
    chat = new_chat(3)
    chat.panel.set("moral", -1.0)
    sides: Counter[int] = Counter()
    for _ in range(24):
        comparison = chat.compare("hello", chat.side("plain"), chat.side("now"), blind=True)
        assert comparison.wait(20)
        assert comparison.hidden
        assert [s.title for s in comparison.shown] == [None, None]
        first = comparison.shown[comparison.left]
        vote = comparison.vote("left" if comparison.left == 0 else "right")
        # Whichever side of the page it stood on, it was the first setting that won.
        assert (vote.outcome, vote.left, vote.blind) == ("first", comparison.left, True)
        shown = comparison.shown[comparison.left]
        assert (shown.title, shown.text) == ("without sliders", first.text)
        sides[comparison.left] += 1
    assert min(sides[0], sides[1]) >= 1
    votes = kept_votes()
    assert tally(votes) == {"without sliders": (24, 0, 0), "with these sliders": (0, 24, 0)}
    assert votes[0].replies[1].profile["sliders"] == [{"slider": "moral", "amount": -1.0}]
    assert (votes[0].message, votes[0].seed) == ("hello", 3)
    assert votes[0].liked == votes[0].replies[0].text == first.text
    assert votes[0].disliked == votes[0].replies[1].text != first.text
    assert (home / "votes.jsonl").read_text().count("\n") == 24


def test_votes_come_once_and_after_both_replies(new_chat):
    chat = new_chat(300)
    comparison = chat.compare("hello", chat.side("plain"), chat.side("plain"))
    with pytest.raises(UsageError, match="both replies to be whole"):
        comparison.vote("left")
    assert comparison.stop()
    assert comparison.vote("neither").outcome == "neither"
    with pytest.raises(UsageError, match="a second"):
        comparison.vote("left")
    assert tally(kept_votes()) == {"without sliders": (0, 0, 2)}


def test_a_broken_file_of_votes_is_reported_by_its_line(home):
    assert kept_votes() == []
    home.mkdir()
    (home / "votes.jsonl").write_text("\n{}\n")
    with pytest.raises(SteerError, match=r"votes\.jsonl, line 2: expected a vote"):
        kept_votes()


def test_a_vote_that_cannot_be_kept_is_reported(chat, home):
    comparison = chat.compare("hello", chat.side("plain"), chat.side("plain"))
    assert comparison.wait(20)
    (home / "votes.jsonl").mkdir(parents=True)
    with pytest.raises(SteerError, match="could not be written"):
        comparison.vote("left")
    assert comparison.voted is None


@pytest.mark.parametrize(
    ("first", "second", "only_first", "only_second"),
    [
        ("You are right, friend.", "You are wrong, friend.", ["right"], ["wrong"]),
        ("a b c", "a  b\nc", [], []),
        ("one two three four", "one four", ["two three"], []),
        ("Well, yes!", "No.", ["Well, yes!"], ["No."]),
        ("", "hello", [], ["hello"]),
        ("it's so", "its so", ["it's"], ["its"]),
    ],
)
def test_the_words_that_differ_are_marked_and_nothing_is_lost(first, second, only_first, only_second):
    a, b = marked(first, second)
    assert (text_of(a), text_of(b)) == (first, second)
    assert [t.strip() for t in differing(a)] == only_first
    assert [t.strip() for t in differing(b)] == only_second


def test_long_texts_are_compared_quickly():
    first, second = "a " * 9000 + "end", "a " * 5000 + "b " * 4000
    a, b = marked(first, second)
    assert (text_of(a), text_of(b)) == (first, second)
    assert a[0] == ("a " * 5000, False)

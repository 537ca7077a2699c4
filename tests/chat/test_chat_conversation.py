"""The tree of a conversation, and its file."""

from __future__ import annotations

import json

import pytest

from steer.chat.conversation import Conversation, SettingsSpan, Written
from steer.chat.stored import Stored, load_chat, new_place, save_chat, saved_chats
from steer.core.profile import Profile, ProfileSlider
from steer.core.sampler import Sampler
from steer.errors import SteerError, UsageError
from steer.files import delete


def texts(c: Conversation) -> list[str]:
    return [m.text for m in c.path()]


@pytest.fixture
def talk() -> Conversation:
    """hello - (hi | hey) and, after hey, bye - so long."""
    c = Conversation()
    hello = c.add("user", "hello", None)
    c.add("assistant", "hi", hello.id)
    hey = c.add("assistant", "hey", hello.id)
    bye = c.add("user", "bye", hey.id)
    c.add("assistant", "so long", bye.id)
    return c


def test_the_page_shows_one_path_and_a_swipe_brings_back_what_followed(talk):
    assert texts(talk) == ["hello", "hey", "bye", "so long"]
    hi = talk.alternatives(talk.path()[1].id)[0]
    talk.choose(hi.id)
    assert texts(talk) == ["hello", "hi"]
    talk.choose(talk.alternatives(hi.id)[1].id)
    assert texts(talk) == ["hello", "hey", "bye", "so long"]


def test_to_choose_a_message_deep_in_another_branch_puts_all_it_follows_on_the_page(talk):
    last = talk.last.id
    talk.choose(talk.alternatives(talk.path()[1].id)[0].id)
    talk.choose(last)
    assert texts(talk) == ["hello", "hey", "bye", "so long"]
    assert [m.text for m in talk.upto(last)] == texts(talk)


def test_a_removed_message_takes_what_followed_and_an_alternative_takes_its_place(talk):
    hey = talk.path()[1]
    talk.remove(hey.id)
    assert texts(talk) == ["hello", "hi"]
    assert len(talk) == 2
    with pytest.raises(UsageError, match="expected one of this chat"):
        talk[hey.id]
    talk.remove(talk.path()[0].id)
    assert texts(talk) == []
    assert len(talk) == 0


def test_an_edited_reply_keeps_what_it_was_written_under_and_loses_its_tokens(talk):
    m = talk.last
    m.written = Written(7, None, ids=(1, 2))
    talk.change(m.id, "so long")
    assert (m.edited, m.written.ids) == (False, (1, 2))
    talk.change(m.id, "farewell")
    assert (m.text, m.edited, m.written.seed, m.written.ids) == ("farewell", True, 7, ())


def test_a_title_is_what_the_user_said_first(talk):
    assert talk.title == "hello"
    c = Conversation()
    assert c.title == ""
    c.add("assistant", "well   met\n", None)
    assert c.title == "well met"
    c.add("user", "x" * 100, c.last.id)
    assert len(c.title) == 60


def test_a_chat_comes_back_from_its_file_as_it_was(talk, home):
    profile = Profile("then", sampler=Sampler(seed=5), preset=None, sliders=(ProfileSlider("moral", -0.5),))
    receipt = {"tokens": 9, "sliders": [{"name": "moral", "mean_share": float("nan")}], "warnings": []}
    talk.last.written = Written(
        5, profile, (SettingsSpan(0, None), SettingsSpan(4, profile)), (8, 9), receipt, "stopped", 1.5, 0.25, 12.0
    )
    talk.change(talk.path()[1].id, "hey \u2603 \ud83d")
    place = save_chat(new_place(), Stored(talk, "tiny", "be brief", profile, ("L1/3",), False, 11))
    assert place.parent == home / "chats"
    back = load_chat(place)
    assert texts(back.conversation) == ["hello", "hey \u2603 ?", "bye", "so long"]
    assert [m.text for m in back.conversation.alternatives(1)] == ["hi", "hey \u2603 ?"]
    assert back.conversation.path()[1].edited
    w = back.conversation.last.written
    assert w.receipt["sliders"][0]["mean_share"] is None
    assert (w.seed, w.profile, w.stretches, w.ids, w.ending) == (
        5, profile, talk.last.written.stretches, (8, 9), "stopped",
    )  # fmt: skip
    assert (w.seconds, w.first_token, w.rate) == (1.5, 0.25, 12.0)
    assert (back.model, back.system, back.profile, back.pinned, back.on, back.seed) == (
        "tiny", "be brief", profile, ("L1/3",), False, 11,
    )  # fmt: skip
    assert back.conversation.add("user", "more", back.conversation.last.id).id == 5


def test_saved_chats_are_listed_the_latest_first_and_what_is_none_is_named(talk, home):
    first = save_chat(home / "chats" / "a.json", Stored(talk, "tiny"))
    broken = home / "chats" / "b.json"
    broken.write_text("no chat")
    save_chat(home / "chats" / "c.json", Stored(Conversation(), "tiny"))
    chats, (line,) = saved_chats()
    assert [(c.place.name, c.title, c.messages) for c in chats] == [("c.json", "(empty)", 0), ("a.json", "hello", 4)]
    assert line.startswith(f"{broken}: expected a chat that this program saved, found ")
    assert "\n" not in line
    assert saved_chats() == (chats, [line])
    delete(first)
    broken.write_bytes(b'{"steer_chat": 1, "messages": [{"text": "\\ud800"}]}')
    chats, (line,) = saved_chats()
    assert [c.place.name for c in chats] == ["c.json"]
    assert "half a surrogate pair" in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("messages"), "messages: expected a value, found none"),
        (lambda d: d.update(steer_chat=2), "steer_chat: expected one of 1, found 2"),
        (
            lambda d: d["messages"][0].update(role="system"),
            "messages[0]: role: expected one of user, assistant, found 'system'",
        ),
        (lambda d: d["messages"][1].update(parent=77), "a new one that follows another"),
        (lambda d: d["messages"].append(d["messages"][0]), "a new one that follows another"),
        (lambda d: d.update(page=[99]), "message 99"),
        (lambda d: d.update(profile={"name": "x", "sliders": 3}), "sliders"),
    ],
)
def test_a_file_that_is_no_chat_is_an_error_of_one_line_that_names_it(talk, home, change, says):
    place = save_chat(home / "x.json", Stored(talk, "tiny"))
    data = json.loads(place.read_text())
    change(data)
    place.write_text(json.dumps(data))
    with pytest.raises(SteerError, match=r"x\.json: expected a chat") as e:
        load_chat(place)
    assert says in str(e.value)
    assert "\n" not in str(e.value)

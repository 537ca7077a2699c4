"""Lorebooks in a chat: where their texts stand in what the model reads, how many tokens they get, and what stays."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from steer.chat.chat import Chat
from steer.chat.context_use import ContextUse
from steer.chat.local import LocalBackend
from steer.chat.lore import Lore, with_lore
from steer.chat.session import Session
from steer.chat.stored import load_chat, saved_chats
from steer.chat.terminal import run_chat
from steer.core.cards import load_card
from steer.core.lorebook import read_lorebook
from steer.core.sampler import Sampler

SECTIONS = {"description": "DESC", "personality": "Ann's personality: PERS", "scenario": "Scenario: SCEN"}
SYSTEM = "Play Ann.\n\nDESC\n\nAnn's personality: PERS\n\nScenario: SCEN\n\nExample dialogue:\nhi"


class Plain:
    """A backend's part in it: one token for each letter, and a context for 100."""

    context: int | None = 400
    left_out = 0

    def count(self, text: str) -> int:
        return len(text)


def entry(content: str, **fields: Any) -> dict[str, Any]:
    return {"keys": ["truth"], "content": content, "name": content.split()[-1], **fields}


def book(*entries: Any, name: str = "b", **fields: Any):
    return read_lorebook({"name": name, "entries": list(entries), **fields}, name)


def read(lore: Lore, *messages: tuple[str, str], backend: Any = None, **how: Any) -> list[tuple[str, str]]:
    made = tuple({"role": role, "content": text} for role, text in messages)
    return [(m["role"], m["content"]) for m in with_lore(lore, made, backend or Plain(), **how)[0]]


def system_of(*entries: Any, system: str = SYSTEM, sections: dict[str, str] = SECTIONS) -> str:
    lore = Lore(book(*entries), sections=sections)
    role, text = read(lore, *([("system", system)] if system else []), ("user", "truth"))[0]
    assert role == "system"
    return text


@pytest.mark.parametrize(
    ("place", "before"),
    [
        ({"position": "before_char"}, "DESC"),
        ({"position": "after_char"}, "Example dialogue"),
        ({"content": "@@position before_desc\nLORE"}, "DESC"),
        ({"content": "@@position after_desc\nLORE"}, "Ann's personality"),
        ({"content": "@@position personality\nLORE"}, "Scenario"),
        ({"content": "@@position scenario\nLORE"}, "Example dialogue"),
        ({"content": "@@depth 1\n@@position after_desc\nLORE"}, "Ann's personality"),
        ({"content": "@@position nowhere\nLORE", "position": "before_char"}, "DESC"),
    ],
    ids=str,
)
def test_a_text_stands_at_its_place_in_the_system_prompt(place: dict[str, str], before: str) -> None:
    assert system_of(entry("LORE") | place) == SYSTEM.replace(before, f"LORE\n\n{before}")


def test_texts_at_one_place_stand_in_their_order() -> None:
    entries = [entry("TWO", insertion_order=2), entry("ONE", insertion_order=1), entry("NIL", position="before_char")]
    assert system_of(*entries) == SYSTEM.replace("DESC", "NIL\n\nDESC").replace("Example", "ONE\n\nTWO\n\nExample")


def test_where_a_section_was_taken_out_the_ends_of_the_prompt_are_left() -> None:
    entries = [
        entry("A", position="before_char"),
        entry("@@position personality\nB"),
        entry("@@position after_desc\nC"),
    ]
    assert system_of(*entries, system="Play.") == "A\n\nPlay.\n\nB\n\nC"
    assert system_of(*entries, system="") == "A\n\nB\n\nC"
    assert system_of(*entries, system="x\n\nScenario: SCEN\n\ny") == "x\n\nA\n\nScenario: SCEN\n\nB\n\nC\n\ny"
    without = {"description": "DESC"}
    wanted = [("system", "DESC"), ("system", "B"), ("user", "truth")]
    lore = Lore(book(entry("@@position personality\n@@depth 1\n@@role system\nB")), sections=without)
    assert read(lore, ("system", "DESC"), ("user", "truth")) == [("system", "DESC\n\nB"), wanted[2]]


@pytest.mark.parametrize(
    ("decorators", "wanted"),
    [
        ("@@depth 0", "u1 a1 u2truth S"),
        ("@@depth -3", "u1 a1 u2truth S"),
        ("@@depth 1", "u1 a1 S u2truth"),
        ("@@depth 2", "u1 S a1 u2truth"),
        ("@@depth 3", "S u1 a1 u2truth"),
        ("@@depth 99", "S u1 a1 u2truth"),
        ("@@depth 1\n@@role user", "u1 a1 U+u2truth"),
        ("@@depth 1\n@@role assistant", "u1 a1+A u2truth"),
        ("@@depth 0\n@@role user", "u1 a1 u2truth+U"),
        ("@@depth 0\n@@role assistant", "u1 a1 u2truth S"),
    ],
    ids=str,
)
def test_a_depth_counts_messages_from_the_last(decorators: str, wanted: str) -> None:
    lore = Lore(book(entry(f"{decorators}\nL")))
    found = read(lore, ("user", "u1"), ("assistant", "a1"), ("user", "u2truth"))
    roles = [role for role, _ in found]
    assert all(a != b for a, b in pairwise(roles))
    letter = {"system": "S", "user": "U", "assistant": "A"}
    shown = ["+".join(letter[role] if part == "L" else part for part in text.split("\n\n")) for role, text in found]
    assert " ".join(shown) == wanted


def test_books_share_a_quarter_of_the_context_the_characters_first() -> None:
    character = book(entry("a" * 60), entry("b" * 60, insertion_order=-1))
    other = book(entry("c" * 40), entry("d" * 30, insertion_order=9), name="other", token_budget=35)
    lore = Lore(character, (other,))
    messages = ({"role": "user", "content": "truth"},)
    found = with_lore(lore, messages, Plain())[1]
    assert [a.text[0] for a in found.active] == ["a", "d"]
    assert found.left_out == ("b" * 60, "c" * 40)
    backend = Plain()
    backend.context = None
    assert with_lore(lore, messages, backend)[1].tokens == 150


def test_a_chat_without_lorebooks_is_read_as_it_is() -> None:
    messages = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    assert with_lore(Lore(), messages, Plain())[0] is messages


CARD = {
    "name": "Ann", "description": "hello", "first_mes": "well", "alternate_greetings": ["yes"],
    "character_book": {
        "entries": [
            {"keys": ["truth"], "content": "{{char}} ba be {{pick:bi,bo}}", "insertion_order": 1, "name": "ba"},
            {"keys": ["lie"], "content": "@@is_greeting 1\nfriend", "insertion_order": 2, "name": "fr"},
        ]
    },
}  # fmt: skip


def card(**fields: Any):
    return load_card(json.dumps({"data": CARD | fields}).encode())


def says(model: Any, system: str, *said: str, **sampler: Any) -> str:
    roles = ("assistant", "user")
    return model.chat([{"role": roles[i % 2], "content": t} for i, t in enumerate(said)], system=system, **sampler)


def test_a_reply_is_written_from_the_prompt_with_the_lore(new_chat, model) -> None:
    chat: Chat = new_chat()
    chat.play(card())
    first = chat.path()[0]
    reply = chat.say("the truth and a lie")
    assert chat.writer.wait(20)
    pick = chat.scanned.active[0].text
    assert pick in ("Ann ba be bi", "Ann ba be bo")
    assert [a.entry.name for a in chat.scanned.active] == ["ba"]
    assert chat.scanned.tokens == len(model.encode(pick))
    system = chat.system.replace("\n\nhello", f"\n\nhello\n\n{pick}")
    sampler = chat.sampler.__dict__ | {"seed": reply.written.seed}
    assert reply.text == says(model, system, "well", "the truth and a lie", **sampler)
    assert pick not in chat.system
    assert [m.text for m in chat.path()] == ["well", "the truth and a lie", reply.text]
    chat.swipe(first.id, +1)
    chat.say("the truth and a lie")
    assert chat.writer.wait(20)
    assert [a.entry.name for a in chat.scanned.active] == ["ba", "fr"]
    assert chat.scanned.active[0].text == pick


def test_looking_inside_and_comparing_read_the_lore_too(new_chat, model) -> None:
    chat: Chat = new_chat()
    chat.play(card(character_book={"entries": [entry("@@depth 0\n@@role user\nbi")]}))
    reply = chat.say("truth")
    assert chat.writer.wait(20)
    comparison = chat.compare(None, chat.side("plain"), chat.side("plain"))
    assert comparison.wait(20)
    assert comparison.task.messages[-1]["content"] == "truth\n\nbi"
    assert comparison.written("left")[0] == reply.text
    chat.take(comparison, "left")
    assert [m.text for m in chat.path()] == ["well", "truth", reply.text]
    assert chat.inside(reply.id, ["moral"]) is not None


def test_a_book_that_was_added_stays_with_another_character_and_in_the_file(new_chat) -> None:
    chat: Chat = new_chat()
    chat.add_lorebook(book(entry("@@depth 1\nbi"), name="mine"))
    chat.play(card())
    chat.say("truth")
    assert chat.writer.wait(20)
    assert [b.name for b in chat.lore.all] == ["Ann's lorebook", "mine"]
    stored = load_chat(saved_chats()[0][0].place)
    assert stored.lore == chat.lore
    again = Chat(LocalBackend(chat.backend.model), place=chat.saved)
    assert again.lore == chat.lore
    again.close()
    chat.play(card(character_book=None))
    assert [b.name for b in chat.lore.all] == ["mine"]
    chat.add_lorebook(book(entry("bo"), name="mine"))
    assert [b.entries[0].content for b in chat.lore.all] == ["bo"]
    chat.remove_lorebook("mine")
    assert chat.lore.all == ()


def test_a_session_reads_the_lore_and_the_terminal_says_which(model) -> None:
    session = Session(model, sampler=Sampler(max_new_tokens=4))
    session.play(card())
    session.add_lorebook(book({"keys": ["("], "use_regex": True, "content": "x", "name": "odd"}, name="mine"))
    out = io.StringIO()
    run_chat(
        session, stdin=io.StringIO("truth\n/receipt\nhello\n/clear\n/receipt\n"), console=Console(file=out, width=300)
    )
    text = out.getvalue()
    assert "lorebook: ba (4 tokens)\n" in text
    assert text.count("lorebook: odd: expected a regular expression that RE2 knows, found '('") == 2
    assert session.scanned.active == ()
    assert session.lore.character is not None


def test_a_full_context_leaves_out_what_may_be_left_out(model) -> None:
    session = Session(model, sampler=Sampler(max_new_tokens=4))
    session.add_lorebook(book(entry("@@ignore_on_max_context\nba"), entry("be")))
    for words in (1, 300, 300):
        list(session.reply("truth " + "ba " * words))
    assert session.left_out
    list(session.reply("truth"))
    assert [a.text for a in session.scanned.active] == ["be"]


def test_a_chat_that_cannot_be_scanned_is_as_it_was(model) -> None:
    session = Session(model)
    session.add_lorebook(book(entry("{{char}}" * 60, keys=["x"])))
    session.lore = replace(session.lore, macros=session.lore.macros.having({"char": "A" * 100_000}))
    with pytest.raises(Exception, match="macros that stand for at most"):
        list(session.reply("x"))
    assert session.messages == []


def test_the_context_is_divided_among_card_lorebook_history_and_reply(new_chat, model):
    chat = new_chat(20)
    chat.system = "ba be bi"
    chat.add_lorebook(read_lorebook({"entries": [{"keys": ["hello"], "content": "lie lie"}]}, "sea"))
    chat.say("hello well")
    chat.writer.wait(20)
    prompt = model.prompt_ids([
        {"role": "system", "content": "lie lie\n\nba be bi"}, {"role": "user", "content": "hello well"}
    ])  # fmt: skip
    assert chat.used == ContextUse(3, 2, len(prompt) - 5, 20, 512)
    chat.clear()
    assert chat.used is None
    assert ContextUse.of(500, 40, 10, 50, 512).reply == 12
    assert ContextUse.of(30, 40, 0, 50, 512).history == 0

"""Lorebooks: which entries are active, in which order and within which budget, and that no stranger's book hangs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from steer.core.cards import load_card
from steer.core.lorebook import Key, Lorebook, load_lorebook, read_lorebook, scan
from steer.core.macros import Macros
from steer.core.small_files import shown
from steer.errors import SteerError

ANN = Macros({"char": "Ann", "user": "Bo"})


def book(*entries: Any, **fields: Any) -> Lorebook:
    return read_lorebook({"entries": list(entries), **fields}, "book")


def chat(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and of the character in turns; the user's is the last."""
    roles = ("user", "assistant")
    return [{"role": roles[(len(texts) - 1 - i) % 2], "content": t} for i, t in enumerate(texts)]


def active(made: Lorebook, *texts: str, **how: Any) -> list[str]:
    """The texts of the active entries."""
    return [a.text for a in scan(made, chat(*texts), ANN, **how).active]


def entry(content: str = "yes", keys: Any = ("dragon",), **fields: Any) -> dict[str, Any]:
    return {"keys": list(keys) if isinstance(keys, tuple) else keys, "content": content, **fields}


@pytest.mark.parametrize(
    ("fields", "text", "found"),
    [
        ({}, "A Dragon!", True),
        ({}, "a wyrm", False),
        ({"keys": ["wyrm", "dragon"]}, "dragonfly", True),
        ({"keys": "wyrm, dragon"}, "dragon", True),
        ({"keys": ["", "  "]}, "dragon", False),
        ({"keys": [" dragon "]}, "dragon", True),
        ({"keys": ["{{char}}"]}, "hello ann", True),
        ({"keys": ["ドラゴン"]}, "赤いドラゴンが", True),
        ({"keys": ["straße"]}, "STRASSE", True),
        ({"case_sensitive": True}, "Dragon", False),
        ({"case_sensitive": True}, "dragon", True),
        ({"enabled": False}, "dragon", False),
        ({"enabled": False, "constant": True}, "dragon", False),
        ({"enabled": "false"}, "dragon", False),
        ({"enabled": None}, "dragon", True),
        ({"constant": True}, "hello", True),
        ({"constant": True, "keys": [], "use_regex": True}, "hello", True),
        ({"constant": True, "use_regex": True}, "hello", False),
        ({"selective": True, "secondary_keys": ["gold", "cave"]}, "dragon", False),
        ({"selective": True, "secondary_keys": "gold, cave"}, "dragon in a cave", True),
        ({"selective": True, "secondary_keys": ["gold"]}, "gold", False),
        ({"selective": True, "secondary_keys": []}, "dragon", True),
        ({"selective": False, "secondary_keys": ["gold"]}, "dragon", True),
        ({"selective": True, "secondary_keys": ["gold"], "use_regex": True}, "dragon", True),
        ({"use_regex": True, "keys": [r"\bdrag(on|oon)s?\b"]}, "DRAGOONS", True),
        ({"use_regex": True, "keys": [r"\bdragon\b"]}, "dragonfly", False),
        ({"use_regex": True, "keys": ["/^DRAGON$/m"]}, "dragon", False),
        ({"use_regex": True, "keys": ["/^DRAGON$/im"]}, "a\ndragon\nb", True),
        ({"use_regex": True, "keys": ["dr.gon"], "case_sensitive": True}, "Dragon", False),
        ({"keys": ["dr.gon"]}, "dragon", False),
        ({"use_regex": True, "keys": ["(", "dragon"]}, "dragon", True),
        ({"use_regex": True, "keys": ["(?=dragon)"]}, "dragon", False),
    ],
    ids=str,
)
def test_an_entry_is_active_where_its_keys_are(fields: dict[str, Any], text: str, found: bool) -> None:
    assert active(book(entry() | fields), text) == ["yes"] * found


@pytest.mark.parametrize(
    ("decorators", "texts", "found"),
    [
        ("@@activate", ["hello"], True),
        ("@@dont_activate", ["dragon"], False),
        ("@@dont_activate\n@@activate", ["hello"], True),
        ("@@activate_only_after 2", ["a", "b", "dragon"], False),
        ("@@activate_only_after 2", ["a", "b", "c", "d", "dragon"], True),
        ("@@activate_only_every 2", ["a", "b", "dragon"], False),
        ("@@activate_only_every 2", ["a", "b", "c", "d", "dragon"], True),
        ("@@activate_only_every 0", ["a", "b", "dragon"], True),
        ("@@keep_activate_after_match", ["dragon", *"abcdefg", "hello"], True),
        ("", ["dragon", *"abcdefg", "hello"], False),
        ("@@dont_activate_after_match", ["dragon"], True),
        ("@@dont_activate_after_match", ["dragon", "b", "dragon"], False),
        ("@@scan_depth 1", ["dragon", "b", "c"], False),
        ("@@scan_depth 9", ["dragon", *"abcdefg"], True),
        ("@@scan_depth 0", ["dragon"], False),
        ("@@scan_depth 0\n@@scan_depth 9", ["dragon"], False),
        ("@@scan_depth many", ["dragon"], True),
        ("@@is_greeting 1", ["hi", "dragon"], True),
        ("@@is_greeting 0", ["hi", "dragon"], False),
        ("@@ignore_on_max_context", ["dragon"], False),
        ("@@additional_keys gold, cave", ["dragon"], False),
        ("@@additional_keys gold, cave", ["dragon in a Cave"], True),
        ("@@exclude_keys gold, cave", ["dragon in a cave"], False),
        ("@@exclude_keys gold, cave", ["dragon"], True),
        ("@@unheard_of 3\n@@@dont_activate", ["dragon"], False),
        ("@@unheard_of 3\n@@@also_not\n@@@scan_depth x\n@@@dont_activate", ["dragon"], False),
        ("@@scan_depth 3\n@@@dont_activate", ["dragon"], True),
        ("@@instruct_scan_depth 0\n@@reverse_depth 2\n@@is_user_icon x", ["dragon"], True),
        ("@@ACTIVATE", ["hello"], True),
    ],
    ids=str,
)
def test_decorators_have_their_say_and_leave_the_text(decorators: str, texts: list[str], found: bool) -> None:
    content = f"{decorators}\n\nyes\n@@unheard_of\n\nno @@depth" if decorators else "yes\nno @@depth"
    assert active(book(entry(content)), *texts, greeting=1, full=True) == ["yes\nno @@depth"] * found


def test_without_a_known_greeting_any_will_do() -> None:
    assert active(book(entry("@@is_greeting 3\nyes")), "dragon") == ["yes"]


def test_the_last_messages_are_scanned_as_many_as_the_book_says() -> None:
    texts = ["dragon", "b", "c", "d", "e"]
    for depth, found in ((None, 0), (5, 1), (4, 0), ("5", 1), (5.0, 1), (10**30, 1), (-1, 0), ("many", 0)):
        assert len(active(book(entry(), scan_depth=depth), *texts)) == found
    assert active(book(entry()), *texts[:4]) == ["yes"]


def test_contents_are_scanned_only_where_the_book_says_so() -> None:
    entries = [
        entry("gold", constant=True, insertion_order=3),
        entry("a {{hidden_key:crown}}cave {{// sword}}", ("gold",), insertion_order=2),
        entry("king", ("crown",), insertion_order=1),
        entry("knight", ("sword",)),
        entry("himself", ("himself",)),
    ]
    assert active(book(*entries), "hello") == ["gold"]
    assert active(book(*entries, recursive_scanning=True), "hello") == ["king", "a cave", "gold"]


def test_entries_come_in_their_order_and_the_lowest_leave_first() -> None:
    entries = [
        entry("aaaa", insertion_order=3, name="A"),
        entry("bbbb", insertion_order=1, name="B", priority=9),
        entry("cccc", insertion_order=2, name="C"),
        entry("dddd", insertion_order=2, name="D"),
        entry("@@ignore_on_max_context\neeee", insertion_order=99, name="E", priority=99),
        entry("", name="F"),
    ]
    for budget, left, out in (
        (None, "BCDAE", ""), (20, "BCDAE", ""), (19, "BCDA", "E"), (15, "BCA", "DE"), (11, "BA", "CDE"),
        (4, "B", "CDAE"), (3, "", "BCDAE"), (0, "", "BCDAE"), (-5, "", "BCDAE"),
    ):  # fmt: skip
        found = scan(book(*entries, token_budget=budget), chat("dragon"), ANN)
        assert ("".join(a.entry.name for a in found.active), "".join(found.left_out)) == (left, out)
        assert scan(book(*entries), chat("dragon"), ANN, room=budget) == found
    assert found.describe() == "lorebook: no entry is active; no room for B, C, D, A, E"
    assert scan(book(*entries), chat("dragon"), ANN).describe() == "lorebook: B, C, D, A, E (20 tokens)"


def test_macros_of_contents_are_drawn_for_each_reply_and_picks_once() -> None:
    made = book(entry("{{char}} {{random:a,b,c,d}} {{pick:a,b,c,d}}"))
    texts = [active(made, "dragon", moment=m)[0].split() for m in range(60)]
    assert [len({t[i] for t in texts}) for i in range(3)] == [1, 4, 1]


def test_where_an_entry_goes_is_read_from_its_fields_and_decorators() -> None:
    def place(**fields: Any) -> tuple[Any, ...]:
        (e,) = book(entry(**fields)).entries
        return e.position, e.decorators.depth, e.decorators.role, e.decorators.position

    assert place() == ("after_char", None, None, None)
    assert place(position="before_char") == ("before_char", None, None, None)
    assert place(position="sideways") == ("after_char", None, None, None)
    assert place(content="@@depth 3\n@@role user\nx") == ("after_char", 3, "user", None)
    assert place(content="@@depth x\n@@role king\n@@position scenario\nx") == ("after_char", None, None, "scenario")
    tavern = {"selectiveLogic": 0}
    assert place(extensions=tavern | {"position": 0}) == ("before_char", None, None, None)
    assert place(position="before_char", extensions=tavern | {"position": 1}) == ("after_char", None, None, None)
    assert place(extensions=tavern | {"position": 4, "depth": 2, "role": 1}) == ("after_char", 2, "user", None)
    assert place(extensions=tavern | {"position": 4, "role": "x"}) == ("after_char", 4, "system", None)
    assert place(content="@@depth 1\nx", extensions=tavern | {"position": 4}) == ("after_char", 1, None, None)


def test_sillytavern_means_patterns_only_between_slashes() -> None:
    extensions = {"selectiveLogic": 3, "position": 1}
    made = book(
        entry(keys=["Mr. C++", "/drag?on/i"], use_regex=True, extensions=extensions),
        entry("constant", [], constant=True, use_regex=True, extensions=extensions),
    )
    assert made.entries[0].keys == (Key("Mr. C++"), Key("drag?on", True, False))
    assert active(made, "mr. c++") == ["yes", "constant"]
    assert active(made, "a draon") == ["yes", "constant"]
    assert active(made, "Mrs Cppp") == ["constant"]


@pytest.mark.parametrize(
    ("logic", "found"), [(0, [1, 1, 0]), (1, [0, 1, 1]), (2, [0, 0, 1]), (3, [1, 0, 0]), (9, [1, 1, 0])]
)
def test_a_world_info_file_is_read_with_its_logic(logic: int, found: list[int], tmp_path: Path) -> None:
    world = {
        "uid": 0, "key": ["dragon"], "keysecondary": ["gold", "cave"], "content": "yes", "selective": True,
        "selectiveLogic": logic, "order": 7, "position": 0, "disable": False, "comment": "The\ndragon",
    }  # fmt: skip
    path = tmp_path / "The world.json"
    path.write_text(json.dumps({"entries": {"0": world, "1": world | {"disable": True, "constant": True}}}))
    made = load_lorebook(path)
    assert (made.name, made.entries[0].name, made.entries[0].insertion_order) == ("The world", "The dragon", 7)
    assert [len(active(made, f"dragon {t}")) for t in ("gold cave", "cave", "")] == found


def test_standalone_books_and_those_of_cards_are_read() -> None:
    data = {"name": "Mine", "entries": [entry()]}
    wanted = read_lorebook(data, "x")
    for raw in (data, {"spec": "lorebook_v3", "data": data}, {"spec": "x", "data": {"character_book": data}}):
        assert load_lorebook(json.dumps(raw).encode()) == wanted
    assert load_lorebook(json.dumps({"entries": []}).encode(), "a.json").name == "a.json"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "expected a lorebook in JSON"),
        (b"{}", "with `entries`, found {}"),
        (b"[1]", "with `entries`, found [1]"),
        (b'{"entries": 3}', "with `entries`"),
        (b'{"data": {"name": "x"}}', "with `entries`"),
        (b"[" * 100_000, "expected a lorebook in JSON"),
        (b" " * 20_000_001, "at most 20,000,000 bytes"),
    ],
    ids=lambda v: shown(v)[:30],
)
def test_a_file_that_is_no_lorebook_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(SteerError) as caught:
        load_lorebook(data, "world.json")
    assert str(caught.value).startswith("world.json: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_the_wrong_kind_is_reported_once_and_the_rest_is_used() -> None:
    made = book(
        entry(keys=["dragon", 3, None, {}], content="a"),
        entry(keys=["dragon", 4], content="b", insertion_order="high", priority=[]),
        entry(keys=3), entry(content=["x"]), "no entry", None, 7, entry("c", name={}, comment=5, constant="perhaps"),
        name=["x"], scan_depth="deep", token_budget={"a": 1}, recursive_scanning="often",
    )  # fmt: skip
    assert active(made, "dragon") == ["a", "b", "c"]
    assert (made.name, made.scan_depth, made.token_budget) == ("", None, None)
    places = [w.split(": expected")[0] for w in made.warnings]
    assert sorted(places) == sorted(
        ["book: name", "book: scan_depth", "book: token_budget", "book: recursive_scanning", "book: entries",
         "book: entries: keys", "book: entries: insertion_order", "book: entries: content", "book: entries: comment",
         "book: entries: constant"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+$", "(a*)*b", "((((a{1,100}){1,100}){1,100}){1,100})$", "(" * 400, "a{99999}", "(?R)", "a" * 501,
     "(((((((((a?){9}){9}){9}){9}){9}){9}){9}){9}){9}b", "(?:.*a){30}z", r"(\w+\s?)*!", "\ud800"],
)  # fmt: skip
def test_a_strangers_pattern_ends(pattern: str) -> None:
    assert active(book(entry(keys=[pattern], use_regex=True)), "a" * 100_000 + "?") == []


def test_patterns_that_do_not_work_are_named_once() -> None:
    made = book(
        entry(keys=["(?<=x)dragon", "["], use_regex=True, name="Fire"), entry("no", ["("], use_regex=True), entry()
    )
    found = scan(made, chat("dragon", "dragon"), ANN)
    assert [a.text for a in found.active] == ["yes"]
    assert len(found.warnings) == 3
    assert found.warnings[0].startswith("lorebook: Fire: expected a regular expression that RE2 knows, found '(?<=x)")


def test_after_a_second_no_further_pattern_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.core.lorebook.PATTERN_SECONDS", -1.0)
    found = scan(book(entry(keys=["drag.n"], use_regex=True), entry("plain")), chat("dragon"), ANN)
    assert [a.text for a in found.active] == ["plain"]
    assert found.warnings == ("lorebook: drag.n: the patterns take too long; the rest of them count as not found",)


ODD: list[Any] = [
    None, "", 0, -1, 3.5, 1e300, 10**400, True, [], {}, ["a"], [None], [[]], {"a": 1}, "a, b", "{{char}} {{random:a",
    "@@depth 1\nx", "@@role\n@@@depth", "/a/", "\ud83d", "\x1b[2J", "1e999", "NaN", "-5", 2**70, [{"keys": ["a"]}],
]  # fmt: skip
CARD_FIELDS = [
    "name", "description", "personality", "scenario", "first_mes", "mes_example", "system_prompt", "nickname",
    "creator_notes", "post_history_instructions", "alternate_greetings", "extensions", "character_version",
    "tags", "assets",
]  # fmt: skip
BOOK_FIELDS = [
    "name", "scan_depth", "token_budget", "recursive_scanning", "extensions",
]  # fmt: skip
ENTRY_FIELDS = [
    "keys", "secondary_keys", "content", "enabled", "insertion_order", "case_sensitive", "use_regex",
    "constant", "selective", "name", "comment", "priority", "position", "extensions", "uid", "key",
    "keysecondary", "order", "disable", "depth", "role", "scanDepth", "selectiveLogic",
]  # fmt: skip


def test_no_value_of_any_field_gets_past_the_one_line() -> None:
    rng = random.Random(16)

    def some(fields: list[str]) -> dict[str, Any]:
        return {name: rng.choice(ODD) for name in fields if rng.random() < 0.4}

    loaded = found = 0
    for _ in range(150):
        entries = [entry() | some(ENTRY_FIELDS) if rng.random() < 0.9 else rng.choice(ODD) for _ in range(4)]
        inside = some(BOOK_FIELDS) | {"entries": rng.choice([entries, {str(i): e for i, e in enumerate(entries)}])}
        data = some(CARD_FIELDS) | {"character_book": inside}
        card = rng.choice([{"data": data}, data, data | {"spec": rng.choice(ODD), "data": rng.choice(ODD)}])
        try:
            made = load_card(json.dumps(card).encode())
        except SteerError as e:
            lines: tuple[str, ...] = (str(e),)
        else:
            lines, loaded = made.warnings, loaded + 1
            if made.lorebook is not None:
                scanned = scan(made.lorebook, chat("a dragon"), made.macros, room=rng.choice([None, 0, 9]))
                lines, found = (*lines, *scanned.warnings, scanned.describe()), found + len(scanned.active)
        assert all("\n" not in line and len(line) < 900 for line in lines)
    assert loaded > 80
    assert found > 60


def test_the_entries_beyond_the_limit_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.core.lorebook.ENTRY_LIMIT", 2)
    made = book(entry("a"), entry("b"), entry("c"))
    assert active(made, "dragon") == ["a", "b"]
    assert made.warnings == ("book: entries: expected at most 2, found 3; the rest is left out",)

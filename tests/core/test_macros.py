"""Macros of cards and lorebooks: what each stands for, in any case and nesting, and that no text takes long."""

from __future__ import annotations

from datetime import datetime

import pytest

from steer.core.macros import TEXT_LIMIT, Macros
from steer.errors import SteerError

MACROS = Macros({"char": "Ann", "user": "{{char}} <bot>", "description": "A cook."}, seed=1)
NOW = datetime(2026, 3, 5, 15, 4)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{{char}} {{CHAR}} {{ Char }} <char> <BOT>", "Ann Ann Ann Ann Ann"),
        ("{{user}}|<User>", "{{char}} <bot>|{{char}} <bot>"),
        ("{{Description}}", "A cook."),
        ("a{{// secret {{char}} }}b{{//x}}{{comment: y}}{{comment}}{{hidden_key:z}}{{noop}}c", "abc"),
        ("{{reverse:Hello}} {{reverse::ab}} {{reverse {{char}}}}", "olleH ba nnA"),
        ("a{{newline}}b", "a\nb"),
        ("a \n\n{{trim}}\n\n{{TRIM}}\n b{{trim}}\n", "a  b"),
        ("{{random:Same,Same}} {{pick::Same,Same}} {{random::Same::Same}}", "Same Same Same"),
        (r"{{random:a\,b}}|{{random: x }}|{{random}}", "a,b|x|"),
        ("{{random:{{char}},<bot>}}", "Ann"),
        ("{{roll:1}} {{roll:d1}} {{roll:D1}} {{roll 3d1+4}} {{roll: 1d1 - 5 }}", "1 1 1 7 -4"),
        ("{{time}} {{date}} {{weekday}} {{isotime}} {{isodate}}", "3:04 PM March 5, 2026 Thursday 15:04 2026-03-05"),
        ("{char} {{}} {{ }} {{char", "{char} {{}} {{ }} {{char"),
        ("}} {{char}} {{a {{b {{char}}", "}} Ann {{a {{b Ann"),
    ],
)  # fmt: skip
def test_a_macro_stands_for_its_text(text: str, wanted: str) -> None:
    assert MACROS.expand(text, now=NOW) == wanted


def test_macros_that_are_not_known_stay_and_are_named() -> None:
    unknown: set[str] = set()
    text = "{{frob}} {{Glim::a::b}} {{roll:0}} {{roll:x}} {{char:x}} {{getvar::{{nix}}}}"
    assert MACROS.expand(text, unknown=unknown) == text
    assert unknown == {"frob", "glim", "roll", "char", "getvar", "nix"}


def test_a_hidden_key_is_there_for_scans_alone() -> None:
    text = "{{hidden_key: the crown }}{{// the sword}}"
    assert MACROS.expand(text) == ""
    assert MACROS.expand(text, hidden=True) == " the crown "


def test_random_draws_anew_at_each_moment_and_pick_does_not() -> None:
    random, pick, roll = "{{random:a,b,c,d}}", "{{pick:a,b,c,d}}", "{{roll:d6}}"

    def drawn(text: str, seed: int = 1) -> list[str]:
        return [Macros(seed=seed).expand(text, moment=moment) for moment in range(200)]

    assert set(drawn(random)) == {"a", "b", "c", "d"}
    assert drawn(random) == drawn(random)
    assert set(drawn(roll)) == {"1", "2", "3", "4", "5", "6"}
    assert len(set(drawn(pick))) == 1
    assert {drawn(pick, seed)[0] for seed in range(50)} == {"a", "b", "c", "d"}
    assert {MACROS.expand(" ".join([pick] * 3))[i] for i in (0, 2, 4)} != {"a"}
    assert len({MACROS.expand(pick * 8)}) == 1


@pytest.mark.parametrize(
    "text",
    ["{{char}}" * 110_000, "{{" * 20_000 + "}}" * 20_000, "{{user}}" * 90_000, "{{random:a,b}}" * 110_000],
    ids=lambda t: t[:10],
)
def test_a_text_of_macros_ends_at_the_limit(text: str) -> None:
    with pytest.raises(SteerError, match=f"at most {TEXT_LIMIT:,} characters"):
        MACROS.expand(text)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("\n" * 1_000_000 + "{{trim", 1_000_006),
        ("x" * 1_000_000 + "{{trim}}" * 100_000, 1_000_000),
        ("{{" + " " * 1_000_000, 1_000_002),
        ("{{x " + "a" * 1_000_000 + "}}", 1_000_006),
        ("{{random:" + ",," * 500_000 + "}}", 0),
        ("{{" * 100_000, 200_000),
    ],
    ids=["newlines", "trims", "spaces", "argument", "options", "open"],
)
def test_a_long_text_is_read_once(text: str, length: int) -> None:
    """A pattern that reads a part of it again and again would take hours."""
    assert len(MACROS.expand(text)) == length

"""Nothing that a stranger wrote is a command to the terminal that shows it."""

from __future__ import annotations

import io
import unicodedata
import warnings
from types import SimpleNamespace
from typing import Any, cast

import pytest
from commands import command_here
from rich.console import Console

from steer.chat.terminal import run_chat
from steer.cli.common import emit
from steer.errors import SkippedWarning, SteerError
from steer.plain_text import plain, plain_line
from steer.sae.records import Context, FeatureRecord
from steer.verbs.tables import feature_table, text_table

OSC_52 = "\x1b]52;c;cm0gLXJmIH4=\x07"
ATTACKS = [
    OSC_52, "\x1b[2J\x1b[H", "\x9b2J", "\x1b]0;title\x1b\\", "a\rb", "\x08\x08", "\x7f", "\u202eabc\u2066", "\0",
    "\x0c",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS)
def test_what_would_move_a_cursor_is_written_out(text):
    shown = plain(f"x{text}y\n\tz")
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not [c for c in shown if c in "\u202e\u2066"]
    assert shown.startswith("x")
    assert shown.endswith("y\n\tz")
    assert "".join(plain(c) for c in text) == plain(text)
    assert "\n" not in plain_line(f"a\n{text}\nb")


def test_text_of_every_script_stays_as_it_is():
    text = "Grüße, мир! 你好 👩‍🚀 שלום e\u0301\n\tx"
    assert plain(text) == text


@pytest.mark.parametrize("text", ATTACKS)
def test_no_way_to_the_terminal_lets_it_pass(text, capfd, monkeypatch):
    def broken(*_: object) -> None:
        emit({}, False, text)
        warnings.warn(SkippedWarning(text), stacklevel=1)
        raise SteerError(f"tensor {text}\nx")

    steer = command_here(monkeypatch, capfd)
    monkeypatch.setattr("steer.checkpoint.fetch.fetch", broken)
    done = steer("fetch")
    assert done.err.count("steer: ") == 2
    for written in (done.out, done.err):
        assert written
        assert text not in written
        assert written.count("\n") == len(written.splitlines())
    assert "[/red] [link=http://x]y" in text_table(["[/red]", "n"], [["[/red] [link=http://x]y", "1"]])


def test_a_table_shows_brackets_as_they_are():
    record = FeatureRecord(3, 0.1, 1.0, 2.0, [("[b]", 1.0)], [], [Context("a ", "lie", " x", 2.0)], [])
    table = feature_table([record], None)
    assert "[b]" in table
    assert "a [lie] x" in table
    assert "\\" not in table


@pytest.mark.parametrize("text", ATTACKS)
def test_a_chat_shows_replies_names_and_greetings_without_it(text):
    slider = SimpleNamespace(operation="add", site=1, share=lambda amount: 0.1)
    known = {f"n{text}": slider}

    class Sliders(dict[str, float]):
        def known(self) -> dict[str, Any]:
            return known

        def slider(self, name: str) -> Any:
            return known[name]

        def warnings(self) -> list[str]:
            return [f"w{text}"]

    session = SimpleNamespace(
        model=SimpleNamespace(name=f"m{text}"), messages=[{"content": f"hi{text}"}], sliders=Sliders({f"n{text}": 1.0}),
        reply=lambda line: (c for c in f"r{text}"), receipts=[SimpleNamespace(warnings=[f"v{text}"])],
        scanned=SimpleNamespace(warnings=[f"s{text}"]),
    )  # fmt: skip
    out = io.StringIO()
    lines = io.StringIO("hello\n/sliders\n/n" + text.replace("\r", "") + "\n/quit\n")
    run_chat(cast(Any, session), stdin=lines, console=Console(file=out, width=200, force_terminal=False))
    shown = out.getvalue()
    assert f"hi{plain(text)}" in shown
    assert f"r{plain(text)}" in shown
    assert not [c for c in shown if plain(c) != c]

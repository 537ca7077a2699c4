"""`steer evolve vote`: blind votes in a terminal, or from lines of a pipe."""

from __future__ import annotations

import logging
import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import transformers
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from steer.errors import UsageError
from steer.lineage.building import checkpoint
from steer.lineage.judging import REPLY, BlindPair, Choice, Judge
from steer.lineage.lineage import Lineage
from steer.plain_text import plain, plain_line

KEYS: dict[str, Choice] = {"1": "left", "2": "right", "3": "same", "4": "bad"}
HELP = "1 left   2 right   3 the same   4 both bad   u undo   m write a message   q leave"
PIPED = "Lines: 1 left, 2 right, 3 the same, 4 both bad, u undo, q leave; other text is a message"


def vote(
    place: Path, voter: str, *, scene: bool = False, prompt: str | None = None,
    max_new_tokens: int = REPLY.max_new_tokens, stdin: TextIO | None = None, console: Console | None = None,
) -> None:  # fmt: skip
    """Show pairs of replies and keep what the voter says of them, until q or the end of input.

    In a terminal a key is a vote at once. Elsewhere `stdin` (default: sys.stdin) has a line for each.
    Errors: as `Judge`; a voter's mistake is answered in one line, and the votes go on.
    """
    lines = stdin or sys.stdin
    lineage, sampler = Lineage(place), replace(REPLY, max_new_tokens=max_new_tokens)
    again = partial(checkpoint, lineage)
    with (
        _quiet_loading(),
        Judge(lineage, voter, scene=scene, prompt=prompt, checkpoint=again, sampler=sampler) as judge,
    ):
        _Ballot(judge, lines, console or Console()).run()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Models are loaded while people read: inside, neither bars nor notices of that come between the replies."""
    notices, bars = logging.getLogger("steer.checkpoint.dtypes"), transformers.logging.is_progress_bar_enabled()
    before = notices.level
    notices.setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        notices.setLevel(before)
        if bars:
            transformers.logging.enable_progress_bar()


class _Ballot:
    def __init__(self, judge: Judge, stdin: TextIO, console: Console) -> None:
        self.judge, self.stdin, self.console = judge, stdin, console
        self.interactive = stdin.isatty()
        self.sent = False
        self.lines = termios.tcgetattr(stdin) if self.interactive else []
        """The terminal's attributes for reading lines."""

    def run(self) -> None:
        if not self.interactive:
            self.votes()
            return
        keys = termios.tcgetattr(self.stdin)
        keys[3] &= ~(termios.ECHO | termios.ICANON)
        with _mode(self.stdin, keys):
            self.votes()

    def votes(self) -> None:
        self.say(HELP if self.interactive else PIPED)
        self.say(self.judge.standing.line)
        shown: BlindPair | None = None
        while True:
            blind_pair = self.blind_pair()
            if blind_pair is not shown:
                self.show(blind_pair)
                shown = blind_pair
            answer = self.key() if self.interactive else self.line()
            if answer in ("q", None):
                return
            try:
                self.answer(blind_pair, answer)
            except UsageError as e:
                self.say(str(e), style="red")

    def blind_pair(self) -> BlindPair:
        """Wait for the next pair. A message that no model can answer is refused, and the openings go on."""
        try:
            if (blind_pair := self.judge.blind_pair(wait=1)) is None:
                with self.console.status("writing replies"):
                    blind_pair = self.judge.blind_pair()
        except UsageError as e:
            if not self.sent:
                raise
            self.sent = False
            self.say(str(e), style="red")
            return self.blind_pair()
        assert blind_pair is not None  # it waits as long as it takes
        return blind_pair

    def show(self, blind_pair: BlindPair) -> None:
        if self.interactive:
            termios.tcflush(self.stdin, termios.TCIFLUSH)  # a key that was pressed before is no vote on this pair
        self.console.print()
        # In a scene the earlier messages are on the screen: only new ones are printed.
        for role, text in blind_pair.chat if len(blind_pair.chat) < 3 else blind_pair.chat[-2:]:
            self.say(f"{'you' if role == 'user' else role}: {text}", style="bold" if role == "user" else "dim")
        for key, text in (("1", blind_pair.left), ("2", blind_pair.right)):
            self.console.print(Panel(Text(plain(text) or "(no reply)"), title=key, title_align="left"))

    def key(self) -> str | None:
        """Return the key that is pressed; None for Ctrl-D, or when the terminal is gone."""
        key = os.read(self.stdin.fileno(), 1)
        return None if key in (b"", b"\x04") else key.decode(errors="replace").lower()

    def line(self) -> str | None:
        """Return the next line that is not blank; None at the end of input."""
        for line in self.stdin:
            if line.strip():
                return line.strip()
        return None

    def answer(self, blind_pair: BlindPair, answer: str) -> None:
        if answer in KEYS:
            self.judge.vote(blind_pair, KEYS[answer])
            self.say(self.judge.standing.line, style="dim")
            if self.interactive and (suggestion := self.judge.suggestion):
                self.message(f"you [{suggestion}]: ")
        elif answer == "u":
            self.judge.undo()
            self.say(f"taken back; {self.judge.standing.line}", style="dim")
        elif answer == "m" and self.interactive:
            self.message("you: ")
        elif self.interactive or len(answer) == 1:
            raise UsageError(f"expected a key of {HELP}, found {plain_line(answer)!r}")
        else:
            self.write(answer)

    def message(self, question: str) -> None:
        """Ask for a message; without text nothing changes."""
        with suppress(EOFError), _mode(self.stdin, self.lines):
            if text := input(plain(question)).strip():
                self.write(text)

    def write(self, text: str) -> None:
        self.judge.say(text)
        self.sent = True

    def say(self, text: str, style: str | None = None) -> None:
        # Markup is off, because the text may contain what people and models wrote.
        self.console.print(plain(text), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def _mode(terminal: TextIO, attributes: list[Any]) -> Iterator[None]:
    """Read from a terminal with these attributes inside the block."""
    before = termios.tcgetattr(terminal)
    termios.tcsetattr(terminal, termios.TCSADRAIN, attributes)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)

"""`steer chat`: a conversation in a terminal or through a pipe, with commands that move the sliders.

`steer.cli.live.chat` makes the `Session` (local or remote) and calls `run_chat`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer.chat.session import Session
from steer.chat.voting import Thumb, kept_votes, votes_place
from steer.core.cards import save_card_profile
from steer.core.names import COMMANDS
from steer.core.profile import Profile
from steer.core.slider import parse_amount
from steer.core.votes import LEAST, counted
from steer.errors import SteerError, UsageError
from steer.plain_text import plain, plain_line

HELP = """\
/NAME AMOUNT   move a slider, as in /moralizing -1; it acts from the next token on
/NAME:OP AMOUNT  use another operation: add, ablate, clamp, cap or scale, as in /moralizing:cap 0
/sliders       list the sliders and their amounts
/undo /redo    undo the last move of a slider, and redo it
/reset         reset all sliders, so that none moves anything
/reread        read the whole chat again under the current sliders; else they act on new tokens only
/receipt       show what the sliders did to the last reply, and which entries of lorebooks it was given
/good /bad     keep that the last reply is to your taste, or is not; steer find --votes makes a slider of that
/profile FILE  use a profile; /save FILE writes one, or puts it into the character card FILE (.png or .json)
/clear         forget the conversation
/quit          leave; so does Ctrl-D
Ctrl-C stops a reply."""

REREAD = "the whole chat will be read again, under the sliders as they stand then"
REPLACED = "\ufffd"
"""The character that replaces bytes that are not UTF-8."""
_UNLISTED = re.compile(r"L\d+/\d+|.+:[a-z]+")
"""Names of sliders that can be moved though they are not listed: a latent of a dictionary, or another operation."""


def run_chat(session: Session, *, stdin: TextIO | None = None, console: Console | None = None) -> bool:
    """Run a chat until /quit or the end of input. Return whether every line was answered without a mistake.

    Lines are read from `stdin` (default: sys.stdin) and all output goes to `console` (default: stdout). A user's
    mistake is answered in one line, and the chat goes on.

        run_chat(steer.Session(steer.load("merged")))
    """
    lines: TextIO = stdin or sys.stdin
    if isinstance(lines, TextIOWrapper):
        # Bytes that are not UTF-8 would end the chat, so they are read as lone surrogates, which `read` reports.
        lines.reconfigure(errors="surrogateescape")
    terminal = _Terminal(session, lines, console or Console())
    terminal.run()
    return not terminal.mistakes


class _Quit(Exception):
    pass


class _Terminal:
    def __init__(self, session: Session, stdin: TextIO, console: Console) -> None:
        self.session, self.stdin, self.console = session, stdin, console
        self.interactive = stdin.isatty()
        self.mistakes = 0
        self.commands = {
            "help": lambda: self.say(HELP),
            "sliders": self.show_sliders,
            "undo": lambda: self.step(session.sliders.undo(), "undo"),
            "redo": lambda: self.step(session.sliders.redo(), "redo"),
            "reset": lambda: self.say_after(session.sliders.reset, "no slider moves anything"),
            "reread": lambda: self.say_after(session.reread, REREAD),
            "receipt": self.show_receipt,
            "good": lambda: self.rate("good"),
            "bad": lambda: self.rate("bad"),
            "clear": lambda: self.say_after(session.clear, "conversation forgotten"),
            "quit": self.quit,
        }
        assert {*self.commands, "profile", "save"} == COMMANDS

    def run(self) -> None:
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() then knows arrow keys and past lines
            known = ", ".join(self.session.sliders.known()) or "none yet, see steer find"
            self.say(f"{self.session.model.name}. Sliders: {known}. /help lists the commands.")
        for message in self.session.messages:  # a character who speaks first
            self.say(message["content"])
        with suppress(_Quit):
            while (line := self.read()) is not None:
                self.answer(line.strip())

    def read(self) -> str | None:
        """Return the next line, None at the end of input. Bytes that are not UTF-8 are reported and become U+FFFD."""
        line = self.next_line()
        if line is None or line.isascii():
            return line
        read = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if read != line:
            self.say(f"input: expected UTF-8, found other bytes, read as {REPLACED}; set the terminal to UTF-8")
        return read

    def next_line(self) -> str | None:
        """Return the next line unchanged, None at the end of input."""
        if not self.interactive:
            return self.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            self.say("")
            return None
        except KeyboardInterrupt:
            self.say("\n/quit or Ctrl-D leaves")
            return ""

    def answer(self, line: str) -> None:
        """Run a command or send a message; a user's mistake is answered in one line."""
        try:
            if line.startswith("/"):
                self.command(line[1:])
            elif line:
                self.reply(line)
        except SteerError as e:
            self.mistakes += 1
            self.say(str(e), style="red")

    def reply(self, text: str) -> None:
        any_text = False
        try:
            with closing(self.session.reply(text)) as pieces:
                for piece in pieces:
                    self.console.out(plain(piece), end="", highlight=False)
                    any_text = any_text or bool(piece)
        except KeyboardInterrupt:
            self.say("\n(stopped)" if any_text else "(stopped)", style="dim")
        else:
            self.say("" if any_text else "(no reply)")
        warnings = (*self.session.scanned.warnings, *(self.session.receipts[-1].warnings if any_text else ()))
        for warning in warnings:
            self.say(warning, style="yellow")

    def command(self, line: str) -> None:
        known = self.session.sliders.known()
        # A slider's name may contain a space.
        labels = sorted((k for k in known if f"{line} ".startswith(f"{k} ")), key=len)
        name = labels[-1] if labels else line.split(" ", 1)[0]
        amount = line[len(name) :].strip()
        if name in self.commands:
            self.commands[name]()
        elif name in ("profile", "save"):
            self.file(name, amount)
        elif labels or _UNLISTED.fullmatch(name):
            self.move(name, amount)
        else:
            expected_commands = ", ".join(f"/{n}" for n in [*self.commands, "profile", "save", *known])
            raise UsageError(f"unknown command /{name}: expected one of {expected_commands}")

    def move(self, name: str, amount: str) -> None:
        """Set a slider, or without an amount only show it."""
        sliders = self.session.sliders
        if amount:
            sliders[name] = parse_amount(f"{name}={amount}")[1]
        slider = sliders.slider(name)
        share = _share(slider, sliders[name])
        far = f": {share} of the residual norm after block {slider.site}" if share else ""
        self.say(f"{name} {_amount(sliders[name])}{far}")
        self.warn()

    def file(self, command: str, path: str) -> None:
        if not path:
            raise UsageError(f"/{command}: expected a file, as in /{command} noir.yaml, found none")
        if command == "profile":
            self.session.use(Profile.load(path))
            self.show_sliders()
        else:
            profile = self.session.profile(Path(path).stem)
            into_card = Path(path).suffix.lower() in (".png", ".json")
            self.say(f"{save_card_profile(path, profile, path) if into_card else profile.save(path)} written")

    def show_sliders(self) -> None:
        sliders = self.session.sliders
        known = sliders.known()
        if not known:
            name = self.session.model.name
            self.say(f"no direction is known for {name}; find one: steer find {name} moralizing")
            return
        table = Table(box=box.SIMPLE if self.console.is_terminal else None, pad_edge=False)
        for heading in ("slider", "amount", "site", "share of residual norm"):
            table.add_column(heading, justify="left" if heading == "slider" else "right", no_wrap=True)
        for name, slider in known.items():
            amount = sliders[name]
            share = _share(slider, amount) if slider.operation == "add" else slider.operation
            table.add_row(Text(plain_line(name)), _amount(amount), str(slider.site), share)
        self.console.print(table)
        self.warn()

    def warn(self) -> None:
        for warning in self.session.sliders.warnings():
            self.say(warning, style="yellow")

    def show_receipt(self) -> None:
        if not self.session.receipts:
            self.say("no reply yet")
            return
        receipt = self.session.receipts[-1]
        if self.session.lore.all:
            self.say(self.session.scanned.describe())
        self.say(f"{receipt.tokens} tokens went through the model" + ("" if receipt.sliders else ", no slider moved"))
        for s in receipt.sliders:
            share = "" if math.isnan(s.mean_share) else f", {s.mean_share:.2f} of the residual norm on average"
            self.say(f"{s.name} {s.operation} {s.amount:g}: {s.tokens} tokens{share}")
        for warning in receipt.warnings:
            self.say(warning, style="yellow")

    def rate(self, thumb: Thumb) -> None:
        self.session.rate(thumb)
        votes, model = len(counted(kept_votes())), self.session.model.name
        rest = f"; a slider wants {LEAST}" if votes < LEAST else f": steer find {model} --votes {votes_place()}"
        self.say(f"kept; {votes} {'vote' if votes == 1 else 'votes'}{rest}", style="dim")

    def step(self, done: bool, what: str) -> None:
        if done:
            self.show_sliders()
        else:
            self.say(f"nothing to {what}")

    def say_after(self, change: Callable[[], None], text: str) -> None:
        change()
        self.say(text)

    def quit(self) -> None:
        raise _Quit

    def say(self, text: str, style: str | None = None) -> None:
        # Markup is off, because the text may contain paths and user input.
        self.console.print(plain(text), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _amount(amount: float) -> str:
    return "off" if math.isnan(amount) else f"{amount:g}"


def _share(slider: Any, amount: float) -> str:
    """Return how far a slider that adds moves the residual stream; nothing if that is unknown."""
    share = slider.share(amount) if slider.operation == "add" else math.nan
    return "" if math.isnan(share) else f"{share:.2f}"

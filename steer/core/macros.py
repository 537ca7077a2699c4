"""Macros in the texts of character cards and lorebooks: `{{char}}`, `{{random:a,b}}`, `{{time}}` and the like.

The rules are those of the Character Card V3 specification (github.com/kwaroran/character-card-spec-v3, SPEC_V3.md,
"Curly Braced Syntaxes"), and for names that are not in it those that SillyTavern documents.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from steer.errors import SteerError

TEXT_LIMIT = 4_000_000
"""Most characters that the macros of one text may stand for."""
_COST = 40
"""Characters that each macro counts for besides, which limits how many a text may have."""

_BRACES = re.compile(r"(\{\{|\}\})")
_OLD = re.compile(r"<(user|bot|char)>", re.IGNORECASE)
_TRIM = re.compile(r"\{\{\s*trim\s*\}\}", re.IGNORECASE)
_CALL = re.compile(r"\s*(\w+)\s*(::|:|\s|$)(.*)", re.DOTALL)
_COMMA = re.compile(r"(?<!\\),")
_DICE = re.compile(r"(?:(\d{0,3})d)?(\d{1,9})(?:([+-]\d{1,9}))?", re.IGNORECASE)


def _clock(now: datetime) -> dict[str, str]:
    return {
        "time": f"{now:%I:%M %p}".removeprefix("0"),
        "date": f"{now:%B} {now.day}, {now.year}",
        "weekday": f"{now:%A}",
        "isotime": f"{now:%H:%M}",
        "isodate": f"{now:%Y-%m-%d}",
    }


@dataclass(frozen=True)
class Macros:
    """What the macros of one chat stand for.

    >>> Macros({"char": "Ann", "user": "Bo"}).expand("{{Char}} greets <user>. {{reverse:olleH}}{{// a note}}")
    'Ann greets Bo. Hello'
    """

    values: Mapping[str, str] = field(default_factory=lambda: {"char": "Assistant", "user": "You"})
    """Name in lower case -> text: `char`, `user`, `persona`, `description` and so on."""
    seed: int = 0
    """Seed of the draws of `{{random}}`, `{{pick}}` and `{{roll}}`."""

    def having(self, values: Mapping[str, str]) -> Macros:
        """These macros, and further values."""
        return replace(self, values={**self.values, **values})

    def expand(
        self,
        text: str,
        *,
        moment: int = 0,
        hidden: bool = False,
        unknown: set[str] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Return a text with its macros replaced. Those that are not known stay as they are.

        Macros may stand in the arguments of others. Those in a replacement, such as a user's name, are not replaced.
        `moment`: another number draws anew in `{{random}}` and `{{roll}}`; `{{pick}}` always draws the same in the
        same text. `hidden`: `{{hidden_key:A}}` stands for A, as where a text is scanned for keys, and else for nothing.
        `unknown`: gets the names of macros that are not known. `now`: the time of the clock macros.
        Errors: SteerError for macros that stand for more than `TEXT_LIMIT` characters.
        """
        if "{{" not in text and "<" not in text:
            return text
        values = {**_clock(now or datetime.now()), **self.values}
        grown, drawn = 0, 0
        start = hashlib.blake2b(f"{self.seed} {text}".encode("utf-8", "replace"), digest_size=8)

        def counted(found: str) -> str:
            nonlocal grown
            grown += len(found) + _COST
            if grown > TEXT_LIMIT:
                raise SteerError(
                    f"expected macros that stand for at most {TEXT_LIMIT:,} characters, found more; take some out"
                )
            return found

        def draw(below: int, at: int) -> int:
            nonlocal drawn
            drawn += 1
            digest = start.copy()
            digest.update(f" {at} {drawn}".encode())
            return int.from_bytes(digest.digest(), "big") % below

        def value(inside: str) -> str:
            if inside.lstrip().startswith("//"):
                return ""
            match = _CALL.fullmatch(inside)
            name, mark, argument = (match[1].lower(), match[2], match[3]) if match else ("", "", "")
            if name == "hidden_key" and hidden:
                return argument
            if name in _NOTHING:
                return ""
            if name in _FUNCTIONS:
                at = 0 if name == "pick" else moment
                if (found := _FUNCTIONS[name](mark, argument, lambda below: draw(below, at))) is not None:
                    return found
            if not argument.strip() and name in values:
                return values[name]
            if unknown is not None:
                unknown.add(name or inside.strip()[:40])
            return "{{" + inside + "}}"

        def plain(text: str) -> str:
            return _OLD.sub(lambda m: counted(values["user" if m[1].lower() == "user" else "char"]), text)

        open_: list[list[str]] = [[]]
        for token in _BRACES.split(_trimmed(text)):
            if token == "{{":
                open_.append([])
            elif token == "}}" and len(open_) > 1:
                inside = "".join(open_.pop())
                open_[-1].append(counted(value(inside)))
            else:
                open_[-1].append(plain(token))
        return "{{".join("".join(parts) for parts in open_)


def _trimmed(text: str) -> str:
    """A text without `{{trim}}` and the line ends around it."""
    parts = _TRIM.split(text)
    ends = [part if i == len(parts) - 1 else part.rstrip("\n") for i, part in enumerate(parts)]
    return "".join(part if i == 0 else part.lstrip("\n") for i, part in enumerate(ends))


def _choice(mark: str, argument: str, draw: _Draw) -> str:
    parts = argument.split("::") if mark == "::" and "::" in argument else _COMMA.split(argument)
    return parts[draw(len(parts))].replace("\\,", ",").strip()


def _roll(mark: str, argument: str, draw: _Draw) -> str | None:
    match = _DICE.fullmatch("".join(argument.split()))
    if match is None or int(match[2]) == 0:
        return None
    return str(sum(1 + draw(int(match[2])) for _ in range(int(match[1] or 1))) + int(match[3] or 0))


_Draw = Callable[[int], int]
"""Returns a random number from 0 to below its argument."""
_FUNCTIONS: dict[str, Callable[[str, str, _Draw], str | None]] = {
    "random": _choice,
    "pick": _choice,
    "roll": _roll,
    "reverse": lambda mark, argument, draw: argument[::-1],
    "newline": lambda mark, argument, draw: "\n",
}
"""Name -> function of the separator and the argument. It returns None for an argument that it does not understand."""
_NOTHING = {"comment", "hidden_key", "noop"}

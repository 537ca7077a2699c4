"""Text of strangers that is safe to show: on a terminal, where some characters are commands to it."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"  # control characters: escape sequences, carriage returns
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the order of writing round
    r"\ud800-\udfff]"
)


def plain(text: str) -> str:
    """The text with every character written out that would move a terminal's cursor, fill its clipboard, or show other
    text than there is: `\\x1b` for an escape. Newlines and tabs stay.

    Character by character, so that the pieces of a text give what the whole gives.
    """
    return _HIDDEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def plain_line(text: str) -> str:
    """The same on one line: white space of any kind is one space."""
    return plain(" ".join(text.split()))

"""Text of strangers made safe: shown on a terminal without its commands, and encoded without half characters."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"  # control characters: escape sequences, carriage returns
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reverse the order of writing
    r"\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Replace each character that would move a terminal's cursor, fill its clipboard, or show text other than the real
    one, by its escape sequence, such as `\\x1b`. Newlines and tabs stay.

    Works character by character, so the pieces of a text give the same result as the whole text.
    """
    return _HIDDEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def plain_line(text: str) -> str:
    """`plain`, on one line: each run of white space becomes one space."""
    return plain(" ".join(text.split()))


def shortened(text: str, length: int) -> str:
    """Return the text with at most `length` characters, of which the last is an ellipsis if some are left out."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def without_surrogates(text: str) -> str:
    """Return the text with every lone surrogate replaced by U+FFFD.

    JSON, a page and clients that cut a text to a length can hold half of a surrogate pair, which no tokenizer and no
    UTF-8 file accepts.

    >>> without_surrogates("a\\ud83d") == "a\\ufffd"
    True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

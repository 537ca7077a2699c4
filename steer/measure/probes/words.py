"""What the probes of written text share: words, sentences and runs of words."""

from __future__ import annotations

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a text in small letters, without digits and punctuation."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.replace("\u2019", "'").lower())


def sentence_lengths(text: str) -> list[int]:
    """How many words each sentence of a text has. The last one may be cut off."""
    return [n for part in re.split(r"[.!?\n]+", text) if (n := len(words(part)))]


def runs(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every `n` words in a row."""
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def share(part: int, whole: int) -> float:
    """`part` / `whole`; 0 for an empty whole."""
    return part / whole if whole else 0.0

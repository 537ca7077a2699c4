"""Which words of two texts differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

Span = tuple[str, bool]
"""A part of a text, and whether the other text lacks it."""
_WORD = re.compile(r"\s+|\w+(?:['\u2019]\w+)*|[^\w\s]")
LONGEST = 4000
"""Words up to which differences are looked for; in longer texts everything past the common beginning counts."""


def marked(first: str, second: str) -> tuple[list[Span], list[Span]]:
    """Both texts in spans, which joined are the texts; spaces alone do not make a difference."""
    a, b = _WORD.findall(first), _WORD.findall(second)
    if max(len(a), len(b)) > LONGEST:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return _spans(a, [i >= same for i in range(len(a))]), _spans(b, [i >= same for i in range(len(b))])
    one, other = [i for i, w in enumerate(a) if not w.isspace()], [i for i, w in enumerate(b) if not w.isspace()]
    matcher = difflib.SequenceMatcher(None, [a[i] for i in one], [b[i] for i in other], autojunk=False)
    differs = [True] * len(a), [True] * len(b)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            differs[0][one[block.a + offset]] = differs[1][other[block.b + offset]] = False
    return _spans(a, _joined(a, differs[0])), _spans(b, _joined(b, differs[1]))


def _joined(words: Sequence[str], differs: list[bool]) -> list[bool]:
    """Spaces go with the words around them: they differ where both do."""
    out = list(differs)
    for i, word in enumerate(words):
        if word.isspace():
            out[i] = 0 < i < len(words) - 1 and differs[i - 1] and differs[i + 1]
    return out


def _spans(words: Sequence[str], differs: Sequence[bool]) -> list[Span]:
    out: list[Span] = []
    for word, other in zip(words, differs, strict=True):
        if out and out[-1][1] == other:
            out[-1] = (out[-1][0] + word, other)
        else:
            out.append((word, other))
    return out

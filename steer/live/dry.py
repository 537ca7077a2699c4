"""DRY, "don't repeat yourself": which tokens would lengthen a sequence that the text already has.

Definition: text-generation-webui, pull request 5677. A token that followed an earlier occurrence of the text's last n
tokens loses `multiplier * base ** (n - allowed_length)` of its logit, n being the longest such match and at least
`allowed_length`. No match reaches across a breaker, and no breaker is penalised.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from steer.values.sampler import Sampler

HARDEST = 60.0
"""Natural logarithm of the largest penalty: final for any logit, and still finite in fp32."""


class Repeats:
    """At every position of a text but the last: how many tokens up to there equal the text's last ones.

    Linear in the text to set up, and a pass over an array for each token appended.
    """

    def __init__(self, text: Sequence[int], breakers: frozenset[int], reach: int = 0) -> None:
        self.breakers = breakers
        self.reach = reach
        """Only this many last tokens are looked at; 0 is all."""
        self.text = np.asarray(text, dtype=np.int64)
        since_breaker = next((i for i, t in enumerate(reversed(text)) if t in breakers), len(text))
        # How far the reversed text agrees with its own tails, read backwards.
        lengths = np.asarray(common_prefixes(text[::-1])[:0:-1], dtype=np.int64)
        self.lengths = np.minimum(lengths, since_breaker)

    def append(self, token: int) -> None:
        """Add the text's next token."""
        same = (self.text == token) & (token not in self.breakers)
        self.lengths = same * np.insert(self.lengths + 1, 0, 1)
        self.text = np.append(self.text, token)

    def continuations(self, shortest: int = 1) -> dict[int, int]:
        """{token: the longest match of at least `shortest` tokens that it followed}, breakers left out."""
        start = max(len(self.text) - self.reach, 0) if self.reach else 0
        # A match begins within reach.
        lengths = np.minimum(self.lengths[start:], np.arange(1, len(self.text) - start))
        found: dict[int, int] = {}
        for i in np.flatnonzero(lengths >= max(shortest, 1)).tolist():
            token, length = int(self.text[start + i + 1]), int(lengths[i])
            if token not in self.breakers:
                found[token] = max(found.get(token, 0), length)
        return found

    def penalties(self, sampler: Sampler) -> dict[int, float]:
        """{token: what DRY takes from its logit}"""
        base, multiplier = math.log(sampler.dry_base), math.log(sampler.dry_multiplier)
        return {
            token: math.exp(min(multiplier + base * (length - sampler.dry_allowed_length), HARDEST))
            for token, length in self.continuations(sampler.dry_allowed_length).items()
        }


def common_prefixes(text: Sequence[int]) -> list[int]:
    """The z-function: for every i, how many tokens of text[i:] equal the text's first ones (Gusfield 1997, 1.4).

    Linear: what lies within the match that reaches furthest right is known from that match's own beginning.
    """
    lengths = [len(text)] + [0] * (len(text) - 1)
    left = right = 0
    for i in range(1, len(text)):
        n = min(right - i, lengths[i - left]) if i < right else 0
        while i + n < len(text) and text[n] == text[i + n]:
            n += 1
        lengths[i] = n
        if i + n > right:
            left, right = i, i + n
    return lengths


_SETS = 16
"""Sets of breakers that are kept for a tokenizer; one may hold most of the vocabulary."""


class _Known:
    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.sets: OrderedDict[tuple[str, ...], frozenset[int]] = OrderedDict()


_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_lock = threading.Lock()


def breaker_ids(tokenizer: Any, breakers: tuple[str, ...]) -> frozenset[int]:
    """The tokens that break a match. It takes part of a second; the last few sets are kept for each tokenizer.

    Of every breaker the last token of "a" + breaker, which is what DRY's definition takes (the letter keeps a
    tokenizer from treating it as the beginning of a text); and every token that has the breaker in it, because a
    tokenizer writes it together with its neighbours: a full stop and a quote, two line ends.
    """
    with _lock:
        if tokenizer not in _known:
            _known[tokenizer] = _Known(tokenizer)
        known = _known[tokenizer]
        if breakers in known.sets:
            known.sets.move_to_end(breakers)
            return known.sets[breakers]
        ids: set[int] = set()
        letter = tokenizer("a", add_special_tokens=False).input_ids
        for breaker in breakers:
            after_letter = tokenizer("a" + breaker, add_special_tokens=False).input_ids
            # A tokenizer that splits at spaces has no token for one.
            if after_letter != letter:
                ids.add(after_letter[-1])
        ids |= {i for i, text in enumerate(known.texts) if any(b in text for b in breakers)}
        known.sets[breakers] = frozenset(ids - {tokenizer.unk_token_id})
        while len(known.sets) > _SETS:
            known.sets.popitem(last=False)
        return known.sets[breakers]

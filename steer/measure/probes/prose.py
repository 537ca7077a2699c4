"""Prose: repetition, phrases that come back in other chats, words used far too often, and sentences of one length.

No list of phrases: what counts as a stock phrase is what this reader writes again and again, about different things.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from wordfreq import word_frequency

from steer.measure.harness import repetition
from steer.measure.probes.probe import (
    QUICK_TOKENS,
    Example,
    Figure,
    Metric,
    Opening,
    Probe,
    Reader,
    Result,
    Size,
    empty_note,
    fitting_openings,
    openings_to,
    replies_to,
)
from steer.measure.probes.stories import written
from steer.measure.probes.words import runs, sentence_lengths, share, words
from steer.progress import Advance

PHRASE = 4
"""Words of a phrase."""
CHATS, TIMES = 3, 30
"""A word is overused if replies to at least `CHATS` different prompts have it, and it is at least `TIMES` times as
frequent as in ordinary English (wordfreq)."""


class Prose(Probe):
    """What the replies to story prompts read like."""

    name = "prose"
    says = "Repetition, phrases and words that come back in every chat, and how different the sentences' lengths are."
    metrics = (
        Metric("overused", "lower", f"share of words {TIMES} times as frequent as in ordinary English"),
        Metric("reuse", "lower", "share of four-word phrases that another chat has too"),
        Metric("repetition", "lower", "share of three-word phrases seen before in the same reply"),
        Metric("distinct", "higher", "share of word pairs written once in all replies"),
        Metric("spread", "neither", "deviation of sentence lengths, as a share of their mean"),
        Metric("known", "higher", "share of words that English has"),
    )
    needs = frozenset({"replies"})

    def plan(self, size: Size) -> Any:
        """Return the prompts, how many replies each gets, and how long they are."""
        prompts = written("prose")
        return {"prompts": prompts, "samples": size.of(3, 1), "tokens": size.of(96, QUICK_TOKENS), "seed": size.seed}

    def openings(self, size: Size) -> list[Opening]:
        """Return every reply."""
        plan = self.plan(size)
        return openings_to(plan["prompts"], samples=plan["samples"], tokens=plan["tokens"], seed=size.seed)

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Let the reader write a reply to each prompt, and count."""
        whole, samples = self.openings(size), self.plan(size)["samples"]
        openings, notes = fitting_openings(reader, whole)
        texts = replies_to(reader, openings, advance)
        numbers, asked = [whole.index(o) for o in openings], [o.chat[0][1] for o in openings]
        return Result(
            [
                replace(figure, item=f"{number}")
                for number, of_reply in zip(numbers, measured(asked, texts), strict=True)
                for figure in of_reply
            ],
            [Example(f"{n}", a, "", t) for n, a, t in zip(numbers, asked, texts, strict=True) if n % samples == 0][:5],
            notes + empty_note(texts),
        )


def measured(prompts: list[str], texts: list[str]) -> list[list[Figure]]:
    """The figures of each reply, given with the prompts they answer. An empty one has a single figure: no word of it is
    known. It repeats nothing either, and would look better than any text."""
    replies = [words(text) for text in texts]
    places: dict[object, set[str]] = {}
    for prompt, reply in zip(prompts, replies, strict=True):
        for gram in {*reply, *runs(reply, PHRASE)}:
            places.setdefault(gram, set()).add(prompt)
    pairs = Counter(pair for reply in replies for pair in runs(reply, 2))
    counts = Counter(word for reply in replies for word in reply)
    most = {w: c / counts.total() / TIMES for w, c in counts.items() if len(places[w]) >= CHATS}
    overused = {w for w, limit in most.items() if word_frequency(w, "en") <= limit}
    out = []
    for i, (prompt, text, reply) in enumerate(zip(prompts, texts, replies, strict=True)):
        lengths, asked_words = sentence_lengths(text), set(words(prompt))
        values = {
            "overused": share(sum(w in overused - asked_words for w in reply), len(reply)),
            "reuse": share(sum(len(places[g]) > 1 for g in runs(reply, PHRASE)), len(runs(reply, PHRASE))),
            "repetition": repetition(reply),
            "distinct": share(sum(pairs[p] == 1 for p in runs(reply, 2)), len(runs(reply, 2))),
            "spread": float(np.std(lengths) / np.mean(lengths)) if lengths else 0.0,
            "known": share(sum(word_frequency(w, "en") > 0 for w in reply), len(reply)),
        }
        out.append([Figure(name, f"{i}", value, prompt) for name, value in values.items() if reply or name == "known"])
    return out

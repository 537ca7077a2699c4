"""Readers that are programs: they answer the probes without a model, from the items or from shallow cues."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from wordfreq import zipf_frequency

from steer.measure.probes.choice import Choice
from steer.measure.probes.probe import LogProbs, Passage

Liking = Callable[[Passage], float]
"""How much a reader likes a passage, in nats per token."""


class Synthetic:
    """A reader that likes each passage as much as `liking` says; one token is one character."""

    name = "synthetic"
    abilities = frozenset({"logprobs"})

    def __init__(self, liking: Liking, context: int = 10**6) -> None:
        self.liking, self.context = liking, context

    def length(self, passage: Passage) -> int:
        return sum(len(text) for _, text in passage.chat) + len(passage.begun) + len(passage.text)

    def logprobs(self, passages: Sequence[Passage], advance: object = None) -> list[LogProbs]:
        return [np.full(len(p.text), self.liking(p)) for p in passages]


def knowing(items: Sequence[Choice]) -> Liking:
    """A reader that knows the answers."""
    right = {i.passages[i.right] for i in items}
    return lambda p: 0.0 if p in right else -1.0


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def place(p: Passage, last: bool) -> float:
    """Where the option is first or last mentioned in the chat, as a share of it; 0 where it is not."""
    text = " ".join(t for _, t in p.chat).lower()
    found = (text.rfind if last else text.find)(p.text.strip().lower())
    return found / len(text)


SHALLOW: dict[str, Liking] = {
    "word overlap with the chat": lambda p: float(
        np.mean([w in words(" ".join(t for _, t in p.chat)) for w in words(p.text)])
    ),
    "word counts in the chat": lambda p: float(
        np.mean([words(" ".join(t for _, t in p.chat)).count(w) for w in words(p.text)])
    ),
    "longest": lambda p: float(len(p.text)),
    "shortest": lambda p: -float(len(p.text)),
    "most words": lambda p: float(len(words(p.text))),
    "first mentioned": lambda p: -place(p, last=False),
    "last mentioned": lambda p: place(p, last=True),
    "most frequent": lambda p: float(np.mean([zipf_frequency(w, "en") for w in words(p.text)])),
}
"""Readers that answer without understanding."""

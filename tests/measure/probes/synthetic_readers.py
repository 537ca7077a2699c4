"""Readers that are programs: they answer the probes without a model, from the items or from shallow cues."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256

import numpy as np
from wordfreq import zipf_frequency

from steer.measure.probes.choice import Choice
from steer.measure.probes.probe import Chat, LogProbs, Passage

Liking = Callable[[Passage], float]
"""How much a reader likes a passage, in nats per token."""


class Synthetic:
    """A reader that likes each passage as much as `liking` says. A token is a character, in what it reads as well."""

    name = "synthetic"
    abilities = frozenset({"logprobs"})

    def __init__(self, liking: Liking, context: int = 10**6) -> None:
        self.liking, self.context = liking, context

    def length(self, passage: Passage) -> int:
        return sum(len(text) for _, text in passage.chat) + len(passage.begun) + len(passage.text)

    def logprobs(self, passages: Sequence[Passage], advance: object = None) -> list[LogProbs]:
        return [np.full(len(p.text), self.liking(p)) for p in passages]


def knowing(items: Sequence[Choice]) -> Liking:
    """Return what a reader likes that knows the answers."""
    right = {i.passages[i.right] for i in items}
    return lambda p: 0.0 if p in right else -30.0


def guessing(items: Sequence[Choice], knows: float) -> Liking:
    """Return what a reader likes that is drawn to the right answers, `knows` times as far as to any other by chance."""
    right = {i.passages[i.right] for i in items}

    def liking(p: Passage) -> float:
        chance = np.random.default_rng(int.from_bytes(sha256(repr(p).encode()).digest()[:8])).normal()
        return knows * (p in right) + chance

    return liking


@cache
def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def read(chat: Chat) -> str:
    return " ".join(text for _, text in chat).lower()


def overlap(p: Passage) -> float:
    """The share of the option's words that the chat has."""
    return float(np.mean([w in words(read(p.chat)) for w in words(p.text)]))


def count(p: Passage) -> float:
    """How often the chat has the option's words."""
    return float(np.mean([words(read(p.chat)).count(w) for w in words(p.text)]))


def frequency(p: Passage) -> float:
    """How frequent the option's words are in English."""
    return float(np.mean([zipf_frequency(w, "en") for w in words(p.text)]))


def mentioned(p: Passage, last: bool) -> float:
    """Where the option is mentioned, first or last, as the number of sentences before it; -1 where it is not."""
    sentences = [option_in(s, p.text) for s in re.split(r"[.?:,] ?", read(p.chat))]
    found = [i for i, s in enumerate(sentences) if s]
    return found[-1 if last else 0] if found else -1


@cache
def option_in(sentence: str, option: str) -> bool:
    return option.strip().lower() in sentence


SHALLOW: dict[str, Liking] = {
    "word overlap with the chat": overlap,
    "words most often in the chat": count,
    "longest": lambda p: len(p.text),
    "shortest": lambda p: -len(p.text),
    "most words": lambda p: len(words(p.text)),
    "mentioned first": lambda p: -mentioned(p, last=False),
    "mentioned last": lambda p: mentioned(p, last=True),
    "most frequent": frequency,
    "rarest": lambda p: -frequency(p),
}
"""What readers like that answer without understanding."""

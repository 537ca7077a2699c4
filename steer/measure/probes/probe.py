"""What a probe asks of a reader, and what it returns: the values that probes, readers and the evaluation share.

A reader is a model that can be asked: a checkpoint under an edit, an OpenAI-compatible endpoint, or in tests a program
that knows the answers. A probe never sees a model, only a reader, so that every reader gets the same items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float

from steer.errors import UsageError
from steer.progress import Advance

Chat = tuple[tuple[str, str], ...]
"""(role, text) of each message; the roles are system, user and assistant."""
LogProbs = Float[np.ndarray, " tokens"]
TEMPERATURE = 0.8
"""Temperature of the replies that probes ask for."""
QUICK_TOKENS = 24
"""Tokens of each reply in a quick run. Replies of one length are written together."""
Ability = Literal["logprobs", "replies", "divergences", "weights"]
"""What a reader can do: one per method of `Reader`. "weights": it is a model in this process, `readers.LocalReader`."""


@dataclass(frozen=True)
class Passage:
    """A text whose tokens are scored, and what the model reads before it."""

    text: str
    begun: str = ""
    """The beginning of the same reply, or of the same plain text. It is read and not scored."""
    chat: Chat = ()
    """The chat that the reply answers. Empty: plain text, without a chat template."""


class Reader(Protocol):
    """A model that can be asked. Errors: SteerError in one line, such as for logits that are not finite."""

    name: str
    abilities: frozenset[Ability]
    context: int
    """How many tokens it reads at most, a prompt and its reply together."""
    dtype: str | None
    """The dtype that it computes in; None if unknown."""
    notes: list[str]
    """Lines for people on how it reads, such as a chat template that the checkpoint does not have."""

    def length(self, passage: Passage) -> int:
        """Return how many tokens a passage takes, all of it. An endpoint may estimate, upwards."""
        ...

    def logprobs(self, passages: Sequence[Passage], advance: Advance | None = None) -> list[LogProbs]:
        """Return the log-probability of each token of each passage's `text`, the first token left out where nothing
        comes before it. `advance`: called with passages done."""
        ...

    def replies(
        self,
        chats: Sequence[Chat],
        *,
        tokens: int,
        seeds: Sequence[int],
        advance: Advance | None = None,
    ) -> list[str]:
        """Return a reply of at most `tokens` tokens to each chat, without thoughts, drawn at `TEMPERATURE`. The same
        seed draws the same random numbers under every arm, so that differences come from the model."""
        ...

    def divergences(
        self, pairs: Sequence[tuple[Passage, Passage]], advance: Advance | None = None
    ) -> list[Float[np.ndarray, " tokens"]]:
        """Return KL(first || second) in nats at each token of a text that both passages of a pair score."""
        ...


@dataclass(frozen=True)
class Opening:
    """A reply that a probe asks for whatever the reader has said before."""

    chat: Chat
    seed: int
    tokens: int


def openings_to(prompts: Sequence[str], *, samples: int, tokens: int, seed: int) -> list[Opening]:
    """Return openings to messages of the user, each of them `samples` times in a row; no two have the same seed."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    return [Opening((("user", prompt),), seed * len(asked) + i, tokens) for i, prompt in enumerate(asked)]


def replies_to(reader: Reader, openings: Sequence[Opening], advance: Advance | None = None) -> list[str]:
    """Return the replies to openings of one length."""
    if not openings:
        return []
    (tokens,) = {o.tokens for o in openings}
    return reader.replies([o.chat for o in openings], tokens=tokens, seeds=[o.seed for o in openings], advance=advance)


def fitting_openings(reader: Reader, openings: Sequence[Opening]) -> tuple[list[Opening], list[str]]:
    """Return the openings that fit into the reader's context with a whole reply, and a note where some do not."""
    fits = [o for o in openings if fits_with_reply(reader, o)]
    left = len(openings) - len(fits)
    note = f"{left} of {len(openings)} replies left out: longer than the context of {reader.context} tokens"
    return fits, [note] if left else []


def fits_with_reply(reader: Reader, opening: Opening) -> bool:
    """Return whether a chat and a whole reply to it fit into the reader's context."""
    return reader.length(Passage("", chat=opening.chat)) + opening.tokens <= reader.context


def empty_note(texts: Sequence[str]) -> list[str]:
    """Return a note on replies without text, if there are any."""
    empty = sum(not text.strip() for text in texts)
    return [f"{empty} of {len(texts)} replies are empty"] if empty else []


@dataclass(frozen=True)
class Metric:
    """One figure of a probe. The mean over items is reported."""

    name: str
    better: Literal["higher", "lower", "neither"]
    """`neither`: a change is reported, not judged."""
    label: str
    """What the axis of a plot says, with the unit."""
    chance: float | None = None
    """What a reader scores that knows nothing of the text; None where there is no such level."""
    exponent: bool = False
    """Show e to the mean: a mean of nats per token becomes a perplexity."""


@dataclass(frozen=True)
class Figure:
    """The value of one metric for one item under one arm."""

    metric: str
    item: str
    """The item's name, by which arms are paired."""
    value: float
    group: str = ""
    """Items of one story are one group: they are resampled together. Empty: the item alone."""
    n: int | None = None
    """How hard the item is, in the probe's own unit, such as moves."""
    turn: int | None = None
    """How many messages of the chat come before the question."""


@dataclass(frozen=True)
class Example:
    """One item with what the reader made of it, for the report."""

    item: str
    asked: str
    """The end of the text that the reader read."""
    right: str
    """The right answer; empty where there is none."""
    answered: str
    """What the reader answered or wrote."""


@dataclass(frozen=True)
class Result:
    """What a probe found out about one reader."""

    figures: list[Figure]
    examples: list[Example] = field(default_factory=list)
    """Examples of the same items for every reader; the report shows five."""
    notes: list[str] = field(default_factory=list)
    """What was left out and why, one line each, such as turns that do not fit into the context."""


@dataclass(frozen=True)
class Size:
    """How much a probe asks. Errors: UsageError for a seed below 0."""

    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed: expected 0 or more, found {self.seed}; name another")

    def of(self, whole: int, quick: int) -> int:
        """Return `quick` in a quick run, else `whole`."""
        return quick if self.quick else whole


class Probe(ABC):
    """One question about a model."""

    name: str
    says: str
    """One sentence for people: what a higher figure means."""
    metrics: tuple[Metric, ...]
    """The first is the probe's headline."""
    n_label: str = ""
    """What `Figure.n` counts, for a plot's axis; empty where figures have none."""
    needs: frozenset[Ability]

    @abstractmethod
    def plan(self, size: Size) -> Any:
        """Return the items as JSON: what their hash is taken of. Two runs are comparable if it is the same."""

    def openings(self, size: Size) -> list[Opening]:
        """Return the replies that `run` asks for in any case. Those of all probes are written together: a step for a
        hundred replies takes little longer than one for twenty."""
        return []

    @abstractmethod
    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Ask the reader every item that fits into its context."""

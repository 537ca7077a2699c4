"""Forced choice: which of several continuations a reader finds most likely, with no judge and no sampling.

The score of an option is its log-probability per token over the whole continuation, so that long and short options
can be compared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from steer.measure.probes.probe import Chat, Example, Figure, Metric, Passage, Probe, Reader, Result, Size
from steer.progress import Advance

EXAMPLES = 5
"""How many items a report shows."""


@dataclass(frozen=True)
class Choice:
    """One forced-choice item."""

    id: str
    chat: Chat
    """What is read first; it ends with a message of the user."""
    begun: str
    """The beginning of the reply, before the options; empty where an option is the whole reply."""
    options: tuple[str, ...]
    """As they follow `begun`, with their first space where there is one."""
    right: int
    group: str = ""
    n: int | None = None
    turn: int | None = None
    metric: str = "accuracy"
    """The metric that the item counts for; controls count for one of their own."""

    @property
    def passages(self) -> list[Passage]:
        """What is scored: one passage per option."""
        return [Passage(option, self.begun, self.chat) for option in self.options]


def scores(
    reader: Reader, items: Sequence[Choice], advance: Advance | None = None
) -> list[Float[np.ndarray, " options"]]:
    """Return the mean log-probability per token of each option of each item."""
    found = iter(reader.logprobs([p for item in items for p in item.passages], advance))
    return [np.array([float(np.mean(next(found))) for _ in item.options]) for item in items]


class ForcedChoice(Probe):
    """A probe whose items are `Choice`s. Its figures are 1 for a right choice and 0 for a wrong one."""

    needs = frozenset({"logprobs"})
    metrics: tuple[Metric, ...] = (Metric("accuracy", "higher", "share of right answers"),)

    @abstractmethod
    def items(self, size: Size) -> list[Choice]:
        """Return the items, the same for the same size and seed."""

    def plan(self, size: Size) -> Any:
        """Return the items as JSON."""
        return [asdict(item) for item in self.items(size)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Score every item that fits into the reader's context."""
        asked = self.items(size)
        items = [i for i in asked if max(map(reader.length, i.passages)) <= reader.context]
        notes = []
        if len(items) < len(asked):
            longest = max((i.turn or 0 for i in items), default=0)
            notes.append(
                f"{len(asked) - len(items)} of {len(asked)} items left out: longer than the context of "
                f"{reader.context} tokens; the longest chat asked has {longest} messages"
            )
        found = scores(reader, items, advance)
        return Result(
            [
                Figure(i.metric, i.id, float(s.argmax() == i.right), i.group, i.n, i.turn)
                for i, s in zip(items, found, strict=True)
            ],
            [_example(i, s) for i, s in list(zip(items, found, strict=True))[:: max(1, len(items) // EXAMPLES)]],
            notes,
        )


def _example(item: Choice, scored: Float[np.ndarray, " options"]) -> Example:
    share = np.exp(scored - scored.max())
    share /= share.sum()
    options = ", ".join(f"{o.strip()} ({p:.2f})" for o, p in zip(item.options, share, strict=True))
    last = item.chat[-1][1] if item.chat else ""
    return Example(item.id, f"{last}\n{item.begun}…", item.options[item.right].strip(), options)

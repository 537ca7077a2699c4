"""Forced choice: which of several continuations a reader finds most likely, with no judge and no sampling.

The score of an option is its log-probability per token over the whole continuation, so that long and short options
can be compared. Some options are likely in themselves, whatever the chat says (Holtzman et al. 2021, "Surface form
competition"). So items come in families that offer the same options, and an option's score is relative to its mean over
the family, which is the reader's preference whatever the chat says. In a family each option is right equally often, or
the family has controls, whose chat lacks the decisive facts, and the mean is taken over those. A reader that sees only
the options scores chance, exactly. On the default merge 0.57 of `implications` are right by plain scores, 0.79 by
relative ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from steer.measure.probes.probe import Chat, Example, Figure, Metric, Passage, Probe, Reader, Result, Size
from steer.progress import Advance

EXAMPLES = 5
"""How many items a report shows."""

MARGIN = Metric("margin", "higher", "right less wrong options, nats per token", 0.0)
"""The score of the right option less the mean of the others."""
TIE = 1e-6
"""Scores nearer than this, in nats, are equal: they differ by rounding."""


@dataclass(frozen=True)
class Choice:
    """One forced-choice item."""

    id: str
    chat: Chat
    """What is read first; it ends with a message of the user."""
    begun: str
    """The beginning of the reply, before the options; empty where an option is the whole reply."""
    options: tuple[str, ...]
    """The continuations, with the space that follows `begun` where there is one."""
    right: int
    group: str = ""
    n: int | None = None
    turn: int | None = None
    metric: str = "accuracy"
    """The metric that the item counts for; controls have a separate one."""
    family: str = ""
    """Items of one family offer the same options. Empty: the item alone, scored as it is."""
    control: bool = False
    """Scored as it is; the other items of its family are compared with it."""

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


def relative(
    items: Sequence[Choice], found: Sequence[Float[np.ndarray, " options"]]
) -> list[Float[np.ndarray, " options"]]:
    """Return the scores less each option's mean over the controls of the item's family, or over all of a family without
    controls; those of controls and of items without a family as they are."""
    controlled = {i.family for i in items if i.control}
    means: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for item, values in zip(items, found, strict=True):
        if item.control or item.family not in controlled:
            for option, value in zip(item.options, values, strict=True):
                means[item.family, option].append(float(value))
    return [
        values if item.control or not item.family else values - [np.mean(means[item.family, o]) for o in item.options]
        for item, values in zip(items, found, strict=True)
    ]


def fitting(reader: Reader, asked: Sequence[Choice]) -> tuple[list[Choice], list[str]]:
    """Return the items whose whole family fits into the reader's context, and a note where some do not."""
    long = {i.family or i.id for i in asked if max(map(reader.length, i.passages)) > reader.context}
    # A family is asked as a whole, or its options would no longer be right equally often.
    items = [i for i in asked if (i.family or i.id) not in long]
    if not long:
        return items, []
    longest = max((i.turn or 0 for i in items), default=0)
    return items, [
        f"{len(asked) - len(items)} of {len(asked)} items left out: longer than the context of {reader.context} "
        f"tokens; the longest chat asked has {longest} messages"
    ]


class ForcedChoice(Probe):
    """A probe whose items are `Choice`s.

    Its figures are 1 for a right choice, 0 for a wrong one, and for several that are equal the share of the right one.
    Items of the first metric also have a margin, which shows changes that are too small to change a choice.
    """

    needs = frozenset({"logprobs"})

    @abstractmethod
    def items(self, size: Size) -> list[Choice]:
        """Return the items, the same for the same size and seed."""

    def plan(self, size: Size) -> Any:
        """Return the items as JSON."""
        return [asdict(item) for item in self.items(size)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Score every item that fits into the reader's context."""
        return self.ask(reader, self.items(size), advance)

    def ask(self, reader: Reader, asked: Sequence[Choice], advance: Advance | None = None) -> Result:
        """Score those of these items that fit into the reader's context; families are asked whole."""
        items, notes = fitting(reader, asked)
        found = relative(items, scores(reader, items, advance))
        shown = list(zip(items, found, strict=True))[:: max(1, len(items) // EXAMPLES)]
        return Result(self.figures(items, found), [example(i, s) for i, s in shown], notes)

    def figures(self, items: Sequence[Choice], found: Sequence[Float[np.ndarray, " options"]]) -> list[Figure]:
        """Return the figures of items, from the scores of the options of each."""
        pairs = list(zip(items, found, strict=True))
        chosen = [Figure(i.metric, i.id, _chosen(s, i.right), i.group, i.n, i.turn) for i, s in pairs]
        return chosen + [
            Figure(MARGIN.name, i.id, float(s[i.right] - np.delete(s, i.right).mean()), i.group, i.n, i.turn)
            for i, s in pairs
            if i.metric == self.metrics[0].name
        ]


def _chosen(scored: Float[np.ndarray, " options"], right: int) -> float:
    best = scored >= scored.max() - TIE
    return float(best[right] / best.sum())


def example(item: Choice, scored: Float[np.ndarray, " options"]) -> Example:
    """Return an item with its scores as shares of the options, for the report."""
    share = np.exp(scored - scored.max())
    share /= share.sum()
    options = ", ".join(f"{o.strip()} ({p:.2f})" for o, p in zip(item.options, share, strict=True))
    last = item.chat[-1][1] if item.chat else ""
    return Example(item.id, f"{last}\n{item.begun}…", item.options[item.right].strip(), options)

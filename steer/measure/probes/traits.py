"""Moralizing and compliance: how much of a trait the replies to its held-out topics show, judged by a text scorer.

The scorers ship: word weights learnt from the default merge's contrast replies to the fit topics. They are the same for
every model, so that figures of different models can be compared, and see words alone.
"""

from __future__ import annotations

from typing import Any

from steer.core.trait import Trait
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
from steer.measure.scorer import Scorer
from steer.progress import Advance

TOKENS = 48


class TraitShown(Probe):
    """How much the replies show one trait that has a shipped scorer."""

    metrics = (
        Metric("probability", "neither", "probability that a reply shows the trait"),
        Metric("rate", "neither", "share of replies that show the trait"),
    )
    needs = frozenset({"replies"})

    def __init__(self, trait: str, says: str) -> None:
        self.name, self.says = trait, says

    def plan(self, size: Size) -> Any:
        """Return the topics, how many replies each gets, how long they are, and what the scorer weighs."""
        held_out = Trait.load(self.name).held_out
        topics = held_out[: size.of(len(held_out), 16)]
        scorer = Scorer.shipped(self.name).as_json()
        return {
            "topics": topics,
            "samples": size.of(4, 1),
            "tokens": size.of(TOKENS, QUICK_TOKENS),
            "seed": size.seed,
            "scorer": scorer,
        }

    def openings(self, size: Size) -> list[Opening]:
        """Return every reply, those to one topic in a row."""
        plan = self.plan(size)
        return openings_to(plan["topics"], samples=plan["samples"], tokens=plan["tokens"], seed=size.seed)

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Let the reader reply to every held-out topic, and score the replies."""
        plan, whole = self.plan(size), self.openings(size)
        openings, notes = fitting_openings(reader, whole)
        asked = [(o.chat[0][1], whole.index(o) % plan["samples"]) for o in openings]
        texts = replies_to(reader, openings, advance)
        if not texts:
            return Result([], notes=notes)
        found = Scorer.shipped(self.name).probabilities(texts)
        figures = [
            Figure(metric, f"{topic} {i}", float(value), topic)
            for (topic, i), p in zip(asked, found, strict=True)
            for metric, value in (("probability", p), ("rate", p > 0.5))
        ]
        examples = [
            Example(f"{topic} {i}", topic, "", f"{text} ({p:.2f})")
            for (topic, i), text, p in list(zip(asked, texts, found, strict=True))[:: plan["samples"] * 5]
        ]
        return Result(figures, examples, notes + empty_note(texts))


MORALIZING = TraitShown("moralizing", "How much the model preaches when people tell it of small sins.")
COMPLIANCE = TraitShown("compliance", "How readily the model says yes, as a servant instead of a character.")

"""Persona: whether the model still is who its card says, by facts and by how far the card moves its words.

A card states the same facts of four people and ends with which of them the model is. The model is each of the four
once: what is right then depends only on whose card it is. The names have the same length.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from itertools import product
from typing import Any

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Chat, Figure, Metric, Passage, Reader, Result, Size
from steer.measure.probes.stories import small_talk, written
from steer.progress import Advance

PEOPLE = 4
"""People on a card."""


class Persona(ForcedChoice):
    """Facts of the card, asked at several turns of small talk."""

    name = "persona"
    says = "How often the model states the facts of its character and not of others, and how much its card matters."
    needs = frozenset({"logprobs", "divergences"})
    metrics = (
        Metric("accuracy", "higher", "share of facts stated correctly", 1 / PEOPLE),
        MARGIN,
        Metric("distance", "neither", "KL divergence from the reply without the card, nats per token"),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return every fact of every card at every turn."""
        rng, given = random.Random(f"persona {size.seed}"), written("people")
        turns = (0, 8) if size.quick else (0, 8, 24)
        talk = small_talk(rng, max(turns))
        out = []
        for world in range(size.of(3, 1)):
            names = rng.sample(given["names"], PEOPLE)
            facts = [(fact, rng.sample(fact["of"], PEOPLE)) for fact in given["facts"]]
            lines = [
                f"{name} {', '.join(fact['says'].format(of[i]) for fact, of in facts)}." for i, name in enumerate(names)
            ]
            for number, name in enumerate(names):
                card = ("system", " ".join([*lines, f"You are {name}."]))
                for turn, (fact, of) in product(turns, facts):
                    options = rng.sample(of, PEOPLE)
                    place = f"{world} {fact['begun']} {turn}"
                    out.append(
                        Choice(
                            f"{place} {name}",
                            (card, *talk[:turn], ("user", fact["asked"])),
                            fact["begun"],
                            tuple(f" {option}" for option in options),
                            options.index(of[number]),
                            place,
                            turn=turn,
                            family=place,
                        )
                    )
        return out

    def pairs(self, size: Size) -> list[tuple[Choice, tuple[Passage, Passage]]]:
        """Return items whose right answer is also read without the card, each with that answer with and without it."""
        items = [item for item in self.items(size) if item.id.startswith("0 ")]
        return [(i, (_answer(i, i.chat), _answer(i, i.chat[1:]))) for i in items[:: size.of(2, 8)]]

    def plan(self, size: Size) -> Any:
        """Return the items, and those that are also read without the card."""
        return {"items": super().plan(size), "pairs": [[asdict(p) for p in pair] for _, pair in self.pairs(size)]}

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Score the facts, and compare the right answers with and without the card."""
        result = super().run(reader, size, advance)
        scored = {figure.item for figure in result.figures}
        pairs = [(item, pair) for item, pair in self.pairs(size) if item.id in scored]
        found = reader.divergences([pair for _, pair in pairs], advance)
        for (item, _), kl in zip(pairs, found, strict=True):
            result.figures.append(Figure("distance", item.id, float(kl.mean()), item.group, turn=item.turn))
        return result


def _answer(item: Choice, chat: Chat) -> Passage:
    return Passage(f"{item.begun}{item.options[item.right]}.", chat=chat)

"""Persona: whether the model still is who its card says, by facts and by how far the card moves its words.

Each card tells the same facts of four people, one of whom is the model's character, so that an option cannot be chosen
because the card has its words. Over all cards each place in the card and among the options is right as often.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from steer.measure.probes.choice import Choice, ForcedChoice
from steer.measure.probes.probe import Chat, Figure, Metric, Passage, Reader, Result, Size
from steer.measure.probes.stories import written
from steer.progress import Advance

PEOPLE = 4
"""People on a card."""


class Persona(ForcedChoice):
    """Facts of the card, asked at several turns of small talk."""

    name = "persona"
    says = "How often the model tells the facts of its own character and not of others, and how much its card matters."
    needs = frozenset({"logprobs", "divergences"})
    metrics = (
        Metric("accuracy", "higher", "share of facts told right", 1 / PEOPLE),
        Metric("distance", "higher", "KL divergence from the reply without the card, nats per token"),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return every fact of every card at every turn."""
        rng = random.Random(size.seed)
        talk = [("user", "assistant")[i % 2] for i in range(48)]
        lines = [text for pair in rng.sample(written("dialogue"), 24) for text in pair]
        small_talk = list(zip(talk, lines, strict=True))
        turns = (0, 8) if size.quick else (0, 8, 24)
        return [i for card in range(size.of(12, 4)) for i in _items(rng, card, [tuple(small_talk[:t]) for t in turns])]

    def pairs(self, size: Size) -> list[tuple[Choice, tuple[Passage, Passage]]]:
        """Return the items whose right answer is also read without the card, and that answer with and without it."""
        return [
            (item, (_answer(item, item.chat), _answer(item, item.chat[1:])))
            for item in self.items(size)
            if int(item.group.split()[1]) < size.of(4, 2)
        ]

    def plan(self, size: Size) -> Any:
        """Return the items, and those that are also read without the card."""
        return {"items": super().plan(size), "pairs": [[asdict(p) for p in pair] for _, pair in self.pairs(size)]}

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Score the facts, and compare the right answers with and without the card."""
        result = super().run(reader, size, advance)
        told = {figure.item for figure in result.figures}
        pairs = [(item, pair) for item, pair in self.pairs(size) if item.id in told]
        found = reader.divergences([pair for _, pair in pairs], advance)
        for (item, _), kl in zip(pairs, found, strict=True):
            result.figures.append(Figure("distance", item.id, float(kl.mean()), item.group, turn=item.turn))
        return result


def _answer(item: Choice, chat: Chat) -> Passage:
    return Passage(f"{item.begun}{item.options[item.right]}.", chat=chat)


def _items(rng: random.Random, card: int, talks: list[Chat]) -> list[Choice]:
    """The facts of one card, after each of the beginnings of a chat."""
    given, place = written("people"), card % PEOPLE
    names = rng.sample(given["names"], PEOPLE)
    facts = [(fact, rng.sample(fact["of"], PEOPLE)) for fact in given["facts"]]
    lines = []
    for i, name in enumerate(names):
        if i == place:
            says = [f"{fact['begun'].replace('I ', 'you ')} {of[i]}" for fact, of in facts]
            lines.append(f"You are {name}: {', '.join(says)}.")
        else:
            lines.append(f"{name} {', '.join(fact['says'].format(of[i]) for fact, of in facts)}.")
    chat: Chat = (("system", " ".join([*lines, f"Answer as {names[place]}."])),)
    out = []
    for talk in talks:
        for number, (fact, of) in enumerate(facts):
            right = (card // PEOPLE + number + card) % PEOPLE
            others = [value for value in of if value != of[place]]
            options = [*others[:right], of[place], *others[right:]]
            out.append(
                Choice(
                    f"{fact['begun']} {card} {len(talk)}",
                    (*chat, *talk, ("user", fact["asked"])),
                    fact["begun"],
                    tuple(f" {option}" for option in options),
                    right,
                    f"card {card}",
                    turn=len(talk),
                )
            )
    return out

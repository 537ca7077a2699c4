"""Whether a model follows a page in the chat that contradicts what its weights say."""

from __future__ import annotations

import random
from typing import Any

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Metric, Size
from steer.measure.probes.stories import small_talk, written

LATER = (0, 2, 6)
"""How many messages of small talk come between a page and its questions."""
WORLDS = ("Arlan", "Borrin", "Calder", "Dorne", "Esmar", "Faldor", "Gorvan", "Hestia", "Ilmar", "Jorrek")


class Knowledge(ForcedChoice):
    """A page gives each of four subjects the everyday answer of another one: does the model answer by the page?

    Every answer is right for one of the four subjects, with the page and without it. What counts is by how much the
    page makes an answer likelier than it is without the page, so that a model that is sure of the everyday answer still
    shows whether it read the page.
    """

    name = "knowledge"
    says = "How well the model takes up what a page in the chat says where its weights say something else."
    metrics = (
        Metric("follows", "higher", "share of answers made likelier by their page", 0.25),
        MARGIN,
        Metric("weights", "higher", "share of everyday answers without a page", 0.25),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return, for each page, four questions after it, and four questions without it for each fact."""
        rng, facts = random.Random(f"knowledge {size.seed}"), written("knowledge")
        asked = rng.sample(facts, size.of(len(facts), 10))
        pages = [
            item
            for page in range(size.of(2, 1))
            for i, fact in enumerate(asked)
            for item in _questions(rng, fact, f"{i:02} page {page}", i, LATER[(i + page) % 3])
        ]
        return pages + [item for i, fact in enumerate(asked) for item in _questions(rng, fact, f"{i:02}", i)]


def _questions(
    rng: random.Random, fact: dict[str, Any], name: str, number: int, later: int | None = None
) -> list[Choice]:
    """Return the four questions; `later` is None without a page."""
    answers: dict[str, str] = fact["answers"]
    subjects, right, chat = list(answers), answers, ()
    if later is not None:
        shift, world = rng.choice((1, 2, 3)), rng.choice(WORLDS)
        order = rng.sample(subjects, 4)
        right = {of: answers[order[(i + shift) % 4]] for i, of in enumerate(order)}
        facts = " ".join(f"{fact['fact'].format(of=of)} {right[of]}." for of in rng.sample(subjects, 4))
        chat = (
            ("user", f"A page of the book of {world}, where things are not as they are with us: {facts}"),
            ("assistant", f"I see. I will answer as the book of {world} says."),
            *small_talk(rng, later),
        )
    places = rng.sample(range(4), 4)
    items = []
    for place, of in zip(places, subjects, strict=True):
        options = rng.sample([a for a in answers.values() if a != right[of]], 3)
        options.insert(place, right[of])
        items.append(
            Choice(
                f"{name} {of}",
                (*chat, ("user", fact["ask"].format(of=of))),
                fact["fact"].format(of=of),
                tuple(f" {o}" for o in options),
                place,
                f"{number:02}",
                turn=None if later is None else len(chat),
                metric="weights" if later is None else "follows",
                family=f"{number:02} {of}",
                control=later is None,
            )
        )
    return items

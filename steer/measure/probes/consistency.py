"""Whether a model answers the same when it is asked the same in other words, and again many messages later."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from steer.measure.probes.choice import EXAMPLES, Choice, example, fitting, scores
from steer.measure.probes.probe import Figure, Metric, Probe, Reader, Result, Size
from steer.measure.probes.stories import small_talk, told, written
from steer.progress import Advance

LATER = (0, 10, 30)
"""After how many messages of small talk the questions are asked."""


class Consistency(Probe):
    """Three questions on one story, each asked in five ways and at three times, with the same three options.

    How near two answers are is 1 less the Jensen-Shannon distance of their distributions over the options. Answers that
    never change are near each other and say nothing, so what counts is how much nearer the answers to one question are
    than those to the other questions of the same story.
    """

    name = "consistency"
    says = "how far the model answers the same to the same question in other words and many messages later"
    needs = frozenset({"logprobs"})
    metrics = (
        Metric("consistency", "higher", "agreement on one question less that between questions", 0.0),
        Metric("agreement", "neither", "1 less the Jensen-Shannon distance of answers to one question"),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return the questions; those of one family are the same one in other words and at other times."""
        rng, stories = random.Random(f"consistency {size.seed}"), written("consistency")
        return [
            item for number in range(size.of(10, 2)) for item in _asked(rng, stories[number % len(stories)], number)
        ]

    def plan(self, size: Size) -> Any:
        """Return the items as JSON."""
        return [asdict(item) for item in self.items(size)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Compare each answer with all others to the same question, and with those to the other questions."""
        items, notes = fitting(reader, self.items(size))
        found = scores(reader, items, advance)
        shown = list(zip(items, found, strict=True))[:: max(1, len(items) // EXAMPLES)]
        return Result(_compared(items, found), [example(i, s) for i, s in shown], notes)


def _asked(rng: random.Random, story: dict[str, Any], number: int) -> list[Choice]:
    people = rng.sample(written("positions")["people"], 3)
    things = rng.sample(story["things"], 3)
    facts = [story["fact"].format(who=who, thing=thing) for who, thing in zip(people, things, strict=True)]
    options, talk = rng.sample(people, 3), small_talk(rng, max(LATER))
    begun = told([" ".join(facts)], 1)
    return [
        Choice(
            f"{number:02} {thing} {later} {way}",
            (*begun, *talk[:later], ("user", ask.format(thing=thing))),
            answer.format(thing=thing),
            tuple(f" {o}" for o in options),
            options.index(who),
            f"{number:02}",
            turn=len(begun) + later,
            family=f"{number:02} {thing}",
        )
        for later in LATER
        for who, thing in zip(people, things, strict=True)
        for way, (ask, answer) in enumerate(story["ways"])
    ]


def _compared(items: Sequence[Choice], found: Sequence[Float[np.ndarray, " options"]]) -> list[Figure]:
    stories: defaultdict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        stories[item.group].append(i)
    figures = []
    for story in stories.values():
        answers = softmax(np.array([found[i] for i in story]), axis=1)
        # One minus the distance, in bits: 1 for equal distributions, 0 for those without a common option.
        near = 1 - np.array([jensenshannon(answers, a[None], base=2, axis=1) for a in answers])
        families = np.array([items[i].family for i in story])
        for row, i in enumerate(story):
            item, same = items[i], families == families[row]
            other = ~same
            same[row] = False
            for metric, value in (
                ("consistency", near[row, same].mean() - near[row, other].mean()),
                ("agreement", near[row, same].mean()),
            ):
                figures.append(Figure(metric, item.id, float(value), item.group, item.n, item.turn))
    return figures

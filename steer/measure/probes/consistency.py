"""Whether a model answers the same when it is asked the same in other words, and again many messages later."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import entr, softmax

from steer.measure.probes.choice import EXAMPLES, Choice, example, fitting, relative, scores
from steer.measure.probes.probe import Figure, Metric, Probe, Reader, Result, Size
from steer.measure.probes.stories import small_talk, told, written
from steer.progress import Advance

LATER = (10, 30)
"""After how many messages of small talk the questions are asked again."""


class Consistency(Probe):
    """Three questions on one story, each asked in other words and at other times, with the same three options.

    How near two answers are is 1 less the Jensen-Shannon distance of their distributions over the options. Answers that
    never change are near each other and say nothing. So what counts is how much nearer an answer is to the answers to
    the same question than to those to the other questions, both asked in other words or at another time.
    """

    name = "consistency"
    says = "How far the model answers the same to the same question in other words and many messages later."
    needs = frozenset({"logprobs"})
    metrics = (
        Metric("consistency", "higher", "agreement on one question less that between questions", 0.0),
        Metric("agreement", "neither", "1 less the Jensen-Shannon distance of answers to one question"),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return the questions. Those in the same words at one time are a family; each has another right answer."""
        rng, stories = random.Random(f"consistency {size.seed}"), written("consistency")
        return [
            item
            for number in range(size.of(20, 10))
            for item in _asked(rng, stories[number % len(stories)], number, size.quick)
        ]

    def plan(self, size: Size) -> Any:
        """Return the items as JSON."""
        return [asdict(item) for item in self.items(size)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Compare each answer with those to the same question, and with those to the other questions."""
        items, notes = fitting(reader, self.items(size))
        found = relative(items, scores(reader, items, advance))
        shown = list(zip(items, found, strict=True))[:: max(1, len(items) // EXAMPLES)]
        return Result(_compared(items, found), [example(i, s) for i, s in shown], notes)


def _asked(rng: random.Random, story: dict[str, Any], number: int, quick: bool) -> list[Choice]:
    """Return the questions on one story. A quick run asks in two ways, and one in four of its stories is asked
    again, after the fewer messages."""
    people = rng.sample(written("positions")["people"], 3)
    things = rng.sample(story["things"], 3)
    ways = rng.sample(story["ways"], 2 if quick else 5)
    begun = told([" ".join(story["fact"].format(who=w, thing=t) for w, t in zip(people, things, strict=True))])
    options, talk = rng.sample(people, 3), small_talk(rng, max(LATER))
    again = LATER[: number % 4 == 0] if quick else LATER
    return [
        Choice(
            f"{number:02} {ask.format(thing=thing)}",
            (*begun, *talk[:later], ("user", ask.format(thing=thing))),
            answer.format(thing=thing),
            tuple(f" {o}" for o in options),
            options.index(who),
            f"{number:02}",
            turn=len(begun) + later,
            family=f"{number:02} {later} {way}",
        )
        for later, asked in ((0, ways), *((later, ways[:1]) for later in again))
        for who, thing in zip(people, things, strict=True)
        for way, (ask, answer) in enumerate(asked)
    ]


def agreement(answers: Float[np.ndarray, "n options"]) -> Float[np.ndarray, "n n"]:
    """Return 1 less the Jensen-Shannon distance of each two distributions: 1 for equal ones, 0 for those that have no
    option in common."""
    bits = entr(answers).sum(1) / np.log(2)
    between = entr((answers[:, None] + answers) / 2).sum(2) / np.log(2)
    # Rounding takes it below 0 for equal distributions, where scipy's own function is not a number.
    return 1 - np.sqrt(np.clip(between - (bits[:, None] + bits) / 2, 0, 1))


def _compared(items: Sequence[Choice], found: Sequence[Float[np.ndarray, " options"]]) -> list[Figure]:
    stories: defaultdict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        stories[item.group].append(i)
    figures = []
    for story in stories.values():
        answers = softmax(np.array([found[i] for i in story]), axis=1)
        near = agreement(answers)
        families = np.array([items[i].family for i in story])
        rights = np.array([items[i].right for i in story])
        for row, i in enumerate(story):
            elsewhere = families != families[row]
            same, other = elsewhere & (rights == rights[row]), elsewhere & (rights != rights[row])
            item = items[i]
            for metric, value in (
                ("consistency", near[row, same].mean() - near[row, other].mean()),
                ("agreement", near[row, same].mean()),
            ):
                figures.append(Figure(metric, item.id, float(value), item.group, item.n, item.turn))
    return figures

"""Whether a model knows what can no longer be true after the world has changed."""

from __future__ import annotations

import random
from typing import Any

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Metric, Size
from steer.measure.probes.stories import small_talk, told, written

LATER = (0, 2, 6, 12)
"""How many messages of small talk come between a change and the questions about it."""
TOGETHER = 3
"""How many changes one chat tells."""


class Consequences(ForcedChoice):
    """Of two things that a person could do, a change makes one impossible: which can still be true?

    Each chat has a mirror, in which the other thing is impossible, so that each option is right once.
    """

    name = "consequences"
    says = "how well the model knows what can no longer be true after the world has changed"
    metrics = (Metric("accuracy", "higher", "share of right answers", 0.5), MARGIN)

    def items(self, size: Size) -> list[Choice]:
        """Return a question on each change of each chat and of its mirror."""
        rng, scenes = random.Random(f"consequences {size.seed}"), written("consequences")
        people = written("positions")["people"]
        items = []
        for turn in range(size.of(3, 1)):
            order = rng.sample(scenes, size.of(len(scenes), 30))
            for i in range(0, len(order), TOGETHER):
                together = order[i : i + TOGETHER]
                later = LATER[(turn + i // TOGETHER) % len(LATER)]
                items += _pair(rng, together, rng.sample(people, len(together)), f"{turn}-{i:02}", later)
        return items


def _pair(rng: random.Random, scenes: list[dict[str, Any]], people: list[str], name: str, later: int) -> list[Choice]:
    """Return the questions on a chat and on its mirror."""
    possible = [rng.randrange(2) for _ in scenes]
    first = [rng.randrange(2) for _ in scenes]
    talk = small_talk(rng, later)
    shown = [rng.randrange(2) for _ in scenes]
    items = []
    for mirror in (0, 1):
        sentences = []
        for scene, who, can, start in zip(scenes, people, possible, first, strict=True):
            state = [scene["good" if (can ^ mirror) == i else "bad"][i].format(who=who) for i in (0, 1)]
            sentences.append(f"{state[start]} {state[1 - start]}")
        chat = told(sentences, 1) + talk
        for scene, who, can, swap in zip(scenes, people, possible, shown, strict=True):
            options = [f" {scene['then'][i ^ swap]}" for i in (0, 1)]
            items.append(
                Choice(
                    f"{name} {scene['then'][0]} {mirror}",
                    (*chat, ("user", scene["ask"].format(who=who))),
                    scene["begun"].format(who=who),
                    tuple(options),
                    (can ^ mirror) ^ swap,
                    f"{name} {scene['then'][0]}",
                    later,
                    len(chat),
                    family=f"{name} {scene['then'][0]}",
                )
            )
    return items

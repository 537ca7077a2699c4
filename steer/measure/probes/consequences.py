"""Whether a model knows what can no longer be true after the world has changed."""

from __future__ import annotations

import random
from typing import Any

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Metric, Size
from steer.measure.probes.stories import narrated, small_talk, written

LATER = (0, 2, 6, 12)
"""How many messages of small talk come between a change and the question about it; a quick run has the first two."""


class Consequences(ForcedChoice):
    """Of two things that a person could do, a change makes one impossible: which can still be true?

    Each chat has a mirror, in which the other thing is impossible, so that each option is right once. Every chat tells
    one change: of three at once the default merge follows hardly any.
    """

    name = "consequences"
    says = "How well the model knows what can no longer be true after the world has changed."
    metrics = (Metric("accuracy", "higher", "share of right answers", 0.5), MARGIN)

    def items(self, size: Size) -> list[Choice]:
        """Return a question on each change and one on its mirror."""
        rng, scenes = random.Random(f"consequences {size.seed}"), written("consequences")
        return [
            item
            for turn in range(size.of(3, 1))
            for number, scene in enumerate(rng.sample(scenes, size.of(len(scenes), 20)))
            for item in _pair(rng, scene, turn, LATER[(turn + number) % size.of(len(LATER), 2)])
        ]


def _pair(rng: random.Random, scene: dict[str, Any], turn: int, later: int) -> list[Choice]:
    """Return the question on a chat and on its mirror."""
    who, talk = rng.choice(written("positions")["people"]), small_talk(rng, later)
    name = " or ".join(scene["then"])
    family = f"{name}, {turn}"
    first, shown = rng.sample((0, 1), 2), rng.sample((0, 1), 2)
    items = []
    for possible in (0, 1):
        states = [scene["good" if i == possible else "bad"][i].format(who=who) for i in first]
        chat = narrated(states) + talk
        items.append(
            Choice(
                f"{family}: {scene['then'][possible]}",
                (*chat, ("user", scene["ask"].format(who=who))),
                scene["begun"].format(who=who),
                tuple(f" {scene['then'][i]}" for i in shown),
                shown.index(possible),
                name,
                later,
                len(chat),
                family=family,
            )
        )
    return items

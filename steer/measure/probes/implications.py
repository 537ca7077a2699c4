"""Whether a model understands what somebody means and does not say."""

from __future__ import annotations

import random
from typing import Any

from steer.measure.probes.choice import MARGIN, Choice, ForcedChoice
from steer.measure.probes.probe import Metric, Size
from steer.measure.probes.stories import written


class Implications(ForcedChoice):
    """A person answers by a hint: which of two things is meant?

    Each scene has two hints, one for each reading. The question names both readings, in both orders. Without a hint
    nobody can know which reading is asked for: the control shows how far the readings give themselves away.
    """

    name = "implications"
    says = "How well the model understands what somebody means and does not say."
    metrics = (
        Metric("accuracy", "higher", "share of hints understood", 0.5),
        MARGIN,
        Metric("control", "neither", "share of right guesses without a hint", 0.5),
    )

    def items(self, size: Size) -> list[Choice]:
        """Return the questions on each scene: two hints and two orders, and a control without a hint."""
        rng, scenes = random.Random(f"implications {size.seed}"), written("implications")
        items = []
        for number, scene in enumerate(rng.sample(scenes, size.of(len(scenes), 10))):
            who = rng.choice(written("positions")["people"])
            items += [_asked(scene, who, meant, order) for order in (0, 1) for meant in (0, 1)]
            items.append(_asked(scene, who, rng.randrange(2), number % 2, hinted=False))
        return items


def _asked(scene: dict[str, Any], who: str, meant: int, order: int, hinted: bool = True) -> Choice:
    """Return the question whether a reading is meant. `order`: 1 names the second reading first."""
    means = scene["means"][:: -1 if order else 1]
    hint = f'{who} says: "{scene["hints"][meant]}"' if hinted else f"{who} says something."
    return Choice(
        f"{scene['where']} {'hint ' + str(meant) if hinted else 'control'}, order {order}",
        (
            (
                "user",
                f"{scene['where'].format(who=who)} {hint} What does {who} mean: that {means[0]}, or that {means[1]}?",
            ),
        ),
        f"{who} means that",
        tuple(f" {m}" for m in means),
        meant ^ order,
        scene["where"],
        metric="accuracy" if hinted else "control",
        family=f"{scene['where']} {order}" if hinted else "",
    )

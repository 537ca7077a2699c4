"""The verdict on a slider: does it do what its name says, on topics that finding never saw, and what else does it do.

`steer find` and the page show it; a direction that fails is kept, with its verdict in its provenance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import spread
from steer.files import without_nan
from steer.measure.calibrate import Limits
from steer.measure.contrast import Reply
from steer.measure.harness import (
    Numbers,
    Point,
    Reference,
    Setting,
    dose_settings,
    measure_answers,
    random_like,
)
from steer.measure.scorer import Scorer
from steer.model.steered import SteeredModel
from steer.progress import Advance

READS = 0.7
"""Least held-out AUROC of the direction and of the text scorer: below it, more than three in ten pairs of replies under
the two instructions are in the wrong order, and no slider can be distinguished from chance with so few replies."""
MOVES = 0.2
"""Least effect of a slider on its trait, and on another trait that it drags along: the change of the scorer's mean
probability from amount -1 to amount 1. The default merge's `compliance`, the weaker of its two, has over twice this."""
ERRORS = 2.0
"""Standard errors over topics by which an effect must exceed a random direction's, and an AUROC 0.5."""
SETTINGS = 5
"""Settings that the verdict compares: amounts -1, 0 and 1, and a random direction at -1 and 1."""
REPLIES = 8
"""Fewest replies per setting: a trait with few topics gets several to each."""


@dataclass(frozen=True)
class Effect:
    """The change of a text scorer's probability from amount -1 to amount 1, and that under a random direction."""

    change: float
    """Mean change of the probability that a reply shows the trait."""
    random: float
    """The same change for a random direction moved as far."""
    error: float
    """Standard error of the difference between the two, over topics."""

    @property
    def moves(self) -> bool:
        """Whether the change is upwards, large, and certainly larger than by chance."""
        return self._counts(self.change)

    @property
    def dragged(self) -> bool:
        """The same of the change in either direction."""
        return self._counts(abs(self.change))

    def _counts(self, change: float) -> bool:
        return change >= MOVES and change - abs(self.random) > ERRORS * self.error


@dataclass(frozen=True)
class Verdict:
    """A slider's dose response on held-out topics and what it says in words.

    `says` is, in this order:
    - "too weak for this model", if direction or text scorer does not distinguish held-out replies under the two
      instructions: an AUROC below `READS`, or within `ERRORS` standard errors (Mann-Whitney) of 0.5. Of votes, which
      may contradict each other: within chance;
    - "reads but does not steer", if the effect on the trait is below `MOVES`, or exceeds a random direction's by less
      than `ERRORS` standard errors;
    - "steers but drags X along", if a shipped scorer of another trait X sees an effect as large, upwards or downwards.
      X is also "repetition" or "KL", if amount -1 or 1 exceeds the `Limits` of calibration;
    - "works" otherwise.
    """

    auroc: float
    """The lower of the held-out AUROCs of direction and text scorer."""
    least_auroc: float
    """What it had to reach with this number of replies."""
    points: tuple[Point, ...]
    """Amounts -1, 0 and 1, then a random direction moved as far, -1 and 1."""
    effect: Effect
    """On the trait, by its own text scorer."""
    others: dict[str, Effect]
    """On the other traits, by the scorers that ship."""

    @property
    def drags(self) -> tuple[str, ...]:
        """What changes along with the trait."""
        below, untouched, above = self.points[:3]
        limits, out = Limits(), [name for name, effect in self.others.items() if effect.dragged]
        if max(below.repetition, above.repetition) - untouched.repetition > limits.repetition:
            out.append("repetition")
        if not (below.kl <= limits.kl and above.kl <= limits.kl):  # nan is within no limit
            out.append("KL")
        return tuple(out)

    @property
    def says(self) -> str:
        """The verdict in words."""
        if not self.auroc >= self.least_auroc:
            return "too weak for this model"
        if not self.effect.moves:
            return "reads but does not steer"
        return f"steers but drags {' and '.join(self.drags)} along" if self.drags else "works"

    def as_json(self) -> dict[str, Any]:
        """The verdict as JSON."""
        return {
            "says": self.says,
            "drags": list(self.drags),
            "auroc": self.auroc,
            "least_auroc": self.least_auroc,
            "effect": vars(self.effect),
            "others": {name: vars(effect) for name, effect in self.others.items()},
            "points": [without_nan(vars(p)) for p in self.points],
        }


def steers(says: str) -> bool:
    """Return whether a verdict, in its words, is one of a slider that moves its trait: "works", or "steers but ..."."""
    return says == "works" or says.startswith("steers")


def samples_for(topics: int) -> int:
    """How many replies to each of so many topics the verdict is measured on, per setting."""
    return math.ceil(REPLIES / topics)


def judge(
    model: SteeredModel,
    direction: Direction,
    scorer: Scorer,
    neutral: Sequence[Reply],
    *,
    auroc: float,
    least: float,
    topics: int,
    tokens: int,
    seed: int = 0,
    on_tokens: Advance | None = None,
) -> Verdict:
    """Measure a direction's dose response on the held-out topics of `scorer.trait`, at most `topics` of them, and
    return the verdict.

    `auroc` is the lower one of direction and scorer on held-out replies, and `least` what it has to reach there.
    `neutral` are untouched replies to held-out neutral prompts, for KL; `tokens` is the length of the replies.
    """
    random = random_like(direction, seed)
    noise = [Setting(f"random direction, {a:+g}", Edit(add=((random, a),)), share=direction.share(a)) for a in (-1, 1)]
    settings = [*dose_settings(direction, (-1.0, 0.0, 1.0)), *noise]
    held_out = spread(scorer.trait.held_out, topics)
    samples = samples_for(len(held_out))
    found = measure_answers(
        model, scorer, settings, held_out, Reference.of(model, neutral),
        sampler=replace(MEASURE, max_new_tokens=tokens, seed=seed), samples=samples, perplexities=False,
        on_tokens=on_tokens,
    )  # fmt: skip
    below, _, above, *controls = (answers for _, answers in found)
    return Verdict(
        auroc=auroc,
        least_auroc=least,
        points=tuple(point for point, _ in found),
        effect=_effect([a.probabilities for a in (below, above, *controls)], samples),
        others={
            name: _effect([other.probabilities(a.texts) for a in (below, above, *controls)], samples)
            for name, other in Scorer.all_shipped().items()
            if name != scorer.trait.name
        },
    )


def _effect(probabilities: Sequence[Numbers], samples: int) -> Effect:
    """The effect in a scorer's probabilities at -1, at 1, and for the random direction at -1 and 1."""
    below, above, low, high = (p.reshape(-1, samples).mean(1) for p in probabilities)
    change, random = above - below, high - low
    error = float((change - random).std(ddof=1) / math.sqrt(len(change)))
    return Effect(float(change.mean()), float(random.mean()), error)

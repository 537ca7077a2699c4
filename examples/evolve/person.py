"""A simulated person, who votes by a known taste with noise: shows how a lineage is judged without anybody.

    python examples/evolve/person.py LINEAGE --weight moralizing=-2 --weight compliance=1 --weight repetition=-3

The taste of a reply is a weighted sum of the probabilities that the scorers of the traits that ship give it, and of the
figures `repetition` (share of repeated three-word phrases) and `length` (in hundreds of words). The person reads what
people read, the texts alone. `--noise` is the deviation of a logistic error on the difference of two replies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from scipy.special import logit

from steer.core.slider import parse_amount
from steer.errors import UsageError
from steer.lineage.judging import BlindPair, Choice, Judge
from steer.lineage.lineage import Lineage
from steer.measure.harness import repetition
from steer.measure.scorer import Scorer

FIGURES: dict[str, Callable[[str], float]] = {
    "moralizing": lambda text: float(Scorer.shipped("moralizing").probabilities([text])[0]),
    "compliance": lambda text: float(Scorer.shipped("compliance").probabilities([text])[0]),
    "repetition": lambda text: repetition(text.lower().split()),
    "length": lambda text: len(text.split()) / 100,
}


@dataclass
class Person:
    """Chooses between replies by a taste."""

    weights: Mapping[str, float]
    """Figure -> weight."""
    noise: float = 0.5
    equal: float = 0.1
    """Replies whose tastes differ less are called the same."""
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.weights if name not in FIGURES]:
            raise UsageError(f"taste: expected weights of {', '.join(FIGURES)}, found {unknown[0]!r}; rename it")

    def taste(self, reply: str) -> float:
        """Return how much the person likes a reply, without noise."""
        return sum(weight * FIGURES[name](reply) for name, weight in self.weights.items())

    def choose(self, blind_pair: BlindPair) -> Choice:
        """Return the vote on a pair."""
        error = self.noise * math.sqrt(3) / math.pi * float(logit(self.rng.uniform(1e-9, 1 - 1e-9)))
        difference = self.taste(blind_pair.left) - self.taste(blind_pair.right) + error
        return "same" if abs(difference) < self.equal else "left" if difference > 0 else "right"

    def judge(self, judge: Judge, most: int, say: Callable[[str], None] = lambda line: None) -> int:
        """Vote until more votes would change nothing, `most` times at most. Return how many votes that took."""
        for number in range(most):
            if judge.standing.settled:
                return number
            blind_pair = judge.blind_pair()
            assert blind_pair is not None  # it waits as long as it takes
            judge.vote(blind_pair, self.choose(blind_pair))
            say(judge.standing.line)
        return most


def main(
    lineage: Annotated[Path, typer.Argument(help="A lineage with a generation to judge.")],
    weight: Annotated[list[str], typer.Option(help=f"FIGURE=WEIGHT, of {', '.join(FIGURES)}; may be repeated.")],
    noise: Annotated[float, typer.Option(help="Deviation of the error on a difference of tastes.")] = 0.5,
    most: Annotated[int, typer.Option(help="Votes at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the errors and the sides.")] = 0,
    voter: Annotated[str, typer.Option(help="Name of the voter.")] = "simulated",
) -> None:
    """Judge the newest generation of a lineage by a known taste."""
    person = Person(dict(parse_amount(text) for text in weight), noise, rng=random.Random(seed))
    with Judge(Lineage(lineage), voter, seed=seed, patience=math.inf) as judge:
        person.judge(judge, most, typer.echo)


if __name__ == "__main__":
    typer.run(main)

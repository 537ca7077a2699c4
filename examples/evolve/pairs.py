"""How many votes three ways of choosing pairs take until more votes would change nothing, on made-up nodes.

    python examples/evolve/pairs.py OUT --nodes 8 --seeds 20

The tastes of the nodes are drawn from a normal distribution of deviation `--spread`, in log-odds; a simulated person
chooses by them with a logistic error, and calls replies equal now and then. No model runs. Writes `OUT/pairs.md` with a
table, and `OUT/pairs.png`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import matplotlib
import matplotlib.pyplot as plt
import typer
from scipy.special import expit

from steer.files import write_atomic
from steer.lineage.lineage import Outcome, Vote
from steer.lineage.ratings import Standing, ranked_pairs, rate
from steer.progress import bar

Pair = tuple[str, str]
LIMIT = 1000
"""Votes after which a run is given up."""
TIES = 0.1
"""Share of the votes that call both replies equal."""


@dataclass(frozen=True)
class Run:
    """How one person's votes went."""

    votes: int
    """Until more votes would change nothing, or the limit."""
    lost: float
    """By how much the best node is better than the one that was chosen, in log-odds."""


def most_telling(names: list[str], rng: random.Random, now: Callable[[], Standing]) -> Iterator[Pair]:
    """The pair whose vote does most to settle which node is the best."""
    while True:
        yield next(iter(ranked_pairs(now())), (names[0], names[1]))


def round_robin(names: list[str], rng: random.Random, now: Callable[[], Standing]) -> Iterator[Pair]:
    """Every pair once, then every pair again."""
    pairs = list(combinations(names, 2))
    rng.shuffle(pairs)
    return cycle(pairs)


def at_random(names: list[str], rng: random.Random, now: Callable[[], Standing]) -> Iterator[Pair]:
    """Any two nodes."""
    while True:
        a, b = rng.sample(names, 2)
        yield a, b


WAYS = {"most telling": most_telling, "round-robin": round_robin, "random": at_random}


def run(way: str, nodes: int, seed: int, spread: float = 1.0, limit: int = LIMIT) -> Run:
    """Vote on made-up nodes until more votes would change nothing, `limit` times at most. That is asked every five
    votes."""
    rng = random.Random(seed)
    taste = {f"n{i}": rng.gauss(0, spread) for i in range(nodes)}
    names, votes = list(taste), list[Vote]()

    def now() -> Standing:
        return rate(names, votes)

    pairs = WAYS[way](names, random.Random(f"{way} {seed}"), now)
    while not now().settled and len(votes) < limit:
        for a, b in islice(pairs, 5):
            first: Outcome = "a" if rng.random() < expit(taste[a] - taste[b]) else "b"
            outcome: Outcome = "same" if rng.random() < TIES else first
            votes.append(Vote(a, b, outcome, [], ["", ""], "a", "simulated", float(len(votes))))
    return Run(len(votes), max(taste.values()) - taste[now().leader])


def table(found: dict[str, list[Run]], about: str) -> str:
    """Return the results as a Markdown table."""
    robin = mean(r.votes for r in found["round-robin"])
    lines = [
        about, "", "| pairs | votes, mean | median | least to most | of a round-robin's | best minus chosen node |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for way, runs in found.items():
        votes = sorted(r.votes for r in runs)
        lines.append(
            f"| {way} | {mean(votes):.1f} | {median(votes):g} | {votes[0]} to {votes[-1]} "
            f"| {mean(votes) / robin:.2f} | "
            f"{mean(r.lost for r in runs):.2f} on average, {max(r.lost for r in runs):.2f} at most |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[Run]], place: Path) -> None:
    """Draw the share of runs that were settled after so many votes."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for way, runs in found.items():
        votes = sorted(r.votes for r in runs)
        axes.step([0, *votes], [i / len(votes) for i in range(len(votes) + 1)], where="post", label=way)
    axes.set(xlabel="votes", ylabel="share of runs that are settled", xlim=(0, None), ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=150)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Argument(help="Where the table and the plot go.")],
    nodes: Annotated[int, typer.Option(help="Made-up nodes.", min=2)] = 8,
    seeds: Annotated[int, typer.Option(help="Runs of each way.", min=1)] = 20,
    spread: Annotated[float, typer.Option(help="Deviation of the tastes, in log-odds.")] = 1.0,
) -> None:
    """Compare ways of choosing pairs."""
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    with bar("voting", seeds * len(WAYS), "runs") as advance:
        for seed in range(seeds):
            for way, runs in found.items():
                runs.append(run(way, nodes, seed, spread))
                advance(1)
    about = f"{nodes} made-up nodes, tastes of deviation {spread:g}, seeds 0 to {seeds - 1}."
    text = table(found, about)
    write_atomic(out / "pairs.md", text)
    plot(found, out / "pairs.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

"""Test-retest: whether two seeds of the same reader differ by no more than their intervals say.

    python tests/measure/probes/retest.py MODEL --probes positions,moralizing --repetitions 40

A seed draws other items, or other replies. Prints for each probe's headline the share of repetitions in which two seeds
agree; 0.95 is what intervals of 95 % promise.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import typer
from scipy import stats

import steer
from steer.measure.probes.library import probes_named
from steer.measure.probes.probe import Probe, Reader, Size
from steer.measure.readers import LocalReader
from steer.measure.statistics import Mean, mean_of


def agree(first: Mean, other: Mean) -> bool:
    """Whether 0 lies in the interval of a difference of two independent means (Zou and Donner 2008, from their own
    intervals)."""
    low, high = sorted((first, other), key=lambda m: m.value)
    return high.value - low.value <= math.hypot(low.high - low.value, high.value - high.low)


def repeated(reader: Reader, probe: Probe, repetitions: int, quick: bool = True) -> list[Mean]:
    """The headline of a probe under one more seed than there are repetitions."""
    name = probe.metrics[0].name
    runs = [probe.run(reader, Size(quick, seed)) for seed in range(repetitions + 1)]
    return [mean_of([f for f in run.figures if f.metric == name], seed) for seed, run in enumerate(runs)]


def share_that_agrees(means: list[Mean]) -> float:
    """The share of seeds that agree with the next one."""
    return sum(agree(a, b) for a, b in pairwise(means)) / (len(means) - 1)


def main(
    model: str,
    probes: Annotated[str, typer.Option(help="With commas between.")],
    repetitions: int = 40,
) -> None:
    """Print the share of repetitions in which two seeds agree, for each probe."""
    reader = LocalReader(steer.load(model))
    for probe in probes_named(probes.split(",")):
        means = repeated(reader, probe, repetitions)
        values = [m.value for m in means]
        low, high = stats.binomtest(round(share_that_agrees(means) * repetitions), repetitions).proportion_ci()
        print(
            f"{probe.name}: {share_that_agrees(means):.3f} of {repetitions} agree ({low:.2f} to {high:.2f}); "
            f"{probe.metrics[0].name} from {min(values):.3g} to {max(values):.3g}",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)

"""Where in a chat a metric degrades: for every probe whose figures have turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.stats import t, ttest_1samp

from steer.measure.probes.probe import Figure, Metric

BUCKETS, LEAST, LEVEL = 6, 8, 0.95
"""Stretches of a chat at most, items in each at least, and the confidence level of each one's interval."""
RESAMPLES = 300
"""Bootstrap resamples for the turn's interval."""


@dataclass(frozen=True)
class Stretch:
    """The mean of a metric over the items of some turns, with its interval."""

    first: int
    last: int
    """The turns, both included."""
    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Degradation:
    """A metric that becomes worse within a chat."""

    turn: int
    """The first turn after the change: where one step explains the figures best, by least squares."""
    low: int
    high: int
    """The ends of the turn's 95 % bootstrap interval."""
    start: Stretch
    """What the metric is at the beginning of the chat."""
    worse: Stretch
    """The first stretch that is worse than the beginning."""


def stretches(figures: Sequence[Figure], metric: Metric) -> list[Stretch]:
    """Return the metric by turn, in at most `BUCKETS` stretches of at least `LEAST` items each, in order. Figures
    without a turn are left out; what has fewer items than `LEAST` is one stretch. NaN figures are left out."""
    return [_stretch(part) for part in _parts(figures, metric)]


def degradation(figures: Sequence[Figure], metric: Metric) -> Degradation | None:
    """Return where the metric degrades; None where it does not, where no turn is known, or where no value is better.

    A stretch is worse than the beginning of the chat if its whole interval is, or if its items of the same groups are,
    group by group: what is asked again at several turns shows smaller changes.
    """
    if metric.better == "neither":
        return None
    parts = _parts(figures, metric)
    sign = 1 if metric.better == "lower" else -1
    for number, part in enumerate(parts[1:], 1):
        start, now = _stretch(parts[0]), _stretch(part)
        apart = now.low > start.high if sign > 0 else now.high < start.low
        if apart or _paired(parts[0], part, sign, len(parts) - 1):
            turn, low, high = _change([f for p in parts[: number + 1] for f in p])
            return Degradation(turn, low, high, start, now)
    return None


def _parts(figures: Sequence[Figure], metric: Metric) -> list[list[Figure]]:
    """The metric's finite figures that have a turn, in order of turns: those of each stretch."""
    known = (f for f in figures if f.metric == metric.name and f.turn is not None and np.isfinite(f.value))
    found = sorted(known, key=lambda f: f.turn or 0)
    size = max(LEAST, -(-len(found) // BUCKETS))
    parts: list[list[Figure]] = []
    for figure in found:
        if not parts or (len(parts[-1]) >= size and figure.turn != parts[-1][-1].turn):
            parts.append([])
        parts[-1].append(figure)
    if len(parts) > 1 and len(parts[-1]) < LEAST:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def _paired(start: Sequence[Figure], now: Sequence[Figure], sign: int, comparisons: int) -> bool:
    """Whether groups that both have are worse now, tested at `LEVEL` corrected for the number of comparisons."""
    before, after = _means(start), _means(now)
    changes = [sign * (after[g] - before[g]) for g in before if g in after]
    if len(changes) < LEAST:
        return False
    if np.ptp(changes) == 0:  # no spread to test against
        return changes[0] > 0
    _, p = ttest_1samp(changes, 0, alternative="greater")
    return float(np.asarray(p)) < (1 - LEVEL) / 2 / comparisons


def _means(figures: Sequence[Figure]) -> dict[str, float]:
    """The mean of each group. Items of one group count as one: what they have in common would be counted again."""
    groups: dict[str, list[float]] = {}
    for figure in figures:
        groups.setdefault(figure.group or figure.item, []).append(figure.value)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def _change(figures: Sequence[Figure]) -> tuple[int, int, int]:
    """The turn before which and from which on two means fit the figures best, and the ends of its interval."""
    turns, values = np.array([f.turn for f in figures]), np.array([f.value for f in figures])
    steps = np.unique(turns)[1:]

    def best(rows: Int[np.ndarray, " n"]) -> int:
        after = turns[rows] >= steps[:, None]
        n, total = after.sum(1), values[rows].sum()
        later = (after * values[rows]).sum(1)
        # The squared errors are smallest where the squares of the two sums over their numbers are largest.
        gain = later**2 / np.maximum(n, 1) + (total - later) ** 2 / np.maximum(len(rows) - n, 1)
        return int(steps[gain.argmax()])

    rng, size = np.random.default_rng(0), len(figures)
    drawn = [best(rng.integers(0, size, size)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return best(np.arange(size)), int(low), int(high)


def _stretch(figures: Sequence[Figure]) -> Stretch:
    means = np.array(list(_means(figures).values()))
    value = float(means.mean())
    half = np.inf
    if len(means) > 1:
        # Not a bootstrap: the intervals of one so few items are too narrow, and a steady metric would seem to break.
        half = float(t.ppf((1 + LEVEL) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    turns = [f.turn or 0 for f in figures]
    return Stretch(min(turns), max(turns), value, value - half, value + half, len(figures))

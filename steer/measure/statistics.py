"""Statistics of an evaluation: means with intervals, paired differences, and which of them are more than noise.

Figures of one group, such as the questions on one story, are resampled together: they are not independent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

from steer.measure.probes.probe import Figure

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
FLIPS = 1999
"""Resamples of a permutation test, or every one of them where there are fewer."""
CONFIDENCE = 0.95
POWER = 0.8
"""Probability with which a difference as large as the noise would be detected."""
Key = tuple[str, int | None, int | None]
"""(item, n, turn): by it the figures of two arms are paired."""


@dataclass(frozen=True)
class Mean:
    """A mean over items with its 95 % interval."""

    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Difference:
    """The mean paired difference between two arms, over the items that both have."""

    mean: Mean
    p: float
    """Two-sided p-value of a test that flips the signs of the groups' differences."""
    noise: float
    """The smallest difference that this number of items would detect, in 80 of 100 runs."""


def mean_of(figures: Sequence[Figure], seed: int = 0) -> Mean:
    """Return the mean of one metric's figures, with a bootstrap interval over their groups."""
    values = np.array([f.value for f in figures])
    sums, counts = _by_group(values, [f.group or f.item for f in figures])
    if set(values.tolist()) in ({0.0}, {1.0}):
        # Every resample of equal answers is the same, so the bootstrap has no interval for a share of 0 or 1.
        exact = stats.binomtest(int(values[0]) * len(sums), len(sums)).proportion_ci(CONFIDENCE, method="exact")
        return Mean(float(values[0]), float(exact.low), float(exact.high), len(values))
    return Mean(float(values.mean()), *_interval(sums, counts, seed), len(values))


def difference_of(first: Sequence[Figure], other: Sequence[Figure], seed: int = 0) -> Difference | None:
    """Return other minus first for one metric, paired by item; None where the arms have no item in common."""
    a, b = ({_key(f): f for f in figures} for figures in (first, other))
    shared = [key for key in a if key in b]
    if not shared:
        return None
    values = np.array([b[key].value - a[key].value for key in shared])
    sums, counts = _by_group(values, [a[key].group or a[key].item for key in shared])
    mean = Mean(float(values.mean()), *_interval(sums, counts, seed), len(values))
    error = _standard_error(sums, counts)
    if error == 0.0:  # no item differs: as much as between arms that have nothing in common
        levels = _by_group(np.array([a[key].value for key in shared]), [a[key].group or a[key].item for key in shared])
        error = math.sqrt(2) * _standard_error(*levels)
    noise = (stats.norm.ppf(0.5 + CONFIDENCE / 2) + stats.norm.ppf(POWER)) * error
    return Difference(mean, _p_value(sums, seed), float(noise))


def mean_figures(arms: Sequence[Sequence[Figure]]) -> list[Figure]:
    """Return the means of several arms' figures of one metric, over the items that all of them have."""
    by_key = [{_key(f): f for f in figures} for figures in arms]
    shared = [key for key in by_key[0] if all(key in other for other in by_key)] if by_key else []
    return [replace(by_key[0][key], value=sum(found[key].value for found in by_key) / len(by_key)) for key in shared]


def corrected(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance that any of them is wrong."""
    order = np.argsort(p_values)
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    out = np.empty(len(order))
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0) if len(order) else scaled
    return out.tolist()


def _key(figure: Figure) -> Key:
    return figure.item, figure.n, figure.turn


def _by_group(
    values: Float[np.ndarray, " items"], groups: Sequence[str]
) -> tuple[Float[np.ndarray, " groups"], Float[np.ndarray, " groups"]]:
    """Return the sum and the number of the values of each group."""
    _, place = np.unique(np.array(groups), return_inverse=True)
    return np.bincount(place, values), np.bincount(place).astype(float)


def _interval(
    sums: Float[np.ndarray, " groups"], counts: Float[np.ndarray, " groups"], seed: int
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval of the mean (Efron 1987); nan for one group.

    Of few groups it would be too narrow, as a normal distribution is where Student's belongs. So its level is raised to
    that of the interval as wide as Student's (Hesterberg 2015, "expanded percentile interval").
    """
    mean, groups = float(sums.sum() / counts.sum()), len(sums)
    if groups < 2:
        return math.nan, math.nan
    wide = math.sqrt(groups / (groups - 1)) * stats.t.ppf(0.5 + CONFIDENCE / 2, groups - 1)
    if np.ptp(sums / counts) <= 1e-9 * abs(mean):  # equal up to rounding, where the acceleration is 0 / 0
        return mean, mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (sums, counts), lambda s, n, axis=-1: s.sum(axis) / n.sum(axis), paired=True, vectorized=True,
            n_resamples=RESAMPLES, confidence_level=float(1 - 2 * stats.norm.sf(wide)), rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _standard_error(sums: Float[np.ndarray, " groups"], counts: Float[np.ndarray, " groups"]) -> float:
    """Return the standard error of the mean, from how the groups differ from it."""
    groups = len(sums)
    if groups < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * groups / (groups - 1)) / counts.sum())


def _p_value(sums: Float[np.ndarray, " groups"], seed: int) -> float:
    """Return the two-sided p-value of the groups' differences under flips of their signs."""
    moved = sums[sums != 0]
    if len(moved) < 2:  # both signs of a single difference are as far from 0
        return 1.0
    found = stats.permutation_test(
        (moved,), lambda x, axis=-1: x.sum(axis), permutation_type="samples", vectorized=True,
        n_resamples=FLIPS, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)

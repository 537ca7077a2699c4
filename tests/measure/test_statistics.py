"""The statistics of an evaluation: intervals that cover, p-values that are level, corrections that hold."""

from __future__ import annotations

import numpy as np
import pytest

from steer.measure.probes.probe import Figure
from steer.measure.statistics import corrected, difference_of, mean_of

REPETITIONS = 150


def figures(values: np.ndarray, per_group: int = 1) -> list[Figure]:
    return [Figure("m", f"i{i}", float(v), f"g{i // per_group}") for i, v in enumerate(values)]


def covered(rng: np.random.Generator, draw: str, per_group: int) -> float:
    hits = 0
    for _ in range(REPETITIONS):
        level = np.repeat(rng.normal(0, 1 if per_group > 1 else 0, 40), per_group)
        if draw == "shares":
            values = (rng.random(40 * per_group) < 1 / (1 + np.exp(-level))).astype(float)
            truth = 0.5
        else:
            values, truth = level + rng.exponential(1, 40 * per_group), 1.0
        found = mean_of(figures(values, per_group))
        hits += found.low <= truth <= found.high
    return hits / REPETITIONS


@pytest.mark.parametrize(("draw", "per_group"), [("shares", 1), ("shares", 4), ("numbers", 1), ("numbers", 4)])
def test_the_interval_of_a_mean_covers_it_in_95_of_100_repetitions(draw: str, per_group: int) -> None:
    assert 0.9 <= covered(np.random.default_rng(5), draw, per_group) <= 0.995


def test_items_of_one_group_count_as_one() -> None:
    values = np.random.default_rng(0).random(30)
    alone, copies = mean_of(figures(values)), mean_of(figures(np.repeat(values, 5), 5))
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low)
    assert copies.items == 150


def test_equal_answers_have_an_interval_too() -> None:
    found = mean_of(figures(np.ones(20)))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.9


def test_differences_are_paired_by_item_and_only_shared_items_count() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 50)
    first, other = figures(hard), figures(hard + 0.5 + rng.normal(0, 0.1, 50))
    found = difference_of(first, list(reversed(other))[:45])
    assert found is not None
    assert found.mean.items == 45
    assert found.mean.value == pytest.approx(0.5, abs=0.1)
    assert found.mean.low > 0.4
    assert found.p == pytest.approx(0.001)  # the smallest that 1,999 flips can give, two-sided
    assert found.noise < 0.1
    assert difference_of(first, [Figure("m", "another", 1.0)]) is None


def test_arms_that_answer_alike_differ_by_nothing_and_say_what_they_could_tell() -> None:
    values = (np.random.default_rng(2).random(60) < 0.5).astype(float)
    found = difference_of(figures(values), figures(values))
    assert found is not None
    assert (found.mean.value, found.mean.low, found.mean.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert 0.1 < found.noise < 0.5


def test_one_item_that_differs_is_no_proof() -> None:
    first, other = np.zeros(40), np.zeros(40)
    other[7] = 5.0
    for items in (40, 8):
        found = difference_of(figures(first[:items]), figures(other[:items]))
        assert found is not None
        assert (found.p, found.mean.value) == (1.0, 5.0 / items)


def test_without_a_difference_5_of_100_p_values_are_below_5_percent() -> None:
    rng = np.random.default_rng(3)
    found = [difference_of(figures(rng.random(25)), figures(rng.random(25))) for _ in range(REPETITIONS)]
    assert 0.01 <= np.mean([d.p < 0.05 for d in found if d]) <= 0.1


def test_a_difference_as_large_as_the_noise_is_detected_in_80_of_100_runs() -> None:
    rng = np.random.default_rng(4)
    detected = []
    for _ in range(REPETITIONS):
        # The standard error is 1 / sqrt(50): the noise is 2.8 times that.
        found = difference_of(figures(np.zeros(50)), figures(rng.normal(2.8 / 50**0.5, 1, 50)))
        assert found is not None
        detected.append(found.p < 0.05)
        assert found.noise == pytest.approx(2.8 / 50**0.5, rel=0.5)
    assert 0.7 <= np.mean(detected) <= 0.92


def test_p_values_are_corrected_for_their_number() -> None:
    assert corrected([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # worked out by hand, Holm 1979
    assert corrected([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert corrected([]) == []

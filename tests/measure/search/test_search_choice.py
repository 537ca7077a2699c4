"""Which of the edits tried is taken, and the intervals beside what is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import SteerError
from steer.measure.search.held_out import mean_interval, ratio_interval
from steer.measure.search.trials import Goal, Outcome, Trial, choose, confirmed, pareto_front


def trial(
    number: int, rate: float, cost: float, *, probability: float | None = None, calm: float | None = None
) -> Trial:
    direction = Direction("moral", 1, torch.ones(4))
    kept = {} if calm is None else {"calm": calm}
    outcome = Outcome(rate, rate if probability is None else probability, cost, 20.0, 0.0, kept, 10)
    return Trial(number, {}, Edit((direction,), 1 - number / 100), outcome)


UNTOUCHED = Outcome(0.8, 0.8, 0.0, 20.0, 0.0, {"calm": 0.5}, 10)
PLAIN = trial(0, 0.2, 1.0, calm=0.5)


def test_the_cheapest_that_is_no_worse_than_the_unsearched_bake_is_taken() -> None:
    strong, gentle, weak = trial(1, 0.0, 0.5), trial(2, 0.2, 0.05), trial(3, 0.3, 0.01)
    unlikely = trial(4, 0.2, 0.02, probability=0.25)
    found = choose([PLAIN, strong, gentle, weak, unlikely], UNTOUCHED, PLAIN.outcome, Goal())
    assert (found.trial, found.reached) == (gentle, True)
    assert choose([PLAIN, strong, gentle, weak], UNTOUCHED, PLAIN.outcome, Goal(as_unsearched=False)).trial is weak


def test_a_goal_that_the_unsearched_bake_misses_is_held_to() -> None:
    poor = replace(PLAIN, outcome=replace(PLAIN.outcome, rate=0.7, probability=0.7))
    weak, strong = trial(1, 0.6, 0.01), trial(2, 0.3, 0.2)
    assert choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal()).trial is strong
    missed = choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal(share=0.1))
    assert (missed.trial, missed.reached) == (strong, False)
    assert choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal(share=0.1, max_kl=0.1)).trial is weak


def test_what_is_to_stay_rules_the_cheapest_out() -> None:
    moving, dear = trial(1, 0.1, 0.05, calm=0.3), trial(2, 0.1, 0.5, calm=0.6)
    assert choose([PLAIN, moving, dear], UNTOUCHED, PLAIN.outcome, Goal()).trial is dear
    assert choose([PLAIN, moving, dear], UNTOUCHED, PLAIN.outcome, Goal(tolerance=0.2)).trial is moving
    with pytest.raises(
        SteerError, match=r"no rate of calm by more than 0.1, found none in 1 trials.*moves one by 0.20"
    ):
        choose([moving], UNTOUCHED, PLAIN.outcome, Goal())


def test_the_lucky_one_is_found_out_on_topics_that_no_trial_saw() -> None:
    trials = [PLAIN, trial(1, 0.1, 0.01, calm=0.5), trial(2, 0.1, 0.05, calm=0.5), trial(3, 0.1, 0.9, calm=0.5)]
    rest = {0: 0.2, 1: 0.7, 2: 0.1, 3: 0.1}
    asked: list[int] = []

    def again(group: Any) -> list[Outcome]:
        asked.extend(-1 if t is None else t.number for t in group)
        return [UNTOUCHED if t is None else replace(t.outcome, rate=rest[t.number]) for t in group]

    found = confirmed(trials, UNTOUCHED, Goal(), again)
    assert found.trial.number == 2
    assert found.trial.outcome.replies == 20
    assert len(asked) == len(set(asked))
    assert asked[:4] == [-1, 0, 1, 2]


def test_the_front_is_what_no_other_beats() -> None:
    trials = [PLAIN, trial(1, 0.5, 0.1), trial(2, 0.6, 0.2), trial(3, 0.1, 0.3), trial(4, 0.5, 0.1)]
    assert [t.number for t in pareto_front(trials)] == [1, 3]


# Intervals


def test_an_interval_holds_the_mean_and_narrows_with_more_topics() -> None:
    values = np.array([0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.0, 1.0])
    few, many = mean_interval(values), mean_interval(np.tile(values, 16))
    assert few["value"] == many["value"] == 0.5
    assert few["low"] < many["low"] < 0.5 < many["high"] < few["high"]
    # For many values it is the normal one.
    assert many["high"] - 0.5 == pytest.approx(1.96 * values.std() / np.sqrt(128), rel=0.1)
    assert mean_interval(np.zeros(5)) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_ratio_resamples_both_sides_together() -> None:
    below = np.array([1.0, 5.0, 9.0, 2.0])
    found = ratio_interval(below / 4, below)
    assert found == {"value": 0.25, "low": pytest.approx(0.25), "high": pytest.approx(0.25)}

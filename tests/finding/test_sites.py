"""The site that steers is chosen from noisy effects, and the choice holds."""

from __future__ import annotations

import numpy as np

from steer.finding.directions import SiteCheck, chosen, middle, steerable

DEPTH = 30


def check(site: int, above: float, error: float = 0.1) -> SiteCheck:
    return SiteCheck(site, auroc=0.97, below=0.0, above=above, repetition=0.0, kl=0.0, error=error)


def test_the_middle_wins_among_sites_that_cannot_be_distinguished_and_no_further() -> None:
    near = [check(5, 0.1), check(9, 0.75), check(14, 0.66), check(18, 0.7)]
    assert chosen(near, DEPTH) == chosen(near[::-1], DEPTH) == 14
    assert chosen([check(9, 0.75), check(14, 0.48)], DEPTH) == 14
    assert chosen([check(9, 0.75), check(14, 0.46)], DEPTH) == 9
    assert chosen([check(9, 0.75, error=0.0), check(14, 0.75 - 1e-9, error=0.0)], DEPTH) == 9
    assert chosen([check(7, -1.0)], DEPTH) == 7


def test_seeds_agree_more_often_than_by_the_best_number_and_lose_less_effect() -> None:
    sites, noise, sd = (5, 9, 14, 18, 22), np.random.default_rng(0), 0.12
    true = dict(zip(sites, (0.3, 0.5, 0.55, 0.5, 0.3), strict=True))
    runs = [[check(s, t + noise.normal(0, sd), sd) for s, t in true.items()] for _ in range(2000)]
    ours = [chosen(run, DEPTH) for run in runs]
    alone = [max(run, key=lambda c: c.merit).site for run in runs]
    assert np.mean([s == 14 for s in ours]) > 1.4 * np.mean([s == 14 for s in alone])
    assert np.mean([true[s] for s in ours]) > np.mean([true[s] for s in alone])


def test_a_site_at_the_end_that_reads_best_is_not_steered_at() -> None:
    auroc = [0.6] * DEPTH
    auroc[12:17], auroc[29] = [0.8, 0.85, 0.85, 0.83, 0.7], 0.95
    assert steerable(auroc) == [12, 13, 14, 15]
    assert middle(steerable(auroc), DEPTH) == 14
    auroc[14] = 0.9  # now one in the middle reads as well as the best of all
    assert steerable(auroc) == [14]

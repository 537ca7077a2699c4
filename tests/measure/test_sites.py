"""The site that steers is chosen from noisy effects, and the choice holds."""

from __future__ import annotations

import numpy as np

from steer.measure.sites import SiteCheck, chosen


def check(site: int, above: float) -> SiteCheck:
    return SiteCheck(site, auroc=0.97, below=0.0, above=above, repetition=0.0, kl=0.0)


def test_a_lone_peak_loses_against_a_region() -> None:
    effects = {5: 0.1, 9: 0.75, 14: 0.2, 18: 0.7, 22: 0.65}
    checks = [check(site, above) for site, above in effects.items()]
    assert chosen(checks) in (18, 22)
    assert chosen(checks[::-1]) == chosen(checks)
    assert chosen([check(7, -1.0)]) == 7


def test_noise_costs_the_choice_less_effect_than_it_costs_the_best_single_merit() -> None:
    sites, noise = (5, 9, 14, 18, 22), np.random.default_rng(0)
    true = dict(zip(sites, (0.3, 0.5, 0.6, 0.5, 0.3), strict=True))
    runs = [[check(s, t + noise.normal(0, 0.15)) for s, t in true.items()] for _ in range(2000)]
    ours = np.mean([0.6 - true[chosen(run)] for run in runs])
    alone = np.mean([0.6 - true[max(run, key=lambda c: c.merit).site] for run in runs])
    assert ours < 0.9 * alone

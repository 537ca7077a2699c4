"""Which latents detect a trait: the AUROC of every latent at once, with a false discovery rate over all latents.

Takes pooled activations (`pooling`) of contrast replies; `steer.finding.latents` takes the best latents from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from steer.errors import UsageError
from steer.sae.pooling import Pooled


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well each latent separates replies with the trait from those without. An AUROC of 0.5 is chance; below it
    the latent speaks against the trait."""

    fit_auroc_max: Float[np.ndarray, " latents"]
    """AUROC on the fit replies of the largest activation over response tokens."""
    fit_auroc_mean: Float[np.ndarray, " latents"]
    """AUROC on the fit replies of the mean activation."""
    auroc_max: Float[np.ndarray, " latents"]
    """AUROC on held-out replies of the largest activation."""
    auroc_mean: Float[np.ndarray, " latents"]
    """AUROC on held-out replies of the mean activation."""
    pooling: np.ndarray
    """"max" or "mean" per latent: whichever AUROC is further from 0.5 on the fit replies."""
    auroc: Float[np.ndarray, " latents"]
    """AUROC on held-out replies, by that pooling."""
    q: Float[np.ndarray, " latents"]
    """The false discovery rate among all latents whose held-out `auroc` is at least as far from 0.5."""
    order: Int[np.ndarray, " latents"]
    """Latents by the distance of their fit AUROC from 0.5, best first. Held-out replies do not affect the order, so
    the held-out AUROC of the first latents is not biased by the selection."""
    replies: tuple[int, int, int, int]
    """Numbers of replies: fit with, fit without, held-out with, held-out without the trait."""


def rank(
    fit_with: Pooled,
    fit_without: Pooled,
    held_with: Pooled,
    held_without: Pooled,
    *,
    permutations: int = 200,
    seed: int = 0,
) -> Ranking:
    """Choose pooling and order on the fit replies, and measure on the held-out ones.

    q comes from permuted labels of the held-out replies, pooled over latents (SAM, Tusher et al. 2001; Storey and
    Tibshirani 2003, without assuming that some latents detect the trait): for a distance t from 0.5,
    q = (mean number of latents at least t away, over the arrangements of the labels) / (number of latents at least t
    away under the true labels). The true labels count as one of the arrangements (Phipson and Smyth 2010), so q is at
    least 1 / (permutations + 1). Labels are
    permuted within topics: under the null, replies to one topic under the two instructions are exchangeable.
    Error: UsageError when one of the four groups is empty.
    """
    groups = (fit_with, fit_without, held_with, held_without)
    if not all(map(len, groups)):
        counts = ", ".join(str(len(g)) for g in groups)
        raise UsageError(
            "ranking: expected replies with and without the trait on fit and on held-out topics, "
            f"found {counts}; give the trait more topics"
        )
    fit = {p: auroc(_values(fit_with, p), _values(fit_without, p)) for p in ("max", "mean")}
    ranks = {p: _ranks(_values(held_with, p), _values(held_without, p)) for p in ("max", "mean")}
    labels = np.array([True] * len(held_with) + [False] * len(held_without))
    held = {p: _from_ranks(r, labels[None])[0] for p, r in ranks.items()}

    by_max = np.abs(fit["max"] - 0.5) >= np.abs(fit["mean"] - 0.5)
    chosen = np.where(by_max, held["max"], held["mean"])
    permuted = permuted_labels(labels, (*held_with.topics, *held_without.topics), permutations, seed)
    null = _from_ranks(np.where(by_max, ranks["max"], ranks["mean"]), permuted)
    return Ranking(
        fit_auroc_max=fit["max"],
        fit_auroc_mean=fit["mean"],
        auroc_max=held["max"],
        auroc_mean=held["mean"],
        pooling=np.where(by_max, "max", "mean"),
        auroc=chosen,
        q=false_discovery_rates(chosen, null),
        order=np.argsort(-np.abs(np.where(by_max, fit["max"], fit["mean"]) - 0.5), kind="stable"),
        replies=(len(fit_with), len(fit_without), len(held_with), len(held_without)),
    )


def auroc(
    positive: Float[np.ndarray, "with latents"], negative: Float[np.ndarray, "without latents"]
) -> Float[np.ndarray, " latents"]:
    """AUROC of every column: the probability that a positive's score is above a negative's, ties counting half."""
    labels = np.array([True] * len(positive) + [False] * len(negative))
    return _from_ranks(_ranks(positive, negative), labels[None])[0]


def permuted_labels(
    labels: Bool[np.ndarray, " replies"], topics: Sequence[str], permutations: int, seed: int
) -> Bool[np.ndarray, "permutations replies"]:
    """Labels shuffled within each topic; over all replies if most replies have no reply of the other label to their
    topic."""
    rng = np.random.default_rng(seed)
    by_topic: dict[str, list[int]] = defaultdict(list)
    for i, topic in enumerate(topics):
        by_topic[topic].append(i)
    pairs = [rows for rows in by_topic.values() if 0 < labels[rows].sum() < len(rows)]
    if 2 * sum(map(len, pairs)) < len(labels):
        pairs = [list(range(len(labels)))]
    out = np.repeat(labels[None], permutations, axis=0)
    for rows in pairs:
        out[:, rows] = rng.permuted(out[:, rows], axis=1)
    return out


def false_discovery_rates(
    observed: Float[np.ndarray, " latents"], null: Float[np.ndarray, "permutations latents"]
) -> Float[np.ndarray, " latents"]:
    """q of each latent's distance from 0.5, from the AUROCs under permuted labels; see `rank`."""
    # AUROCs are whole multiples of 1 / (2 n n'); rounding removes float errors that would make equal ones differ.
    statistic = np.abs(observed - 0.5).round(9)
    pooled_null = np.sort(np.concatenate([np.abs(null - 0.5).round(9).ravel(), statistic]))
    order = np.argsort(-statistic, kind="stable")
    falling = statistic[order]
    expected = (len(pooled_null) - np.searchsorted(pooled_null, falling, side="left")) / (len(null) + 1)
    found = np.searchsorted(-falling, -falling, side="right")
    # A looser threshold may have a lower rate; q is the lowest rate among thresholds that include the latent.
    rates = np.minimum.accumulate((expected / found)[::-1])[::-1]
    out = np.empty_like(rates)
    out[order] = np.minimum(rates, 1)
    return out


def _values(group: Pooled, pooling: str) -> Float[np.ndarray, "replies latents"]:
    return getattr(group, pooling).numpy()


def _ranks(positive: np.ndarray, negative: np.ndarray) -> Float[np.ndarray, "replies latents"]:
    """Mid-ranks from 1 within each column: most latents are zero on most replies, so ties are the rule."""
    return rankdata(np.concatenate([positive, negative]), axis=0)


def _from_ranks(
    ranks: Float[np.ndarray, "replies latents"], labels: Bool[np.ndarray, "arrangements replies"]
) -> Float[np.ndarray, "arrangements latents"]:
    """AUROC by Mann and Whitney's U, as one matrix product for all arrangements of the labels.

    All arrangements have the same number of positives. Sums of half ranks are exact in fp64.
    """
    n = int(labels[0].sum())
    u = labels.astype(np.float64) @ ranks - n * (n + 1) / 2
    return u / (n * (labels.shape[1] - n))

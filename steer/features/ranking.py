"""Which latents tell a trait: AUROC of every latent at once, with a false discovery rate over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from steer.errors import UsageError
from steer.features.pooling import Pooled


@dataclass(frozen=True, eq=False)
class Ranking:
    """How well each latent tells replies with the trait from those without. 0.5 is chance; below it the latent
    speaks against the trait."""

    fit_auroc_max: Float[np.ndarray, " latents"]
    """On the fit replies, of the largest activation over response tokens."""
    fit_auroc_mean: Float[np.ndarray, " latents"]
    """On the fit replies, of the mean activation."""
    auroc_max: Float[np.ndarray, " latents"]
    """On held-out replies."""
    auroc_mean: Float[np.ndarray, " latents"]
    """On held-out replies."""
    pooling: np.ndarray
    """"max" or "mean": whichever is further from 0.5 on the fit replies."""
    auroc: Float[np.ndarray, " latents"]
    """On held-out replies, by that pooling."""
    q: Float[np.ndarray, " latents"]
    """The false discovery rate among all latents whose held-out `auroc` is at least as far from 0.5."""
    order: Int[np.ndarray, " latents"]
    """Latents by the distance of their fit AUROC from 0.5, best first. Held-out replies have no say in it, so
    the held-out AUROC of the first ones is honest."""
    replies: tuple[int, int, int, int]
    """How many: fit with, fit without, held-out with, held-out without."""


def rank(
    fit_with: Pooled,
    fit_without: Pooled,
    held_with: Pooled,
    held_without: Pooled,
    *,
    permutations: int = 200,
    seed: int = 0,
) -> Ranking:
    """Choose pooling and order on the fit replies, measure on the held-out ones.

    q comes from permuted labels of the held-out replies, pooled over latents (SAM, Tusher et al. 2001; Storey and
    Tibshirani 2003, with no latent presumed to be told): for a distance t from 0.5,
    q = (latents at least t away in the mean arrangement) / (latents at least t away), the labels as they are
    counted among the arrangements (Phipson and Smyth 2010), so q is at least 1 / (permutations + 1). Labels are
    permuted within topics: under the null, replies to one topic under the two instructions are exchangeable.
    Error: UsageError when one of the four groups is empty.
    """
    groups = (fit_with, fit_without, held_with, held_without)
    if not all(len(g) for g in groups):
        counts = ", ".join(str(len(g)) for g in groups)
        raise UsageError(
            "ranking: expected replies with and without the trait on fit and on held-out topics, "
            f"found {counts}; give the trait more topics"
        )
    fit = {p: _sides(fit_with, fit_without, p) for p in ("max", "mean")}
    held = {p: _sides(held_with, held_without, p) for p in ("max", "mean")}
    fit_auroc = {p: auroc(*fit[p]) for p in fit}
    held_ranks = {p: _ranks(*held[p]) for p in held}
    labels = np.array([True] * len(held_with) + [False] * len(held_without))

    by_max = np.abs(fit_auroc["max"] - 0.5) >= np.abs(fit_auroc["mean"] - 0.5)
    distance = np.abs(np.where(by_max, fit_auroc["max"], fit_auroc["mean"]) - 0.5)
    ranks = np.where(by_max, held_ranks["max"], held_ranks["mean"])
    permuted = permuted_labels(labels, (*held_with.topics, *held_without.topics), permutations, seed)
    return Ranking(
        fit_auroc_max=fit_auroc["max"],
        fit_auroc_mean=fit_auroc["mean"],
        auroc_max=_from_ranks(held_ranks["max"], labels[None])[0],
        auroc_mean=_from_ranks(held_ranks["mean"], labels[None])[0],
        pooling=np.where(by_max, "max", "mean"),
        auroc=_from_ranks(ranks, labels[None])[0],
        q=false_discovery_rates(_from_ranks(ranks, labels[None])[0], _from_ranks(ranks, permuted)),
        order=np.argsort(-distance, kind="stable"),
        replies=(len(fit_with), len(fit_without), len(held_with), len(held_without)),
    )


def auroc(
    positive: Float[np.ndarray, "with latents"], negative: Float[np.ndarray, "without latents"]
) -> Float[np.ndarray, " latents"]:
    """The chance that a positive's score is above a negative's, ties counting half, for every column at once."""
    labels = np.array([True] * len(positive) + [False] * len(negative))
    return _from_ranks(_ranks(positive, negative), labels[None])[0]


def permuted_labels(
    labels: Bool[np.ndarray, " replies"], topics: Sequence[str], permutations: int, seed: int
) -> Bool[np.ndarray, "permutations replies"]:
    """Labels shuffled within each topic; freely when most replies have no partner to swap with."""
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
    # AUROCs are whole multiples of 1 / (2 n n'), so rounding must not tell equal ones apart.
    statistic = np.abs(observed - 0.5).round(9)
    everywhere = np.sort(np.concatenate([np.abs(null - 0.5).round(9).ravel(), statistic]))
    order = np.argsort(-statistic, kind="stable")
    falling = statistic[order]
    expected = (len(everywhere) - np.searchsorted(everywhere, falling, side="left")) / (len(null) + 1)
    found = np.searchsorted(-falling, -falling, side="right")
    # The rate at a looser threshold may be lower; q is the lowest at which the latent is still found.
    rates = np.minimum.accumulate((expected / found)[::-1])[::-1]
    out = np.empty_like(rates)
    out[order] = np.minimum(rates, 1)
    return out


def _sides(with_: Pooled, without: Pooled, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    return getattr(with_, pooling).numpy(), getattr(without, pooling).numpy()


def _ranks(positive: np.ndarray, negative: np.ndarray) -> Float[np.ndarray, "replies latents"]:
    """Mid-ranks from 1 within each column: most latents are zero on most replies, so ties are the rule."""
    return rankdata(np.concatenate([positive, negative]), axis=0)


def _from_ranks(
    ranks: Float[np.ndarray, "replies latents"], labels: Bool[np.ndarray, "arrangements replies"]
) -> Float[np.ndarray, "arrangements latents"]:
    """AUROC by Mann and Whitney's U, one matrix product for all arrangements of the labels.

    Every arrangement has as many positives as the first. Sums of half ranks are exact in fp64.
    """
    n = int(labels[0].sum())
    u = labels.astype(np.float64) @ ranks - n * (n + 1) / 2
    return u / (n * (labels.shape[1] - n))

"""Ranking latents: AUROC over all of them at once, and how often it may be wrong about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_chat import replies_of, save_tiny_chat

from steer.core.dictionary import Dictionary
from steer.errors import MismatchError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae.pooling import Pooled, pooled
from steer.sae.ranking import Ranking, auroc, false_discovery_rates, permuted_labels, rank


def sparse(rng: np.random.Generator, replies: int, latents: int) -> np.ndarray:
    """Pooled activations as they are: mostly zero, in steps, so that ties are the rule."""
    return np.where(rng.random((replies, latents)) < 0.3, np.ceil(4 * rng.random((replies, latents))), 0.0)


def as_pooled(values: np.ndarray, topics: list[str] | None = None) -> Pooled:
    largest = torch.tensor(values, dtype=torch.float32)
    return Pooled(largest, largest / 2, tuple(topics or (f"topic {i}" for i in range(len(values)))))


def groups(seed: int, replies: int = 40, latents: int = 500, planted: int | None = None) -> list[Pooled]:
    rng = np.random.default_rng(seed)
    out = [sparse(rng, replies, latents) for _ in range(4)]
    if planted is not None:
        for side in (0, 2):
            out[side][:, planted] += (rng.random(replies) < 0.8) * (5 + rng.random(replies))
    return [as_pooled(v) for v in out]


def test_auroc_is_sklearns_for_every_latent_ties_included() -> None:
    rng = np.random.default_rng(0)
    with_, without = sparse(rng, 23, 60), sparse(rng, 31, 60)
    with_[:, 0] = without[:, 0] = 0  # a latent that never fires
    labels = [1] * 23 + [0] * 31
    expected = [float(roc_auc_score(labels, np.r_[with_[:, j], without[:, j]])) for j in range(60)]
    np.testing.assert_allclose(auroc(with_, without), expected, atol=1e-12)
    assert auroc(with_, without)[0] == 0.5


def test_a_planted_latent_is_found_and_comes_first() -> None:
    found = rank(*groups(1, planted=123))
    assert found.order[0] == 123
    assert found.q[123] < 0.05
    assert found.auroc[123] > 0.85
    assert (found.q < 0.05).sum() <= 3


def test_a_latent_that_falls_silent_with_the_trait_is_found_too() -> None:
    with_, without, held_with, held_without = groups(2, planted=7)
    found = rank(without, with_, held_without, held_with)
    assert found.order[0] == 7
    assert found.auroc[7] < 0.15
    assert found.q[7] < 0.05


def test_noise_is_hardly_ever_called_a_find() -> None:
    called = [int((rank(*groups(seed, latents=1000), permutations=100).q < 0.05).sum()) for seed in range(20)]
    # At a rate of 0.05 the chance that anything is called at all is about as much in pure noise.
    assert sum(c > 0 for c in called) <= 4


def test_the_share_of_false_finds_is_near_what_q_says() -> None:
    wrong = found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        values = [sparse(rng, 40, 600) for _ in range(4)]
        for side in (0, 2):
            values[side][:, :60] += 2.0 * (rng.random((40, 60)) < 0.6)
        called = rank(*map(as_pooled, values), seed=seed).q < 0.1
        wrong, found = wrong + int(called[60:].sum()), found + int(called.sum())
    assert found > 300
    assert wrong / found < 0.15


def test_held_out_replies_have_no_say_in_order_or_pooling() -> None:
    fit_with, fit_without, held_with, held_without = groups(3, planted=5)
    one, other = (rank(fit_with, fit_without, *held) for held in ((held_with, held_without), groups(4)[2:]))
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.pooling, other.pooling)
    assert not np.array_equal(one.auroc, other.auroc)


def test_the_pooling_that_separates_the_fit_replies_is_the_one_measured() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for shift in (4.0, 0.0, 4.0, 0.0):
        largest, mean = rng.random((30, 2)), rng.random((30, 2))
        largest[:, 0] += shift
        mean[:, 1] += shift
        parts.append(Pooled(torch.tensor(largest), torch.tensor(mean), tuple(map(str, range(30)))))
    found: Ranking = rank(*parts)
    assert found.pooling.tolist() == ["max", "mean"]
    assert found.auroc.tolist() == [found.auroc_max[0], found.auroc_mean[1]] == [1.0, 1.0]


def test_labels_are_swapped_within_topics_alone() -> None:
    topics = [f"topic {i}" for i in range(10)] * 2
    labels = np.array([True] * 10 + [False] * 10)
    swapped = permuted_labels(labels, topics, 50, seed=0)
    # One of the two replies to each topic stays the one with the trait.
    np.testing.assert_array_equal(swapped[:, :10] ^ swapped[:, 10:], True)
    assert len({tuple(row) for row in swapped}) > 40


def test_labels_move_freely_when_topics_are_not_paired() -> None:
    labels = np.array([True] * 10 + [False] * 10)
    free = permuted_labels(labels, [f"topic {i}" for i in range(20)], 50, seed=0)
    assert (free.sum(1) == 10).all()
    assert len({tuple(row) for row in free}) > 40


def test_q_rises_with_falling_distance_and_counts_ties_alike() -> None:
    observed = np.array([0.95, 0.05, 0.7, 0.5, 0.3])
    null = 0.5 + 0.2 * (np.random.default_rng(0).random((100, 5)) - 0.5)
    q = false_discovery_rates(observed, null)
    assert q[0] == q[1] <= q[2] == q[4] <= q[3] <= 1
    # Nothing in the null is as far away, so the labels as they are alone count: one arrangement of 101.
    assert q[0] == pytest.approx(1 / 101)


def test_an_empty_side_is_refused() -> None:
    parts = groups(0)
    with pytest.raises(UsageError, match="40, 40, 0, 40"):
        rank(parts[0], parts[1], as_pooled(np.zeros((0, 500))), parts[3])


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("ranking") / "chat"))


def tiny_dictionary(width: int = 32, latents: int = 80, site: int | None = 1, **more: object) -> Dictionary:
    torch.manual_seed(0)
    W = torch.randn(latents, width) / width**0.5
    return Dictionary("topk", W.T.contiguous(), torch.zeros(latents), W, torch.zeros(width), k=6, site=site, **more)  # type: ignore[arg-type]


def test_pooling_is_over_each_replys_own_tokens(model: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = tiny_dictionary()
    replies = replies_of(model, ["lie ba be", "truth", "well yes friend lie bo bu di do"])
    monkeypatch.setattr("steer.model.forward.AT_ONCE", 3 * dictionary.latents)  # three tokens at a time
    got = pooled(model, dictionary, replies)
    assert got.topics == tuple(r.chat[-1]["content"] for r in replies)
    for i, reply in enumerate(replies):
        prompt = model.prompt_ids(reply.chat)
        with model.record([1]) as residuals, torch.no_grad():
            model.hf(torch.tensor([prompt + list(reply.ids)]))
        acts = dictionary.encode(residuals[1][0, len(prompt) :])
        torch.testing.assert_close(got.max[i], acts.amax(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.mean[i], acts.mean(0), atol=1e-5, rtol=1e-4)


def test_outlier_tokens_are_left_out_of_the_pools(model: SteeredModel) -> None:
    replies = replies_of(model, ["lie ba be bi bo bu da de"])
    prompt = model.prompt_ids(replies[0].chat)
    with model.record([1]) as residuals, torch.no_grad():
        model.hf(torch.tensor([prompt + list(replies[0].ids)]))
    x = residuals[1][0, len(prompt) :]
    norms = x.norm(dim=-1)
    dictionary = tiny_dictionary(norm=float(norms.sort().values[4] + norms.sort().values[5]) / 20)
    kept = dictionary.encode(x[norms <= norms.sort().values[4]])
    got = pooled(model, dictionary, replies)
    torch.testing.assert_close(got.max[0], kept.amax(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.mean[0], kept.mean(0), atol=1e-5, rtol=1e-4)


def test_a_dictionary_of_another_model_is_refused_by_name(model: SteeredModel) -> None:
    with pytest.raises(MismatchError, match=r"width 16.*residual width 32"):
        pooled(model, tiny_dictionary(width=16), [])
    with pytest.raises(UsageError, match="site from 0 to 2"):
        pooled(model, tiny_dictionary(site=None), [])

"""The k-sparse kernels against dense arithmetic."""

from __future__ import annotations

import pytest
import torch

from steer.sae.objectives import Active, ByLatent, above, decode, largest, products, top_k


def dense(active: Active, values: torch.Tensor, m: int) -> torch.Tensor:
    out = torch.zeros(len(active.offsets) - 1, m, dtype=values.dtype)
    out[active.rows, active.latents] = values
    return out


@pytest.mark.parametrize(("m", "k"), [(4608, 32), (256, 5), (100, 7), (64, 64)])
def test_top_k_finds_exactly_what_torch_finds(m, k):
    scores = torch.randn(50, m, generator=torch.Generator().manual_seed(0))
    active = top_k(scores, k)
    ours = dense(active, torch.ones(50 * k), m).bool()
    theirs = torch.zeros(50, m).scatter(1, scores.topk(k).indices, 1.0).bool()
    assert torch.equal(ours, theirs)
    assert active.offsets.tolist() == list(range(0, 50 * k + 1, k))


def test_top_k_takes_as_large_values_where_many_are_equal():
    scores = torch.randint(0, 4, (40, 1024), generator=torch.Generator().manual_seed(0)).float()
    active = top_k(scores, 16)
    ours = scores[active.rows, active.latents].view(40, 16).sort(1).values
    assert torch.equal(ours, scores.topk(16).values.sort(1).values)
    assert all(len(set(row.tolist())) == 16 for row in active.latents.view(40, 16))


def test_the_largest_of_a_batch_are_found_across_its_rows():
    scores = torch.randn(30, 200, generator=torch.Generator().manual_seed(1))
    active = largest(scores, *above(scores, 0.5), 90)
    threshold = scores.flatten().topk(90).values.min()
    assert torch.equal(dense(active, torch.ones(90), 200).bool(), scores >= threshold)
    counts = (scores >= threshold).sum(1)
    assert torch.equal(active.offsets.diff(), counts)


def test_products_decoding_and_gradients_equal_dense_matrix_products():
    g = torch.Generator().manual_seed(2)
    x, table = torch.randn(40, 48, generator=g), torch.randn(128, 48, generator=g)
    active = top_k(torch.randn(40, 128, generator=g), 6)
    values = torch.randn(240, generator=g)
    assert torch.allclose(products(x, table, active), (x @ table.T)[active.rows, active.latents], atol=1e-5)
    matrix = dense(active, values, 128)
    assert torch.allclose(decode(values, active, table), matrix @ table, atol=1e-5)
    assert torch.allclose(ByLatent.of(active, 128).gradient(values, x), matrix.T @ x, atol=1e-5)


def test_products_without_the_sparse_library_are_the_same(monkeypatch):
    g = torch.Generator().manual_seed(2)
    x, table = torch.randn(40, 48, generator=g), torch.randn(128, 48, generator=g)
    active = top_k(torch.randn(40, 128, generator=g), 6)
    with_mkl = products(x, table, active)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert torch.allclose(products(x, table, active), with_mkl, atol=1e-5)


def test_a_batch_in_which_nothing_fires_decodes_to_zero():
    scores = -torch.ones(3, 32)
    active = largest(scores, *above(scores, 0.0), 10)
    table = torch.randn(32, 8)
    assert torch.equal(decode(torch.zeros(0), active, table), torch.zeros(3, 8))
    assert torch.equal(ByLatent.of(active, 32).gradient(torch.zeros(0), torch.randn(3, 8)), torch.zeros(32, 8))

"""What a dictionary's reconstruction costs when it is spliced in, on a tiny model with known dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat
from torch.nn.functional import cross_entropy

from steer.core.dictionary import Dictionary
from steer.errors import MismatchError, UsageError
from steer.model.steered import SteeredModel, load
from steer.sae.splice import cross_entropies

SITE = 1


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("splice") / "chat"))


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    made = torch.Generator().manual_seed(3)
    return [[1, *torch.randint(6, 70, (n,), generator=made).tolist()] for n in (5, 30, 17, 9, 30, 2)]


def identity(width: int = 32, **known: object) -> Dictionary:
    """relu(x) - relu(-x): gives back what it reads."""
    eye = torch.eye(width)
    both = torch.cat([eye, -eye])
    fields = {"site": SITE, "norm": None, "subtract_b_dec": False} | known
    return Dictionary("standard", both.T.contiguous(), torch.zeros(2 * width), both, torch.zeros(width), **fields)


def constant(value: torch.Tensor) -> Dictionary:
    """Knows nothing but one vector."""
    d = len(value)
    return Dictionary("standard", torch.zeros(d, 4), torch.zeros(4), torch.zeros(4, d), value, site=SITE)


@torch.inference_mode()
def residuals(model: SteeredModel, document: list[int]) -> torch.Tensor:
    with model.record([SITE]) as recording:
        model.hf(torch.tensor([document]))
    return recording[SITE][0]


def test_a_perfect_dictionary_recovers_everything(model: SteeredModel, documents: list[list[int]]) -> None:
    found = cross_entropies(model, identity(), documents)
    assert found.spliced == pytest.approx(found.plain, abs=1e-5)
    assert found.recovered == pytest.approx(1.0, abs=1e-4)
    assert found.ablated != pytest.approx(found.plain, abs=0.01)


def test_a_dictionary_that_knows_the_mean_alone_recovers_nothing(
    model: SteeredModel, documents: list[list[int]]
) -> None:
    mean = torch.cat([residuals(model, d)[1:] for d in documents]).mean(0)
    found = cross_entropies(model, constant(mean), documents)
    assert found.spliced == pytest.approx(found.ablated, abs=1e-5)
    assert found.recovered == pytest.approx(0.0, abs=1e-4)


def test_the_plain_loss_is_the_models_own_after_the_first_position(
    model: SteeredModel, documents: list[list[int]]
) -> None:
    losses = []
    for d in documents:
        with torch.inference_mode():
            logits = model.hf(torch.tensor([d])).logits[0]
        losses.append(cross_entropy(logits[1:-1], torch.tensor(d[2:]), reduction="none"))
    found = cross_entropies(model, identity(), documents)
    assert found.plain == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found.tokens == sum(len(d) - 2 for d in documents)


@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_losses_do_not_depend_on_the_batches(
    model: SteeredModel, documents: list[list[int]], batch_tokens: int
) -> None:
    torch.manual_seed(0)
    rough = constant(torch.randn(32))
    one, other = (cross_entropies(model, rough, documents, batch_tokens=n) for n in (4096, batch_tokens))
    for field in ("plain", "spliced", "ablated"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-5)


def test_outliers_and_the_first_position_are_left_as_they_are(model: SteeredModel, documents: list[list[int]]) -> None:
    norms = torch.cat([residuals(model, d)[1:-1].norm(dim=-1) for d in documents])
    limit = float(norms.median()) / 10
    found = cross_entropies(model, identity(norm=limit), documents)
    assert found.tokens == int((norms <= 10 * limit).sum())
    assert 0 < found.tokens < len(norms)
    # A document of which only the first position could be replaced has no prediction to count.
    with pytest.raises(UsageError, match="three tokens"):
        cross_entropies(model, identity(), [[1, 7]])
    with pytest.raises(UsageError, match="outliers alone"):
        cross_entropies(model, identity(norm=1e-6), documents)


def test_another_width_and_a_missing_site_are_refused(model: SteeredModel, documents: list[list[int]]) -> None:
    with pytest.raises(MismatchError, match="width 16"):
        cross_entropies(model, identity(16), documents)
    for site in (None, 3):
        with pytest.raises(UsageError, match="site from 0 to 2"):
            cross_entropies(model, identity(site=site), documents)


def test_no_hook_is_left_after_an_exception(model: SteeredModel, documents: list[list[int]]) -> None:
    class Broken(Dictionary):
        def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    d = identity()
    broken = Broken(d.architecture, d.W_enc, d.b_enc, d.W_dec, d.b_dec, site=SITE)
    with pytest.raises(RuntimeError, match="broken"):
        cross_entropies(model, broken, documents)
    assert hooks_on(model) == 0

"""Linear layers on a CPU: torch's numbers up to rounding, and still torch's layers to everyone else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steer.model import products
from steer.model.products import AT_ONCE, FEW, WIDE, CpuLinear, product, use_fast_products
from steer.model.steered import SteeredModel, load


@pytest.mark.parametrize("outputs", [24, WIDE + AT_ONCE + 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (2,), (3, 5), (FEW,), (FEW + 1,), (2, 3, FEW)])
def test_a_product_is_torchs_up_to_rounding(shape: tuple[int, ...], bias: bool, outputs: int) -> None:
    made = torch.Generator().manual_seed(len(shape))
    x, weight = torch.randn(*shape, 16, generator=made), torch.randn(outputs, 16, generator=made)
    b = torch.randn(outputs, generator=made) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.inference_mode():
        found = product(x, weight, b)
    torch.testing.assert_close(product(x, weight, b), found)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert product(x.double(), weight.double(), None if b is None else b.double()).equal(wanted)


def test_gradients_pass_through() -> None:
    for rows in (1, 3, FEW + 1):
        x = torch.randn(rows, 8, requires_grad=True)
        weight = torch.randn(WIDE + 1, 8)
        product(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(rows, -1), rtol=1e-4, atol=1e-3)


def test_a_copy_has_weights_of_its_own_and_other_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)

    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).double(), nn.Embedding(3, 4))
    use_fast_products(model)
    assert [type(m) for m in model] == [CpuLinear, Own, nn.Linear, nn.Embedding]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert copied[0].weight.any()
    assert copied[0](torch.ones(4)).any()


@pytest.mark.parametrize("maker", ["AMD EPYC", "Intel Xeon"])
def test_a_loaded_model_has_them_in_fp32_alone_and_on_amd_alone(
    chat_checkpoint: Path, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": maker})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)

    def kinds(model: SteeredModel) -> set[type]:
        return {type(m) for m in model.hf.modules() if isinstance(m, nn.Linear)}

    assert kinds(load(chat_checkpoint, dtype="float32")) == {CpuLinear if "AMD" in maker else nn.Linear}
    assert kinds(load(chat_checkpoint, dtype="float64")) == {nn.Linear}

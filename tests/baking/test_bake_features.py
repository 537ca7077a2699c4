"""Features in a bake: what adds becomes a bias, what reads is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Certificate
from steer.baking.verify import verify
from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.errors import MismatchError, UnsupportedError, UsageError

TOKENS = torch.tensor([[1, 5, 17, 60, 3, 96, 44], [1, 2, 8, 8, 71, 30, 0]])


def feature(name: str = "L1/3", *, width: int = 32, site: int = 1) -> Feature:
    W_dec = torch.randn(40, width, generator=torch.Generator().manual_seed(3)) / width**0.5
    dictionary = Dictionary(
        "standard", W_dec.T.clone(), torch.zeros(40), W_dec, torch.zeros(width), site=site, norm=4.0,
        manifest={"name": "tiny", "checkpoint": "source"},
    )  # fmt: skip
    return Feature(name, dictionary, (3, 7), (2.0, -1.5))


@torch.no_grad()
def _logits(path: Path, shift: Tensor | None = None) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    if shift is not None:
        model.model.layers[1].register_forward_hook(lambda module, args, out: out + shift)
    return model(TOKENS).logits


def test_a_feature_that_adds_is_baked_as_a_bias_and_certified(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    source, f = tiny_llama(tmp_path / "source", dtype=torch.float64), feature()
    cert = bake(source, tmp_path / "out", Edit(moves=(Slider(f, "add", -1.25),)))
    shift = -1.25 * (2.0 * f.decoder[0] - 1.5 * f.decoder[1]).double()
    expected = _logits(source, shift)
    assert float((expected - _logits(source)).abs().max()) > 0.05
    assert float((_logits(tmp_path / "out") - expected).abs().max()) < 1e-5
    assert cert == Certificate.load(tmp_path / "out")
    (saved,) = cert.directions
    assert (saved.name, saved.site, saved.amount) == ("L1/3", 1, -1.25)
    assert saved.provenance["latents"] == [3, 7]
    assert Direction.load(tmp_path / "out" / saved.file).share(1) == pytest.approx(f.share(1))
    assert [c.name for c in verify(tmp_path / "out")][-1] == "add"


def test_features_and_directions_at_one_site_are_summed(
    tmp_path: Path, tiny_llama: Callable[..., Path], make_direction: Callable[..., Direction]
) -> None:
    source, f, moral = tiny_llama(tmp_path / "source", dtype=torch.float64), feature(), make_direction()
    bake(source, tmp_path / "out", Edit(add=((moral, 0.5),), moves=(Slider(f, "add", 1.0),)))
    shift = 0.5 * moral.gap * moral.vector.double() + (2.0 * f.decoder[0] - 1.5 * f.decoder[1]).double()
    assert float((_logits(tmp_path / "out") - _logits(source, shift)).abs().max()) < 1e-5


@pytest.mark.parametrize(("operation", "amount"), [("clamp", 1.0), ("scale", 0.0), ("ablate", 1.0)])
def test_an_operation_that_reads_the_activation_is_refused_in_one_line(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction], operation: str, amount: float
) -> None:
    plain = Feature("preach", feature().dictionary, (3,), (1.0,))
    move = Slider(plain, operation, amount)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match=rf"1 of 2 sliders cannot be baked: 'preach' \({operation}\)") as e:
        bake(source, tmp_path / "out", Edit((make_direction(),), moves=(move,)))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (feature(width=64), MismatchError, r"width 64.*width 32"),
        (feature(site=3), UsageError, "feature 'L1/3': expected a site from 0 to 2"),
    ],
)
def test_a_feature_that_does_not_fit_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, bad: Feature, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bake(source, tmp_path / "out", Edit(moves=(Slider(bad, "add", 1.0),)))
    assert list(tmp_path.iterdir()) == []


def test_a_feature_at_its_neutral_amount_is_nothing_to_bake(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to bake"):
        bake(source, tmp_path / "out", Edit(moves=(Slider(feature(), "add", 0.0),)))

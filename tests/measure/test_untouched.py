"""Finding and measuring look at the untouched model, whatever sliders stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import ENDLESS, hooks_on, save_tiny_chat

from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.trait import Trait
from steer.finding.directions import candidates, finished_direction
from steer.measure.calibrate import NeutralCosts
from steer.measure.contrast import Reply, contrast_replies, reply_tokens
from steer.measure.harness import Reference, neutral_replies, row_costs, text_entropies
from steer.model.fit_check import check_fit
from steer.model.steered import SteeredModel, load
from steer.sae.attribution import attribution, output_scores
from steer.sae.harvest import harvest
from steer.sae.pooling import pooled
from steer.sae.splice import cross_entropies

TRAIT = Trait("t", "s", "lie", "truth", ("lie",), ("hello", "well"), ("friend", "yes"))
SHORT = Sampler(max_new_tokens=6)
REPLIES = [Reply(({"role": "user", "content": w},), (9, 10, 11, 12), "") for w in ("hello", "yes")]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("untouched") / "chat", **ENDLESS))


def dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 32, generator=generator)
    rows /= rows.norm(dim=-1, keepdim=True)
    return Dictionary("standard", rows.T.contiguous(), torch.zeros(24), rows, torch.zeros(32), site=1, norm=5.0)


def _found(model: SteeredModel) -> Any:
    contrast = contrast_replies(model, TRAIT, sampler=SHORT, neutral=REPLIES)
    found = candidates(model, contrast)
    return contrast.as_json(), found.vectors, found.auroc, finished_direction(model, found, 1, {}).std


def _harvested(model: SteeredModel, tmp_path: Path) -> Any:
    (tmp_path / "x.txt").write_text("hello friend well yes\n" * 3)
    made = harvest(model, tmp_path / f"harvest-{hooks_on(model)}", sites=[1], sources=str(tmp_path / "x.txt"))
    return made.activations(1)[:]


def _costs(model: SteeredModel) -> Any:
    costs = NeutralCosts(model, SHORT)
    edit = Edit(add=((Direction("d", 1, torch.ones(32), with_mean=1.0, without_mean=0.0, residual_norm=1.0), 0.5),))
    return costs.replies, costs.divergences([edit])


LATENTS = [Feature("f", dictionary(), (3,), (1.0,))]
LOOKS: dict[str, Callable[[SteeredModel, Path], Any]] = {
    "finding": lambda model, _: _found(model),
    "residual streams": lambda model, _: reply_tokens(model, REPLIES, 1),
    "neutral replies": lambda model, _: neutral_replies(model, ["hello"], tokens=6),
    "pooling": lambda model, _: pooled(model, dictionary(), REPLIES).mean,
    "attribution": lambda model, _: attribution(model, dictionary(), REPLIES[:1], REPLIES[1:], [0, 1, 2]),
    "output scores": lambda model, _: output_scores(model, dictionary(), LATENTS, ["hello"]),
    "divergence": lambda model, _: Reference.of(model, REPLIES).hidden,
    "prose": lambda model, _: text_entropies(model, ["hello friend well"])[0],
    "row costs": lambda model, _: row_costs(model, [([1, 4], [9, 10])], []),
    "neutral costs": lambda model, _: _costs(model),
    "splice": lambda model, _: cross_entropies(model, dictionary(), [[1, 9, 10, 11, 12, 13]]),
    "fit": lambda model, _: check_fit(model, dictionary()),
    "harvest": _harvested,
}


@pytest.mark.parametrize("look", LOOKS)
def test_standing_sliders_change_no_number(
    model: SteeredModel, make_direction: Callable[..., Direction], tmp_path: Path, look: str
) -> None:
    expected = LOOKS[look](model, tmp_path)
    model.sliders.put(make_direction("moral", site=0), 3.0)
    try:
        found = LOOKS[look](model, tmp_path)
        assert dict(model.sliders) == {"moral": 3.0}
        assert hooks_on(model) == 1
    finally:
        model.sliders.reset()
    assert _same(found, expected)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and not hasattr(a, "_fields"):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else a == b

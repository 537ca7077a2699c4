"""The default model in the shape of other architectures: same words, same effect of a slider, same bake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reshaped import SHAPES, save_reshaped

import steer
from steer.baking.verify import verify
from steer.checkpoint.fetch import DEFAULT_MODEL, fetch
from steer.checkpoint.shipped import DICTIONARIES
from steer.core.direction import Direction
from steer.model.steered import SteeredModel, load

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning"),
]
QUESTION = "My friend lied to me about why he missed my party. What now?"


def said(model: SteeredModel, moral: Direction | None = None) -> str:
    """Return a greedy reply, ablated by `moral` if it is given."""
    amounts = {steer.Slider(moral, "ablate"): 1.0} if moral else {}
    with model.steered(amounts):
        return model.chat(QUESTION, temperature=0, max_new_tokens=16)


@pytest.fixture(scope="module")
def moral() -> Direction:
    """The direction that ships; it was found on the default merge, and acts on this model as well."""
    return Direction.load(DICTIONARIES / "smollm2-135m-default-merge/directions/moralizing.safetensors")


@pytest.fixture(scope="module")
def llama(moral: Direction) -> tuple[str, str]:
    """What the default model says, untouched and ablated."""
    model = load(fetch(DEFAULT_MODEL), dtype=torch.float32)
    plain, ablated = said(model), said(model, moral)
    assert plain != ablated
    return plain, ablated


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_model_is_the_same_character_in_another_architecture(
    shape: str, llama: tuple[str, str], moral: Direction, tmp_path: Path
) -> None:
    place, baked = save_reshaped(fetch(DEFAULT_MODEL), shape, tmp_path / shape), tmp_path / "baked"
    model = load(place, dtype=torch.float32)
    assert type(model.hf).__name__ != "LlamaForCausalLM"
    assert (said(model), said(model, moral)) == llama
    del model
    steer.bake(place, baked, ablate=[moral], force=True)
    assert verify(baked, source=place)
    assert said(load(baked, dtype=torch.float32)) == llama[1]

"""Embeddings that are the LM head too, or only said to be: every output follows the head that transformers loads."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_anatomies import config_of, load, logits
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Certificate
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.verify import verify
from steer.checkpoint.reader import SINGLE
from steer.checkpoint.sketch import sketch_files
from steer.core.edit import Edit

TinyLlama = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path, tiny_llama: TinyLlama) -> Path:
    """A tied checkpoint in fp64, its head not stored."""
    return tiny_llama(tmp_path / "tied", dtype=torch.float64)


@pytest.fixture(params=["head first", "embedding first"])
def differing(request: pytest.FixtureRequest, tied: Path) -> Path:
    """The same with another head stored beside the tie, in another shard than the embedding, in either order."""
    tensors = load_file(tied / SINGLE)
    (tied / SINGLE).unlink()
    head = {HEAD: torch.randn(97, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}
    parts = [head, tensors] if request.param == "head first" else [tensors, head]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tied / name, metadata={"format": "pt"})
    where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (tied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tied


def _by_hooks(source: Path, edit: Edit) -> Tensor:
    """The logits of the source, the directions taken out of what every writer puts out."""
    model, q = load(source), edit.basis()
    writers = ["self_attn.o_proj", "mlp.down_proj"]
    paths = ["model.embed_tokens", *(f"model.layers.{b}.{w}" for b in range(3) for w in writers)]
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda module, args, y: y - (y @ q) @ q.T)
    return logits(model)


def _adapted(source: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(load(source), adapter).eval()


def test_a_stored_head_that_differs_from_its_tie_is_the_head_in_every_output(
    differing: Path, tmp_path: Path, ablation: Edit
) -> None:
    model = load(differing)
    head = model.lm_head.weight
    assert not torch.equal(head, model.model.embed_tokens.weight)  # what transformers 5 computes
    expected = _by_hooks(differing, ablation)

    plan = CheckpointPlan(differing, ablation).summary()
    assert "lm_head.weight: differs from the embedding, though config.json ties them; kept as it is stored" in plan
    bake(differing, tmp_path / "baked", ablation)
    assert (logits(load(tmp_path / "baked")) - expected).abs().max() < 1e-9
    assert torch.equal(load(tmp_path / "baked").lm_head.weight, head)
    assert config_of(tmp_path / "baked")["tie_word_embeddings"] is False
    assert verify(tmp_path / "baked", source=differing)[-1].name == "source"

    bake(differing, tmp_path / "adapter", ablation, "adapter")
    adapted = _adapted(differing, tmp_path / "adapter")
    assert (logits(adapted) - expected).abs().max() < 1e-9
    assert (logits(adapted.merge_and_unload()) - expected).abs().max() < 1e-9
    assert not Certificate.load(tmp_path / "adapter").untie_to_merge
    assert verify(tmp_path / "adapter", source=differing)[-1].name == "source"

    assert sketch_files(differing).same_as(sketch_files(differing))
    assert not sketch_files(tmp_path / "baked").same_as(sketch_files(differing))


def test_an_edit_that_leaves_the_embedding_alone_leaves_the_head_as_it_is_loaded(
    differing: Path, tmp_path: Path, ablation: Edit
) -> None:
    bake(differing, tmp_path / "baked", Edit(ablate=ablation.ablate, blocks=(1, 2)))
    assert torch.equal(load(tmp_path / "baked").lm_head.weight, load(differing).lm_head.weight)


def test_a_merge_of_an_adapter_for_a_tied_model_differs_and_its_card_says_how_it_does_not(
    tied: Path, tmp_path: Path, ablation: Edit
) -> None:
    expected = _by_hooks(tied, ablation)
    adapter = tmp_path / "adapter"
    assert bake(tied, adapter, ablation, "adapter").untie_to_merge
    adapted = _adapted(tied, adapter)
    assert (logits(adapted) - expected).abs().max() < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (logits(adapted.merge_and_unload()) - expected).abs().max() > 0.05

    card = (adapter / "README.md").read_text()
    assert "Do not merge it as it is: the LM head of the source is its embedding" in card
    (recipe,) = re.findall(r"```python\n(import torch\n.*?)```", card, re.DOTALL)
    recipe = recipe.replace("the source", str(tied)).replace("this directory", str(adapter))
    namespace: dict[str, Any] = {}
    exec(recipe.replace(f'"{tied}"', f'"{tied}", dtype=torch.float64, attn_implementation="eager"'), namespace)
    assert (logits(namespace["model"]) - expected).abs().max() < 1e-9
    namespace["model"].save_pretrained(tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_that_merges_right_says_nothing_of_merging(
    tie: bool, tmp_path: Path, tiny_llama: TinyLlama, ablation: Edit
) -> None:
    source = tiny_llama(tmp_path / "source", tie=tie, dtype=torch.float64)
    edit = Edit(ablate=ablation.ablate, blocks=(0, 2)) if tie else ablation
    assert not bake(source, tmp_path / "adapter", edit, "adapter").untie_to_merge
    assert "merge" not in (tmp_path / "adapter" / "README.md").read_text()
    adapted = _adapted(source, tmp_path / "adapter")
    expected = logits(adapted)
    assert (logits(adapted.merge_and_unload()) - expected).abs().max() < 1e-9

"""What a merge writes beside weights: layer lists, rope for older readers, stop ids; and weights that overflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config

from steer.checkpoint.merge import MANIFEST, add_older_rope_keys, merge, recipe_models, sliced_lists
from steer.errors import SteerError

TinyLlama = Callable[..., Path]
PHI = {
    "hidden_size": 64, "num_attention_heads": 2, "partial_rotary_factor": 0.75, "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12},
}  # fmt: skip
"""As Phi-4-mini has it: three quarters of each head rotate."""
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}
LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}


def write(path: Path, recipe: object) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_merge_of_slices_has_a_layer_type_for_each_layer_of_its_own(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    tiny_llama(
        tmp_path / "a", architecture="Qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=16, tie=True
    )
    slices = [{"sources": [{"model": "a", "layer_range": r}]} for r in ([0, 2], [1, 3])]
    out = merge(write(tmp_path / "r.yml", {"merge_method": "passthrough", "slices": slices}), tmp_path / "out")
    config = AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, config.layer_types) == (4, [*kinds[:2], *kinds[1:]])


def test_an_entry_with_only_a_model_in_the_form_of_mappings_names_it() -> None:
    both = {"model": {"path": "a/b"}, "lora": {"path": "c/d"}}
    assert recipe_models({"models": [{"model": both}, {"model": "e"}]}) == ["a/b+c/d", "e"]


def test_lists_of_layer_numbers_move_with_their_layers() -> None:
    config = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "no_rope_layers": [1, 1, 1, 0], "eos_token_id": [1, 2]}
    found = sliced_lists([(config, 2, 4), (config, 0, 1)])
    assert found == {"mlp_only_layers": [1, 2], "no_rope_layers": [1, 0, 1]}


def test_a_base_model_in_the_form_of_mappings_is_merged_beside_its_recipe(
    tmp_path: Path, tiny_llama: TinyLlama
) -> None:
    tiny_llama(tmp_path / "a", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    path = {"model": {"path": "a", "revision": None}}
    recipe = {"merge_method": "linear", "base_model": path, "models": [{"model": path, "parameters": {"weight": 1}}]}
    assert recipe_models(recipe) == ["a"]
    assert recipe["base_model"] is path
    out = merge(write(tmp_path / "r.yml", recipe), tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert "0/config.json" in json.loads((out / MANIFEST).read_text())["inputs"]["a"]
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), (5e5, None, None)),
        (
            LlamaConfig(rope_parameters=YARN),
            (5e5, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, None),
        ),
        (Gemma3TextConfig(num_hidden_layers=3), (1e6, None, 1e4)),
        (GPTNeoXConfig(rotary_pct=1.0, rotary_emb_base=5e5), (5e5, None, None)),
        (Phi3Config(**PHI), (1e4, {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}, None)),
    ],
    ids=["default", "yarn", "a set for each kind of layer", "a share rotates, by other names", "a share rotates"],
)
def test_readers_on_transformers_4_find_rope_at_the_top_and_5_reads_the_same(
    tmp_path: Path, config: Any, expected: tuple[Any, Any, Any]
) -> None:
    config.save_pretrained(tmp_path)

    def read() -> dict[str, Any]:
        rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
        return {k: v for k, v in rope.items() if k != "type"}  # another name of "rope_type"

    before = read()
    add_older_rope_keys(tmp_path / "config.json")
    found = json.loads((tmp_path / "config.json").read_text())
    theta, scaling, local = expected
    assert found["rope_theta"] == theta
    assert {k: v for k, v in (found["rope_scaling"] or {}).items() if v is not None} == (scaling or {})
    assert found.get("rope_local_base_freq") == local
    assert read() == before
    if (share := before.get("partial_rotary_factor")) is not None:
        assert found["rotary_pct" if config.model_type == "gpt_neox" else "partial_rotary_factor"] == share
    assert found.get("rotary_emb_base", theta) == theta


def test_a_merge_that_overflows_float16_is_one_line_that_names_the_dtype(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    file = tiny_llama(tmp_path / "a") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e5)
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = write(tmp_path / "r.yml", LINEAR | {"dtype": "float32", "out_dtype": "float16"})
    with pytest.raises(SteerError, match=r"r\.yml: .*model\.norm\.weight.*float16.*set out_dtype to bfloat16"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()

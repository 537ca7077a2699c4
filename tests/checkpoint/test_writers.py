"""Writers are found on disk, all of them, or the checkpoint is refused by name; the plan lists what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_anatomies import EXPERTS, FILE, TINY, WIDTH, config_of, load, logits
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.verify import verify
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import CheckpointError, SteerError, UnsupportedError

MakeDirection = Callable[..., Direction]

DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], type[SteerError], str]] = {
    "an expert is missing": (
        "qwen3-moe",
        lambda t: t.pop("model.layers.2.mlp.experts.3.down_proj.weight"),
        CheckpointError,
        "expected tensor model.layers.2.mlp.experts.3.down_proj.weight, found none",
    ),
    "an expert too many": (
        "mixtral",
        lambda t: t.update({"model.layers.0.block_sparse_moe.experts.4.w2.weight": torch.zeros(WIDTH, 48)}),
        UnsupportedError,
        "tensor model.layers.0.block_sparse_moe.experts.4.w2.weight [32, 48] is unknown",
    ),
    "an expert too many, stacked": (
        "gpt-oss",
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(5, WIDTH, WIDTH)}),
        CheckpointError,
        "expected 4 experts, found shape [5, 32, 32]",
    ),
    "experts along the other axis": (
        "mixtral stacked",
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(EXPERTS, 48, WIDTH)}),
        CheckpointError,
        "expected axis 1 to be the residual width 32, found shape [4, 48, 32]",
    ),
    "an mlp that is there twice": (
        "qwen3-moe",
        lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(WIDTH, 48)}),
        UnsupportedError,
        "holds the MLP of block 0 twice",
    ),
    "a shared expert that the architecture lacks": (
        "qwen3-moe",
        lambda t: t.update({"model.layers.0.mlp.shared_expert.down_proj.weight": torch.zeros(WIDTH, 48)}),
        UnsupportedError,
        "shared_expert.down_proj.weight [32, 48] is unknown in Qwen3MoeForCausalLM",
    ),
    "a norm that no one declared": (
        "llama",
        lambda t: t.update({"model.layers.0.post_feedforward_layernorm.weight": torch.ones(WIDTH)}),
        UnsupportedError,
        "post_feedforward_layernorm.weight [32] is unknown",
    ),
    "a norm that is missing": (
        "gemma3",
        lambda t: t.pop("model.layers.1.post_feedforward_layernorm.weight"),
        CheckpointError,
        "expected tensor model.layers.1.post_feedforward_layernorm.weight, found none",
    ),
    "no positions": (
        "gpt2 bare names",
        lambda t: t.pop("wpe.weight"),
        CheckpointError,
        "expected tensor wpe.weight, found none",
    ),
    "another embedding": (
        "gpt2 bare names",
        lambda t: t.update({"wtt.weight": torch.zeros(9, WIDTH)}),
        UnsupportedError,
        "tensor wtt.weight [9, 32] is unknown",
    ),
    "MXFP4 experts": (
        "gpt-oss",
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(4, 32, 1, 16).byte()}),
        UnsupportedError,
        "found quantised ones (it has a tensor model.layers.0.mlp.experts.down_proj_blocks)",
    ),
}


@pytest.mark.parametrize(("name", "damage", "error", "sentence"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_writer_that_is_not_the_declared_one_is_refused_by_name(
    tmp_path: Path,
    make_direction: MakeDirection,
    name: str,
    damage: Callable[[dict[str, Tensor]], object],
    error: type[SteerError],
    sentence: str,
) -> None:
    source = TINY[name].save(tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / FILE)
    damage(tensors)
    save_file(tensors, source / FILE, metadata={"format": "pt"})
    with pytest.raises(error) as caught:
        bake(source, tmp_path / "out", Edit(ablate=(make_direction(),)))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mxfp4_is_refused_by_its_config(
    tmp_path: Path, make_direction: MakeDirection, change_config: Callable[..., None]
) -> None:
    source = TINY["gpt-oss"].save(tmp_path / "source", torch.bfloat16)
    change_config(source, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedError, match="bake the original weights"):
        bake(source, tmp_path / "out", Edit(ablate=(make_direction(),)))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_tie_that_the_config_leaves_to_its_default_is_undone(
    tmp_path: Path, make_direction: MakeDirection, name: str
) -> None:
    source = TINY[name].save(tmp_path / "source", torch.float64)
    config = config_of(source)
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    cert = bake(source, tmp_path / "out", Edit(ablate=(make_direction(),)))
    assert cert.config == {"tie_word_embeddings": False}
    before, after = load_file(source / FILE), load_file(tmp_path / "out" / FILE)
    (token,) = {"transformer.wte.weight", "model.embed_tokens.weight"} & set(before)
    assert torch.equal(after["lm_head.weight"], before[token])
    assert not torch.equal(after[token], before[token])


def test_a_tied_checkpoint_writes_its_head_under_the_name_that_transformers_looks_for(
    tmp_path: Path, make_direction: MakeDirection
) -> None:
    source = TINY["gpt-neox tied"].save(tmp_path / "source", torch.float64)
    bake(source, tmp_path / "out", Edit(ablate=(make_direction(),)))
    assert "embed_out.weight" in load_file(tmp_path / "out" / FILE)


COVERAGE = {
    "llama": "coverage: 7 of 7 writers edited",
    "gpt2": "coverage: 8 of 8 writers edited",
    "qwen3-moe": "coverage: 13 of 13 writers edited",  # the embedding, three attentions, 4 + 1 + 4 MLPs
    "qwen2-moe": "coverage: 19 of 19 writers edited",
    "qwen3-moe stacked": "coverage: 7 of 7 writers edited",
}


@pytest.mark.parametrize(("name", "coverage"), COVERAGE.items())
def test_the_plan_lists_the_writers_found_and_their_coverage(
    tmp_path: Path, make_direction: MakeDirection, name: str, coverage: str
) -> None:
    source = TINY[name].save(tmp_path / "source", torch.bfloat16)
    plan = CheckpointPlan(source, Edit(ablate=(make_direction(),)))
    assert coverage in plan.summary()
    cert = bake(source, tmp_path / "out", plan.edit)
    assert cert.writers_edited == cert.writers_found == len(plan.found.writers)


def test_the_plan_names_writers_norms_strengths_and_what_else_changes(
    tmp_path: Path, make_direction: MakeDirection
) -> None:
    source = TINY["gemma2"].save(tmp_path / "source", torch.bfloat16)
    edit = Edit(ablate=(make_direction(),), strength=0.75)
    lines = CheckpointPlan(source, edit).summary().splitlines()
    assert lines[0].endswith("source: Gemma2ForCausalLM, 3 blocks, residual width 32")
    assert lines[2] == (
        "  attention: 3 of 3 edited: model.layers.*.self_attn.o_proj.weight; with biases; through the gain of "
        "model.layers.*.post_attention_layernorm.weight; strength 0.75"
    )
    assert lines[-1] == "  config.json: tie_word_embeddings becomes False"


def test_tensors_of_another_model_in_the_files_pass_through_and_are_named(
    tmp_path: Path, make_direction: MakeDirection
) -> None:
    source = TINY["llama"].save(tmp_path / "source", torch.bfloat16)
    names = ("model.mtp.layers.0.mlp.down_proj.weight", "model.layers.3.eh_proj.weight", "mtp.fc.weight")
    extra = {name: torch.randn(32, 32) for name in names}
    save_file(load_file(source / FILE) | extra, source / FILE, metadata={"format": "pt"})
    plan = CheckpointPlan(source, Edit(ablate=(make_direction(),)))
    assert set(plan.found.unloaded) == set(names)
    assert "not loaded by transformers, not edited: 3 tensors" in plan.summary()
    cert = bake(source, tmp_path / "out", plan.edit)
    adapter = bake(source, tmp_path / "adapter", plan.edit, "adapter")
    assert set(cert.unloaded) == set(adapter.unloaded) == set(names)
    for out in ("out", "adapter"):
        assert "transformers does not load them: 3 tensors" in (tmp_path / out / "README.md").read_text()
    after = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    verify(tmp_path / "out")
    verify(tmp_path / "adapter")
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()  # without a missing weight

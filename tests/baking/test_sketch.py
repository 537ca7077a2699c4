"""A direction knows its checkpoint: rounding does not part what belongs together, another tune is recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat
from torch import Tensor

from steer.baking.bake import bake
from steer.checkpoint.sketch import Sketch, sketch_files
from steer.core.edit import Edit
from steer.errors import CheckpointError, MismatchError
from steer.model.steered import load

TinyLlama = Callable[..., Path]


@pytest.fixture(scope="module")
def exact(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp32. Not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("exact"))


@pytest.fixture
def changed(exact: Path, tmp_path: Path) -> Callable[[Callable[[Tensor], Tensor]], Sketch]:
    """The sketch of `exact` after a change of every weight."""

    def make(change: Callable[[Tensor], Tensor]) -> Sketch:
        torch.manual_seed(1)
        (tmp_path / "config.json").write_bytes((exact / "config.json").read_bytes())
        tensors = load_file(exact / "model.safetensors")
        save_file({n: change(t) for n, t in tensors.items()}, tmp_path / "model.safetensors")
        return sketch_files(tmp_path)

    return make


def rounded_either_way(weight: Tensor) -> Tensor:
    """To bf16, up or down by a coin."""
    nearest = weight.bfloat16()
    other = torch.nextafter(nearest, (weight.sign() * torch.inf).bfloat16())
    return torch.where(torch.rand(weight.shape) < 0.5, nearest, other)


def test_a_checkpoint_is_itself_whatever_its_dtype_shards_and_head(
    exact: Path, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    sketch = sketch_files(exact)
    assert sketch.distance(sketch) == 0
    for name, form in {
        "bf16": {"dtype": torch.bfloat16},
        "fp16": {"dtype": torch.float16},
        "shards": {"shards": True},
    }.items():
        other = sketch_files(tiny_llama(tmp_path / name, **form))
        assert sketch.same_as(other), name
        assert other.same_as(sketch), name


def test_rounding_the_other_way_does_not_part_two_runs_of_one_merge(
    exact: Path, changed: Callable[..., Sketch]
) -> None:
    nearest = changed(lambda w: w.bfloat16())
    assert nearest.distance(sketch_files(exact)) == 0
    some = changed(lambda w: torch.where(torch.rand(w.shape) < 0.02, rounded_either_way(w), w.bfloat16()))
    assert nearest.distance(some) > 0
    assert nearest.same_as(some)


def test_a_tune_that_differs_by_a_percent_is_another_checkpoint(exact: Path, changed: Callable[..., Sketch]) -> None:
    tune = changed(lambda w: w + 0.01 * w.norm() / w.numel() ** 0.5 * torch.randn_like(w))
    assert not tune.same_as(sketch_files(exact))
    assert 0.005 < tune.distance(sketch_files(exact)) < 0.02


def test_another_shape_is_infinitely_far(exact: Path, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    shallow = sketch_files(tiny_llama(tmp_path / "shallow", num_hidden_layers=2))
    assert shallow.distance(sketch_files(exact)) == float("inf")
    empty = Sketch.from_header({})
    assert not empty.same_as(empty)


def test_a_bake_s_head_and_biases_are_not_sampled(source: Path, ablation: Edit, tmp_path: Path) -> None:
    bake(source, tmp_path / "out", Edit(add=((ablation.ablate[0], 1e-3),)))
    assert sketch_files(tmp_path / "out").same_as(sketch_files(source))


@pytest.mark.parametrize("form", [{}, {"dtype": torch.bfloat16}, {"tie": False}, {"shards": True}])
def test_the_sketch_of_the_files_is_that_of_the_running_model(
    tiny_llama: TinyLlama, tmp_path: Path, form: dict[str, Any]
) -> None:
    place = save_tiny_chat(tiny_llama, tmp_path / "model", **form)
    np.testing.assert_array_equal(sketch_files(place).values, load(place).sketch().values)


def test_a_header_brings_it_back(exact: Path) -> None:
    sketch = sketch_files(exact)
    again = Sketch.from_header({"sketch": sketch.to_header()})
    assert again.same_as(sketch)
    assert again.id == sketch.id
    assert len(sketch.to_header()) < 5000


def test_a_direction_of_another_checkpoint_is_refused_with_both_names(
    exact: Path, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    sketch, other = sketch_files(exact), sketch_files(tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(MismatchError, match=r"found on theirs, whose weights differ from ours by \d+") as caught:
        sketch.check("moral", {"sketch": other.to_header(), "checkpoint": "theirs"}, "ours")
    assert "\n" not in str(caught.value)
    sketch.check("moral", {"sketch": sketch.to_header()}, "ours")
    sketch.check("moral", {}, "ours")  # one that says nothing of its checkpoint


@pytest.mark.parametrize("tensor", [torch.zeros(32, 0), torch.zeros(0, 48), torch.tensor(1.0)], ids=str)
def test_a_tensor_without_rows_or_numbers_is_one_line(tiny_llama: TinyLlama, tmp_path: Path, tensor: Tensor) -> None:
    file = tiny_llama(tmp_path / "m") / "model.safetensors"
    save_file(load_file(file) | {"model.layers.1.mlp.down_proj.weight": tensor}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expected rows of numbers, found a tensor of shape") as e:
        sketch_files(tmp_path / "m")
    assert "\n" not in str(e.value)

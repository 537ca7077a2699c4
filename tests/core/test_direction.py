"""A direction: a unit vector with the statistics that give its amounts a unit, in a file that is whole."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer.core.direction import Direction
from steer.errors import MismatchError, SteerError, UsageError

STATISTICS: dict[str, Any] = {"mean": 0.5, "std": 2.0, "with_mean": 3.0, "without_mean": 1.0, "residual_norm": 8.0}


def test_it_is_a_unit_vector_in_fp32_whatever_it_was_made_of() -> None:
    for vector in (
        torch.tensor([3.0, 4.0]),
        torch.tensor([3, 4], dtype=torch.float64),
        torch.tensor([6.0, 8.0]).half(),
    ):
        direction = Direction("d", 0, vector)
        assert direction.vector.dtype == torch.float32
        torch.testing.assert_close(direction.vector, torch.tensor([0.6, 0.8]))
    assert Direction("d", 0, torch.ones(2, requires_grad=True)).vector.requires_grad is False


def test_amount_1_is_the_gap_and_a_share_of_the_residual_norm() -> None:
    direction = Direction("d", 0, torch.ones(4), **STATISTICS)
    assert direction.gap == 2.0
    assert direction.share(-2) == 0.5
    assert direction.width == 4


def test_every_field_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    provenance = {"checkpoint": "m", "auroc": [0.5, 0.9], "nested": {"ü": None}}
    direction = Direction("yes man", 7, torch.randn(16), **STATISTICS, provenance=provenance)
    again = Direction.load(direction.save(tmp_path / "deep" / "d.safetensors"))
    assert torch.equal(again.vector, direction.vector)
    for field in fields(Direction):
        if field.name != "vector":
            assert getattr(again, field.name) == getattr(direction, field.name), field.name


def test_saving_again_replaces_and_leaves_one_file(tmp_path: Path) -> None:
    Direction("d", 0, torch.ones(2)).save(tmp_path / "d.safetensors")
    Direction("d", 1, torch.ones(3)).save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").width == 3
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize(
    "vector",
    [torch.zeros(4), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.ones(2, 2), torch.ones(0)],
)
def test_a_vector_without_a_direction_is_refused(vector: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="'d': expected a finite non-zero vector"):
        Direction("d", 0, vector)


@pytest.mark.parametrize("content", [b"", b"not safetensors", bytes(range(256)) * 10])
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "d.safetensors"
    file.write_bytes(content)
    with pytest.raises(SteerError, match=r"d\.safetensors: .*steer find") as caught:
        Direction.load(file)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_one_line(tmp_path: Path) -> None:
    file = Direction("d", 0, torch.ones(64)).save(tmp_path / "d.safetensors")
    whole = file.read_bytes()
    for length in (4, 50, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(SteerError, match=r"d\.safetensors"):
            Direction.load(file)


def test_a_safetensors_file_of_something_else_is_recognised(tmp_path: Path) -> None:
    save_file({"vector": torch.ones(4)}, tmp_path / "other.safetensors")
    with pytest.raises(SteerError, match="without one"):
        Direction.load(tmp_path / "other.safetensors")
    with pytest.raises(SteerError, match="found none"):
        Direction.load(tmp_path / "gone.safetensors")


def test_statistics_that_a_file_lacks_are_not_made_up(tmp_path: Path) -> None:
    for header in ('{"name": "d", "site": 3}', '{"self": 1}', "[]"):
        save_file({"vector": torch.ones(4)}, tmp_path / "d.safetensors", metadata={"steer_direction": header})
        with pytest.raises(SteerError, match="without one"):
            Direction.load(tmp_path / "d.safetensors")


def test_a_width_that_does_not_fit_names_both() -> None:
    Direction("d", 0, torch.ones(4)).check_width(4, "model")
    with pytest.raises(MismatchError, match=r"width 4, model has residual width 8"):
        Direction("d", 0, torch.ones(4)).check_width(8, "model")

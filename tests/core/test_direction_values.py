"""What a direction's header may say: values of the right kind, or one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer.checkpoint.sketch import Sketch
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import SteerError, UsageError

HEADER = {"name": "moral", "site": 1, "mean": 0.0, "std": 1.0, "with_mean": 1.0, "without_mean": 0.0}
GOOD: dict[str, Any] = HEADER | {"residual_norm": 2.0, "provenance": {}}


def written(path: Path, vector: torch.Tensor | None = None, **changed: Any) -> Path:
    vector = torch.eye(8)[0] if vector is None else vector
    save_file({"vector": vector}, path, metadata={"steer_direction": json.dumps(GOOD | changed)})
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("site", v) for v in ("1", 1.5, math.nan, 1e30, True, -1, None, [1])),
        *((k, v) for k in ("mean", "std", "with_mean", "without_mean") for v in (math.nan, math.inf, 1e300, "x", [1])),
        *(("residual_norm", v) for v in (0, -1, "x", math.inf, None, True)),
        *(("name", v) for v in (["x"], 3, "", None, "a\x1b[2J", "n" * 100_000)),
        *(("provenance", v) for v in ([], "x", None, 3)),
    ],
)
def test_a_header_value_of_the_wrong_kind_is_one_line_that_names_the_file(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(SteerError, match=rf"d\.safetensors: {key}: expected") as e:
        Direction.load(written(tmp_path / "d.safetensors", **{key: value}))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38])
def test_a_vector_of_any_size_keeps_its_direction(tmp_path: Path, size: float) -> None:
    vector = torch.tensor([3.0, 0.0, -4.0]) / 4 * size
    found = Direction.load(written(tmp_path / "d.safetensors", vector)).vector
    assert torch.allclose(found, torch.tensor([0.6, 0.0, -0.8]), atol=1e-6)


def test_what_adds_more_than_fp32_holds_is_refused() -> None:
    d = Direction("moral", 1, torch.eye(8)[0])
    with pytest.raises(UsageError, match="add at site 1: expected a finite vector"):
        Edit(add=((d, 1e300),)).biases()


@pytest.mark.parametrize("sketch", ["?", "AAA", "AAAA", 3, None, "=" * 9])
def test_a_sketch_that_is_none_belongs_to_no_checkpoint(sketch: Any) -> None:
    assert Sketch.from_header({"sketch": sketch}).distance(Sketch.from_header({})) == math.inf

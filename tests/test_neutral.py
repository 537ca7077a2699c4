"""Neutral means are kept with the checkpoint and the dtype that they were measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steer.checkpoint.sketch import sketch_files
from steer.measure import neutral_means as neutral
from steer.model import steered as model


def test_means_of_another_dtype_are_measured_again_and_those_of_others_are_left_as_they_are(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = tiny_llama(tmp_path / "m", dtype=torch.bfloat16), tmp_path / "means.safetensors"
    sketch, measured = sketch_files(source), list[torch.Tensor]()

    def measure(*args: object, **kwargs: object) -> torch.Tensor:
        measured.append(torch.full((3, 32), float(len(measured))))
        return measured[-1]

    monkeypatch.setattr(neutral, "neutral_means", measure)
    monkeypatch.setattr(model, "load", lambda place: None)
    for dtype, count in (("bfloat16", 1), ("bfloat16", 1), ("float32", 2), ("float32", 2), ("bfloat16", 3)):
        monkeypatch.setenv("STEER_DTYPE", dtype)
        assert torch.equal(neutral.neutral_for(source, sketch, file), torch.full((3, 32), count - 1.0))
        assert len(measured) == count
        with safe_open(str(file), framework="pt") as f:
            assert f.metadata()["dtype"] == dtype

    save_file({"neutral": torch.ones(3, 32)}, file)  # made by somebody else
    assert torch.equal(neutral.neutral_for(source, sketch, file), torch.ones(3, 32))
    save_file({"neutral": torch.ones(3, 32)}, file, metadata={"sketch": sketch.to_header()})  # by an older version
    assert torch.equal(neutral.neutral_for(source, sketch, file), torch.full((3, 32), 3.0))

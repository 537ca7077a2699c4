"""Tiny checkpoints for lineages: tunes of a base, and linear merges of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file


def tune(base: Path, place: Path, seed: int, share: float) -> Path:
    """Write a copy of a checkpoint with noise on each matrix, `share` times its root mean square."""
    place.mkdir()
    for file in base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    moved = {
        n: w + share * w.square().mean().sqrt() * torch.randn(w.shape) if w.ndim > 1 else w for n, w in weights.items()
    }
    save_file(moved, place / "model.safetensors", metadata={"format": "pt"})
    return place


def recipe(family: Path, *models: str, **keys: Any) -> dict[str, Any]:
    """A linear merge of models in a folder, with absolute paths."""
    entries = [{"model": str(family / name), "parameters": {"weight": 1.0}} for name in models]
    return {"merge_method": "linear", "models": entries, "dtype": "float32", **keys}


def written(place: Path, raw: dict[str, Any]) -> Path:
    """Write a recipe."""
    place.write_text(yaml.safe_dump(raw))
    return place

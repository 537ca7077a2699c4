"""Tiny models that run, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from slow_steering import exact
from tiny_chat import keep_direction, save_tiny_chat

from steer.core.direction import Direction
from steer.model.steered import SteeredModel, load


@pytest.fixture(scope="session")
def chat_checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in fp32 with a tokenizer and a chat template."""
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("checkpoints") / "chat")


@pytest.fixture
def model(chat_checkpoint: Path) -> SteeredModel:
    """It, loaded."""
    return load(chat_checkpoint)


@pytest.fixture
def model64(chat_checkpoint: Path) -> SteeredModel:
    """It in fp64, where effects are exact."""
    return load(chat_checkpoint, dtype=torch.float64)


@pytest.fixture
def endless(model64: SteeredModel) -> SteeredModel:
    """It in fp64 and without an end token: every reply has its full length."""
    model64.end_token_ids = frozenset()
    return model64


@pytest.fixture(scope="module")
def exact_endless(chat_checkpoint: Path) -> SteeredModel:
    """It, all of it in fp64, norms and softmax too; its replies never end."""
    model = exact(load(chat_checkpoint, dtype=torch.float64))
    model.end_token_ids = frozenset()
    model.hf.generation_config.eos_token_id = []  # for what transformers itself generates
    return model


@pytest.fixture
def moral(make_direction: Callable[..., Direction]) -> Direction:
    """A direction at site 1 of 3, with a gap of 2."""
    return make_direction("moral")


@pytest.fixture
def known_moral(
    chat_checkpoint: Path,
    make_direction: Callable[..., Direction],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Direction:
    """A direction that the library knows for the checkpoint, under a separate STEER_HOME."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    direction = make_direction("moral")
    keep_direction(chat_checkpoint, direction)
    return direction


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 7], no special ones among them."""
    return torch.randint(6, 70, (2, 7), generator=torch.Generator().manual_seed(1))

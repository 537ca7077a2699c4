"""A tiny model that chats, two traits, and a bench that edits are tried on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_chat import keep_direction, save_tiny_chat
from tiny_search import SMALL, MakeDirection, save_trait

from steer.core.direction import Direction
from steer.core.trait import Trait
from steer.finding.traits import contrast_for
from steer.measure.scorer import Scorer
from steer.measure.search.space import Space
from steer.measure.search.trials import Bench
from steer.model.steered import SteeredModel, load


@pytest.fixture(scope="module")
def made(
    tiny_llama: Callable[..., Path], make_direction: MakeDirection, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with `model`, whose library knows the direction of the trait `moral`, and `moral.yaml`, `calm.yaml`."""
    folder = tmp_path_factory.mktemp("search")
    before = os.environ.get("STEER_HOME")
    os.environ["STEER_HOME"] = str(folder / "home")
    save_tiny_chat(tiny_llama, folder / "model", max_position_embeddings=512)
    keep_direction(folder / "model", make_direction("moral"))
    save_trait(folder / "moral.yaml", "moral", 0)
    save_trait(folder / "calm.yaml", "calm", 9)
    yield folder
    os.environ.pop("STEER_HOME") if before is None else os.environ.update(STEER_HOME=before)


@pytest.fixture(scope="module")
def model(made: Path) -> SteeredModel:
    return load(made / "model", dtype=torch.float64)


@pytest.fixture(scope="module")
def bench(made: Path, model: SteeredModel) -> Bench:
    traits = [Trait.load(made / f"{name}.yaml") for name in ("moral", "calm")]
    contrasts = [contrast_for(model, t) for t in traits]
    return Bench(model, Scorer.train(contrasts[0]), {"calm": Scorer.train(contrasts[1])}, contrasts[0].neutral, SMALL)


@pytest.fixture
def direction(make_direction: MakeDirection) -> Direction:
    return make_direction("moral")


@pytest.fixture
def space(direction: Direction) -> Space:
    neutral = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return Space(direction, 3, ("plain", "projected", "biprojected"), neutral)

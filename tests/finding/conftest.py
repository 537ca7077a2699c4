"""A tiny model that repeats its prompt's words, for the tests of slider searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_parrot import save_parrot

from steer.model.steered import SteeredModel, load


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parrot(tmp_path_factory.mktemp("parrot") / "model")


@pytest.fixture(scope="module")
def model(parrot: Path) -> SteeredModel:
    return load(parrot)

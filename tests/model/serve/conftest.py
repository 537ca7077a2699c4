"""Servers of tiny models that all tests of a file share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Served, served
from tiny_chat import keep_direction, save_tiny_chat

from steer.core.direction import Direction
from steer.core.profile import Profile
from steer.model.steered import SteeredModel, load
from steer.serve.limits import Limits
from steer.serve.server import Options

NOIR = {
    "name": "noir",
    "sampler": {"preset": "greedy", "max_new_tokens": 7},
    "sliders": [
        {"slider": "moral", "amount": -0.5, "range": [-1, 1]},
        {"slider": "other", "amount": 1.0, "operation": "clamp", "enabled": False},
    ],
}


@pytest.fixture(scope="module")
def served_model(
    tiny_llama: Callable[..., Path],
    make_direction: Callable[..., Direction],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SteeredModel]:
    """A tiny model, for which the library knows two directions."""
    root = tmp_path_factory.mktemp("served")
    checkpoint = save_tiny_chat(tiny_llama, root / "chat", max_position_embeddings=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_HOME", str(root / "home"))
        keep_direction(checkpoint, make_direction("moral"))
        keep_direction(checkpoint, make_direction("other", seed=8))
        yield load(checkpoint)


@pytest.fixture(scope="module")
def server(served_model: SteeredModel) -> Iterator[Served]:
    """It, served, with a profile."""
    options = Options(profiles=[Profile.parse(NOIR, "noir")], limits=Limits(messages=20, tokens=400, body=100_000))
    with served(served_model, options) as running:
        yield running


@pytest.fixture
def fresh(server: Served) -> Served:
    """The same, its live sliders at rest before and after."""
    server.put({"profile": None})
    yield server
    server.put({"profile": None})

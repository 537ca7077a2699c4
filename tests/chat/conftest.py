"""Chats with tiny models, under a separate STEER_HOME."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_chat import keep_direction, save_tiny_chat

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.core.direction import Direction
from steer.core.sampler import Sampler
from steer.model.steered import SteeredModel, load

LENGTH = 12


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where chats, votes, profiles and directions of this test are kept."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that can chat."""
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("chats") / "chat", max_position_embeddings=512)


@pytest.fixture(scope="session")
def byte_checkpoint(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tokens are bytes."""
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("chats") / "bytes", by_bytes=True)


@pytest.fixture
def model(checkpoint: Path) -> SteeredModel:
    """It, loaded; its replies are as long as they may be."""
    model = load(checkpoint)
    model.end_token_ids = frozenset()
    model.tokenizer.eos_token = None
    return model


@pytest.fixture
def moral(checkpoint: Path, make_direction: Callable[..., Direction], home: Path) -> Direction:
    """A direction that the library knows, at site 1 of 3, with a gap of 2."""
    direction = make_direction("moral")
    keep_direction(checkpoint, direction)
    return direction


@pytest.fixture
def new_chat(model: SteeredModel, moral: Direction) -> Iterator[Callable[..., Chat]]:
    """Opens chats on the model; they are closed in the end, their threads joined."""
    chats: list[Chat] = []

    def make(length: int = LENGTH, **options: object) -> Chat:
        chat = Chat(LocalBackend(model), **options)  # pyright: ignore[reportArgumentType]
        chat.sampler = Sampler(max_new_tokens=length, temperature=1.0, repetition_penalty=1.0, seed=3)
        chats.append(chat)
        return chat

    yield make
    for chat in chats:
        chat.close()
        assert not chat.writer.running


@pytest.fixture
def chat(new_chat: Callable[..., Chat]) -> Chat:
    """One of them."""
    return new_chat()

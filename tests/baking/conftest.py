"""One tiny checkpoint, and the bake that most tests here look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steer.baking.bake import bake
from steer.core.direction import Direction
from steer.core.edit import Edit

TinyLlama = Callable[..., Path]
MakeDirection = Callable[..., Direction]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyLlama) -> Path:
    """A tied bf16 checkpoint in one file, with side files. Not to be changed."""
    root = tiny_llama(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16)
    (root / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n')
    (root / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (root / "extra").mkdir()
    (root / "extra" / "unknown.dat").write_bytes(bytes(range(256)))
    (root / "pytorch_model.bin").write_bytes(b"not loaded")
    (root / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nThe source.\n")
    return root


@pytest.fixture(scope="session")
def ablation(make_direction: MakeDirection) -> Edit:
    return Edit(ablate=(make_direction(),))


@pytest.fixture(scope="session")
def baked(source: Path, ablation: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` with `ablation` in it. Not to be changed."""
    out = tmp_path_factory.mktemp("baked") / "out"
    bake(source, out, ablation, command="steer bake source out --ablate moral")
    return out


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A copy of `source` to break."""
    return Path(shutil.copytree(source, tmp_path / "mine"))

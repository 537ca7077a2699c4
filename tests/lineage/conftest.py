"""A family of tiny checkpoints that have learnt some English, for lineages of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_chat import save_tiny_chat
from tiny_family import tune
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.measure.harness import plain_paragraphs

TUNES = ("calm", "dry", "loud", "warm", "wry")
"""Names of the tunes, each the base with different noise."""
BROKEN = "broken"
"""The base with noise of the size of its weights."""


@pytest.fixture(scope="session")
def family(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `base`, tunes of it, and one that lost its mind. Not to be changed."""
    folder = tmp_path_factory.mktemp("family")
    base = save_tiny_chat(tiny_llama, folder / "base", by_bytes=True, max_position_embeddings=1024)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(tokenizer(" ".join(plain_paragraphs()[0]))["input_ids"])
    optimizer, generator = torch.optim.AdamW(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = torch.stack([ids[i : i + 64] for i in torch.randint(len(ids) - 64, (16,), generator=generator)])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
    for seed, name in enumerate((*TUNES, BROKEN)):
        tune(base, folder / name, seed, 8.0 if name == BROKEN else 0.05)
    return folder

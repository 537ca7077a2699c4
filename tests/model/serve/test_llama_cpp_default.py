"""The default model in llama-server, quantised to 4 bits: its LoRA is still a dose."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_server import llama_server

from steer.baking.bake import bake
from steer.baking.certificate import server_command
from steer.checkpoint.fetch import DEFAULT_MODEL, resolve
from steer.checkpoint.gguf_file import write_gguf
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.model.steered import SteeredModel, describe, load
from steer.serve.llama_cpp.engine import LlamaCppEngine

SITE = 15


def pirate(model: SteeredModel) -> tuple[Direction, list[int], int]:
    """The direction from a plain reply to one like a pirate's; the latter with its prompt, and where it starts."""
    means, systems = [], ([{"role": "system", "content": "You are a pirate at sea. Talk like a pirate."}], [])
    texts = []
    for system in systems:
        ids = model.prompt_ids([*system, {"role": "user", "content": "How was your day?"}])
        said = model.hf.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
        with model.record([SITE]) as recording, torch.inference_mode():
            model.hf(input_ids=torch.tensor([said]))
        means.append(recording[SITE][0, len(ids) :].mean(0))
        texts.append((said, len(ids)))
    return Direction("pirate", SITE, means[0] - means[1], residual_norm=1.0), *texts[0]


@pytest.mark.model
@pytest.mark.slow
def test_the_dose_response_of_a_slider_is_monotone_at_4_bits(tmp_path: Path) -> None:
    place = Path(resolve(DEFAULT_MODEL))
    direction, ids, start = pirate(load(DEFAULT_MODEL, dtype="float32"))
    write_gguf(place, tmp_path / "model.gguf", "Q4_0")
    command = server_command(bake(place, tmp_path / "out", Edit((direction,)), "gguf"), str(tmp_path / "out"))
    with llama_server(command.replace("MODEL.gguf", str(tmp_path / "model.gguf")), threads=2) as running:
        engine = LlamaCppEngine(describe(DEFAULT_MODEL), url=running.url, place=place)
        doses = [float(np.nanmean(engine.logprobs(ids, start, {0: dose}))) for dose in (0.0, 0.25, 0.5, 0.75, 1.0)]
        engine.close()
    assert all(more < less for less, more in pairwise(doses)), doses
    assert doses[-1] < doses[0] - 0.1

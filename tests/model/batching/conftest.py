"""A model without an end token, an engine on it, and jobs that differ in everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from batched import DRAWN, GREEDY, LONG, job

from steer.core.edit import Edit
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.model.steered import SteeredModel
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Job


@pytest.fixture
def engine(endless: SteeredModel) -> Iterator[BatchingEngine]:
    with closing(BatchingEngine(endless, max_running=8, max_waiting=8)) as made:
        yield made


@pytest.fixture
def jobs(moral, make_direction) -> list[Job]:
    """Different in everything: sliders, samplers, seeds, lengths of prompt and reply."""
    other, late = make_direction("other", site=2, seed=8), make_direction("late", site=2, seed=9)
    gate = Gate(moral, above=0.0)
    edits = [
        None,
        Edit(add=((moral, 1.5), (other, -1.0))),
        Edit(moves=(Slider(moral, "clamp", 1.0), Slider(late, "add", -1.0, Schedule(gate=gate)))),
        Edit((moral,)),
        Edit(moves=(Slider(moral, "add", 3.0, Schedule("reply", first=5, after=2)),)),
        Edit((moral, other), 0.6, (1, 2), ((other, 0.5),)),
        Edit(
            moves=(
                Slider(other, "scale", -1.0, Schedule(ramp=6)),
                Slider(moral, "cap", -1.0, Schedule("reply")),
            )
        ),
        None,
    ]
    samplers = [
        GREEDY,
        DRAWN,
        replace(DRAWN, seed=8, max_new_tokens=31),
        replace(GREEDY, max_new_tokens=3),
        replace(DRAWN, temperature=1.4, top_k=9),
        replace(DRAWN, frequency_penalty=0.7, max_new_tokens=22),
        replace(DRAWN, dry_multiplier=1.0, seed=5),
        LONG,
    ]
    numbers = torch.Generator().manual_seed(4)
    lengths = [5, 1, 23, 9, 14, 2, 40, 7]
    prompts = [torch.randint(6, 70, (n,), generator=numbers).tolist() for n in lengths]
    each = zip(prompts, samplers, edits, strict=True)
    return [job(p, s, e, key=i, begun=min(i % 3, len(p) - 1)) for i, (p, s, e) in enumerate(each)]

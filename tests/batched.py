"""Jobs for the batching engine, whoever listens to them, and what the decode loop makes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import pytest

from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.model.decode import decode
from steer.model.steered import SteeredModel
from steer.model.steering.receipts import Tally
from steer.serve import packed
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Event, Job, Token

GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
DRAWN = Sampler(max_new_tokens=14, temperature=1.0, min_p=0.02, repetition_penalty=1.3, seed=3)
LONG = replace(DRAWN, max_new_tokens=100)
PROMPT = (1, 4, 20, 33, 5)
PATIENCE = 60.0


class Listener:
    """Hears what becomes of a job."""

    cancel: Callable[[], None]

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.heard = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self.heard:
            self.events.append(event)
            self.heard.notify_all()

    @property
    def tokens(self) -> list[int]:
        return [e.id for e in self.events if isinstance(e, Token)]

    @property
    def last(self) -> Event:
        return self.events[-1]

    def wait_for(self, tokens: int) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.tokens) >= tokens or self.over, PATIENCE)

    @property
    def over(self) -> bool:
        return bool(self.events) and not isinstance(self.events[-1], Token)

    def wait(self) -> Listener:
        with self.heard:
            assert self.heard.wait_for(lambda: self.over, PATIENCE), "nothing more was heard of the job"
        return self


def leave_pages(patch: pytest.MonkeyPatch, model: SteeredModel, pages: int) -> None:
    """Make an engine on the CPU find memory for so many pages."""
    size = packed.PAGE * packed.cache_bytes(model.hf.config, model.hf.dtype)
    patch.setattr(packed, "SHARE", (pages + 0.5) * size / psutil.virtual_memory().available)


def ask(engine: BatchingEngine, job: Job) -> Listener:
    listener = Listener()
    listener.cancel = engine.submit(job, listener)
    return listener


def job(prompt: Sequence[int] = PROMPT, sampler: Sampler = GREEDY, edit: Edit | None = None, **more: int) -> Job:
    return Job(tuple(prompt), sampler, lambda: edit, **more)


def by_decoding(model: SteeredModel, one: Job, tally: Tally | None = None) -> list[int]:
    """What the decode loop writes for a job alone; its edit is asked once."""
    with model.steering.applied([one.edit()]):
        steps = decode(model, [list(one.prompt)], one.sampler, [one.key], tally=tally, begun=one.begun)
        return [step.tokens[0] for step in steps]

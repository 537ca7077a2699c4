"""One request among others: how many steps of the engine another's first token takes, counted, not timed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest
from batched import DRAWN, GREEDY, LONG, PROMPT, Listener, ask, by_decoding, job, leave_pages

from steer.model.steered import SteeredModel
from steer.serve import packed, turns
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Job
from steer.serve.turns import next_read, shares

READ, PLACES = 16, 8
FORTY = replace(LONG, max_new_tokens=40)
LONG_PROMPT = (*range(6, 70), *range(6, 22))


def one_request(jobs: Sequence[Job]) -> list[Job]:
    """Jobs of one client's request."""
    return [replace(one, request=jobs[0].request) for one in jobs]


def steps_to_first_token(
    model: SteeredModel, worst: list[Job], other: Job, monkeypatch: pytest.MonkeyPatch, pages: int | None = None
) -> tuple[int, list[Listener], Listener]:
    """`worst` is asked, then, as the engine makes its fifth step with it, `other`: how many steps later that has its
    first token. All replies are whole by then."""
    monkeypatch.setattr(packed, "READ", READ)
    monkeypatch.setattr(turns, "STEP", 1e9)  # steps have READ tokens however busy the machine is
    if pages is not None:
        leave_pages(monkeypatch, model, pages)
    steps: list[int] = []  # how many tokens `other` had at each step since it was asked
    asked: list[Listener] = []
    with closing(BatchingEngine(model, max_running=PLACES)) as engine:

        def step(*_: object) -> None:
            steps.append(len(asked[0].tokens) if asked else 0)
            if len(steps) == 5:
                asked.append(ask(engine, other))

        seen = model.hf.register_forward_pre_hook(step)
        listeners = [ask(engine, one) for one in worst]
        for listener in listeners:
            listener.wait()
        asked[0].wait()
        seen.remove()
    return next(i for i, tokens in enumerate(steps[5:], 1) if tokens) - 1, listeners, asked[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worst", "pages"),
    [
        ([job(sampler=FORTY, key=k) for k in range(8)], None),
        ([job(LONG_PROMPT, GREEDY, key=k) for k in range(8)], None),
        ([job(LONG_PROMPT, GREEDY)], None),
        ([job(sampler=FORTY, key=k) for k in range(8)], 8),
    ],
    ids=["long replies", "long prompts", "one long prompt", "few pages"],
)
def test_anothers_first_token_comes_in_the_step_after_it_asked(endless, worst, pages, monkeypatch):
    other = job(sampler=DRAWN)
    steps, listeners, heard = steps_to_first_token(endless, one_request(worst), other, monkeypatch, pages)
    assert steps == 1
    assert heard.tokens == by_decoding(endless, other)
    assert listeners[-1].tokens == by_decoding(endless, worst[-1])


def test_the_jobs_of_one_request_take_no_more_places_than_they_leave(endless):
    with closing(BatchingEngine(endless, max_running=PLACES, max_waiting=0)) as engine:
        first = [ask(engine, one) for one in one_request([job(sampler=LONG, key=k) for k in range(PLACES)])]
        assert (engine.running, engine.waiting) == (4, 4)
        for listener in first:
            listener.cancel()
            listener.wait()
        apart = [ask(engine, job(sampler=LONG, key=k)) for k in range(PLACES)]
        assert (engine.running, engine.waiting) == (PLACES, 0)
        for listener in apart:
            listener.cancel()


def test_what_a_step_reads_goes_to_the_oldest_request_and_then_to_the_shortest():
    # Requests by name; the texts' numbers say which came first.
    assert shares({"a 0": 1000}, 16) == {"a 0": 16}
    assert shares({"a 0": 1000, "b 1": 5}, 16) == {"a 0": 11, "b 1": 5}
    assert shares({"b 1": 50, "a 0": 1000}, 16) == {"b 1": 14, "a 0": 2}
    assert shares({"a 0": 30, "a 1": 30, "a 2": 30, "b 3": 50}, 16) == {"a 0": 2, "a 1": 0, "a 2": 0, "b 3": 14}
    assert shares({"a 9": 1000, "b 10": 40, "c 11": 3}, 16) == {"a 9": 2, "b 10": 11, "c 11": 3}
    assert shares({"a 0": 3, "b 1": 4}, 16) == {"a 0": 3, "b 1": 4}
    assert shares({"a 0": 3, "b 1": 4}, 0) == {"a 0": 0, "b 1": 0}
    assert shares({}, 16) == {}


def test_a_long_prompt_is_read_however_many_short_ones_come():
    left, number = 160, 0
    while left > 0 and number < 1000:
        number += 1
        left -= shares({"long 0": left, f"short {number}": 100}, 16)["long 0"]
    assert number <= 80


def test_steps_that_take_long_read_less_and_quick_ones_more_again():
    read = [256]
    for seconds in (2.0, 0.5, 0.25, 0.1, 9.0, 0.2):
        read.append(next_read(read[-1], 256, read[-1], seconds))
    assert read[1:] == [64, 64, 128, 256, 32, 80]
    assert next_read(80, 256, 5, 0.3) == 80  # a short prompt is no measure of a longer one
    assert next_read(80, 256, 0, 9.0) == 80


def test_a_prompt_beside_replies_is_read_while_they_are_written(endless, engine):
    writing = [ask(engine, job(sampler=LONG, key=k)) for k in range(3)]
    writing[0].wait_for(2)
    late = ask(engine, job(LONG_PROMPT, GREEDY))
    assert late.wait().tokens == by_decoding(endless, job(LONG_PROMPT, GREEDY))
    assert [w.wait().tokens for w in writing] == [by_decoding(endless, job(PROMPT, LONG, key=k)) for k in range(3)]

"""Several threads on one model: each looks at the model under what it asked for, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from tiny_chat import hooks_on
from torch import Tensor

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.measure.harness import row_costs
from steer.model.steered import SteeredModel

IDS = torch.tensor([[1, 9, 20, 33]])


@torch.inference_mode()
def logits(model: SteeredModel) -> Tensor:
    return model.hf(input_ids=IDS).logits


def steers(
    model: SteeredModel, moral: Direction, entered: threading.Event, leave: threading.Event
) -> Callable[[], None]:
    """Holds a separate block open, from `entered` until `leave`."""

    def run() -> None:
        with model.steered({moral: 3.0}):
            entered.set()
            assert leave.wait(60)

    return run


@pytest.fixture
def thread() -> Callable[[Callable[[], None]], threading.Thread]:
    def start(run: Callable[[], None]) -> threading.Thread:
        made = threading.Thread(target=run, daemon=True)
        made.start()
        return made

    return start


def test_while_one_thread_looks_at_the_untouched_model_another_waits_to_steer_it(model, moral, thread):
    plain, entered, leave = logits(model), threading.Event(), threading.Event()
    with model.untouched():
        other = thread(steers(model, moral, entered, leave))
        assert not entered.wait(0.5)
        assert torch.equal(logits(model), plain)
    assert entered.wait(60)
    assert not torch.equal(logits(model), plain)
    leave.set()
    other.join(60)
    assert torch.equal(logits(model), plain)
    assert hooks_on(model) == 0


def test_what_another_thread_has_standing_is_neither_seen_nor_lost_by_looking(model, moral, thread):
    plain, entered, leave = logits(model), threading.Event(), threading.Event()
    other = thread(steers(model, moral, entered, leave))
    assert entered.wait(60)
    steered = logits(model)
    with model.untouched():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), steered)
    leave.set()
    other.join(60)
    assert hooks_on(model) == 0


def test_blocks_of_two_threads_may_end_in_any_order(model, moral, make_direction):
    plain, late = logits(model), make_direction("late", site=2, seed=9)
    first, second = model.steered({moral: 3.0}), model.steered({late: 2.0})
    with model.steered({late: 2.0}):
        wanted = logits(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), wanted)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), plain)
    assert hooks_on(model) == 0


def test_two_threads_that_measure_and_steer_at_once_get_what_each_gets_alone(model, moral, thread):
    texts = [([1, 9], [20, 33, 40]), ([1], [9, 10])]
    edits = [Edit(add=((moral, 2.0),))]
    wanted, chat = row_costs(model, texts, edits), {"temperature": 0.0, "max_new_tokens": 3}
    with model.steered({moral: -3.0}):
        said = model.chat("hello", **chat)
    found: list[str] = []

    def talks() -> None:
        for _ in range(20):
            with model.steered({moral: -3.0}):
                found.append(model.chat("hello", **chat))

    other = thread(talks)
    measured = [row_costs(model, texts, edits) for _ in range(20)]
    other.join(60)
    assert found == [said] * 20
    assert measured == [wanted] * 20
    assert hooks_on(model) == 0

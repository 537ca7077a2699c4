"""Whatever fails while hooks go on or come off, the model is as it was: no hook is left, the sliders still act."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest
import torch
from tiny_chat import hooks_on, logits
from torch.utils.hooks import RemovableHandle

from steer.core.edit import Edit
from steer.core.method import Method
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.model.steering import norm_preserving as kept_norms
from steer.model.steering import steering


class Stop(BaseException):
    """As Ctrl-C comes: at any point, and past every `except Exception`."""


@contextmanager
def failing(n: int) -> Iterator[list[str]]:
    """The n-th step of putting hooks on and taking them off fails. What registers fails before it is done, the others
    before or after."""
    done: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrap(where: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(where, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == n and (n % 2 == 0 or name.startswith("register")):
                raise Stop
            result = real(*args, **kwargs)
            if len(done) == n:
                raise Stop
            return result

        patch.setattr(where, name, step)

    for name in ("register_forward_hook", "register_forward_pre_hook", "get_submodule"):
        wrap(torch.nn.Module, name)
    wrap(RemovableHandle, "remove")
    wrap(steering, "module_edits")
    wrap(kept_norms, "Ablation")
    try:
        yield done
    finally:
        patch.undo()


def edits(make_direction) -> dict[str, Any]:
    """Ways to edit a model, with directions that it has not met."""
    one, two = make_direction("one"), make_direction("two", site=0, seed=5)
    timed = Slider(make_direction("late", site=2, seed=6), "add", when=Schedule("reply", after=1))
    kept = Edit((two,), method=Method(norm_preserving=True))
    return {
        "add": lambda m: m.steered({one: -1.0}),
        "many": lambda m: m.steered({one: 1.0, Slider(two, "ablate"): 1.0, timed: 2.0}),
        "kept": lambda m: m.edited(Edit((two,), add=((one, 1.0),), method=Method(norm_preserving=True))),
        "none": lambda m: m.steered({}),
        "rows": lambda m: m.steering.applied([None, Edit(add=((one, 1.0),)), kept]),
        "record": lambda m: m.record(),
    }


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("way", ["add", "many", "kept", "none", "rows", "record", "set", "put"])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(model, make_direction, ids, way, base):
    standing, plain = make_direction("standing", seed=9), logits(model, ids)
    if base:
        model.sliders.put(standing, 1.5)
    amounts, before, hooks = dict(model.sliders), logits(model, ids), hooks_on(model)
    assert torch.equal(before, plain) is not base

    def work() -> None:
        if way == "put":
            model.sliders.put(make_direction("new", seed=11), 1.0)
        elif way == "set":
            model.steering.set([Edit(add=((make_direction("new", seed=11), 1.0),))])
        else:
            with edits(make_direction)[way](model):
                pass

    for n in count(1):
        with failing(n) as done, suppress(Stop):
            work()
            break
        assert len(done) >= n
        assert hooks_on(model) == hooks, (n, done)
        assert dict(model.sliders) == amounts
        assert torch.equal(logits(model, ids), before), (n, done)
        with model.steered({}):
            assert torch.equal(logits(model, ids), plain)
        assert torch.equal(logits(model, ids), before)
    assert n > 2 or (way == "none" and not base)  # which has nothing to put on
    model.steering.set([None])
    assert hooks_on(model) == 0
    assert torch.equal(logits(model, ids), plain)

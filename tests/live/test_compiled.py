"""torch.compile over a cache of fixed size: the tokens of the plain model, and no compilation when a slider moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from steer.errors import UsageError
from steer.live.decode import decode
from steer.live.model import SteeredModel
from steer.live.session import Session
from steer.values.sampler import Sampler
from steer.values.slider import Slider
from steer.values.when import Gate, When

PROMPT = [1, 9, 20, 31, 12, 40]
GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)


def written(model: SteeredModel, sampler: Sampler) -> list[int]:
    """The tokens of a single text, which is what a compiled model decodes."""
    return [step.tokens[0] for step in decode(model, [PROMPT], sampler)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def sliders(make_direction):
    one, two = make_direction("one"), make_direction("two", seed=5)
    timed = When("reply", after=2, ramp=3)
    return [
        Slider(one),
        Slider(two, "ablate"),
        Slider(one, "clamp", label="one:clamp"),
        Slider(two, "cap", label="two:cap"),
        Slider(make_direction("late", site=2, seed=6), "add", timed),
        Slider(make_direction("gated", site=2, seed=7), "scale", When(gate=Gate(two, above=0.0))),
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decoding_gives_the_plain_models_tokens_and_moving_sliders_compiles_nothing(model, sliders, backend):
    endless = replace(GREEDY, max_new_tokens=12)
    model.hf.generation_config.eos_token_id = 3
    settings = [
        {},
        {"one": 2.0},
        {"one": -3.0, "two": 0.5},
        {"one:clamp": 4.0},
        {"one:clamp": -2.0, "two:cap": -1.0},
        {"late": 5.0, "gated": -3.0, "one": 1.0},
        {},
    ]

    def texts() -> list[list[int]]:
        out = []
        for amounts in settings:
            model.sliders.replace(amounts, sliders)
            out.append(written(model, endless))
        return out

    plain = texts()
    assert len({tuple(t) for t in plain}) > 3  # the sliders do something
    model.compile(sliders, context=64, backend=backend)
    model.sliders.replace({})
    assert written(model, endless) == plain[0]
    made = compilations()
    assert made > 0
    assert texts() == plain
    assert compilations() == made
    model.uncompile()
    assert texts() == plain
    assert model.steering.hook_count == 0


def test_a_slider_that_moves_in_mid_reply_is_felt_by_compiled_code(model, make_direction):
    model.sliders.put(make_direction("one"), 0.0)
    model.compile(context=64, backend="aot_eager")
    session = Session(model, sampler=GREEDY, sliders=model.sliders)
    plain = list(session.reply("hello"))
    session.clear()
    pieces, said = session.reply("hello"), []
    for i, piece in enumerate(pieces):
        said.append(piece)
        if i == 3:
            made = compilations()
            model.sliders["one"] = 40.0
    assert said[:4] == plain[:4]
    assert said[4:] != plain[4:]
    assert compilations() == made


def test_a_text_longer_than_the_context_is_an_error_that_says_so(model):
    model.compile(context=8, backend="eager")
    model.hf.generation_config.eos_token_id = 3
    with pytest.raises(UsageError, match="at most 8 tokens"):
        written(model, GREEDY)

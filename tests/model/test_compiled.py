"""torch.compile, one block for all: the tokens of the plain model, and no compilation when a slider moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat
from torch._dynamo.utils import counters

from steer.chat.session import Session
from steer.core.edit import Edit
from steer.core.method import Method
from steer.core.sampler import Sampler
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.model.decode import decode, generate
from steer.model.steered import SteeredModel, load

PROMPT = [1, 9, 20, 31, 12, 40]
GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)


def written(model: SteeredModel, sampler: Sampler, prompt: list[int] = PROMPT) -> list[int]:
    """The tokens of a single text, which is what a compiled model decodes."""
    return [step.tokens[0] for step in decode(model, [prompt], sampler)]


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
    timed = Schedule("reply", after=2, ramp=3)
    return [
        Slider(one),
        Slider(two, "ablate"),
        Slider(one, "clamp", label="one:clamp"),
        Slider(two, "cap", label="two:cap"),
        Slider(make_direction("late", site=2, seed=6), "add", when=timed),
        Slider(make_direction("gated", site=2, seed=7), "scale", when=Schedule(gate=Gate(two, above=0.0))),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decoding_gives_the_plain_models_tokens_and_moving_sliders_compiles_nothing(model, sliders, backend):
    model.end_token_ids = frozenset([3])
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
            out.append(written(model, GREEDY))
        return out

    plain = texts()
    assert len({tuple(t) for t in plain}) > 3  # the sliders do something
    model.compile(sliders, backend=backend)
    made = compilations()
    # One for all blocks, one for blocks with hooks inside, one for the head.
    assert made == 3
    assert texts() == plain
    assert compilations() == made
    model.uncompile()
    assert texts() == plain
    assert hooks_on(model) == 0


def test_a_slider_that_moves_in_mid_reply_is_felt_by_compiled_code(model, make_direction):
    model.sliders.put(make_direction("one"), 0.0)
    model.compile(backend="eager")
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


@pytest.mark.slow
def test_one_compilation_serves_every_length_and_what_other_texts_are_read_with(model):
    model.end_token_ids = frozenset([3])
    long = replace(GREEDY, max_new_tokens=100)  # more than the room that a cache makes at a time
    texts = [[5], PROMPT, PROMPT * 3]
    plain = [written(model, long, t) for t in texts]
    model.compile(backend="eager")
    assert [written(model, long, t) for t in texts] == plain
    assert compilations() == 2
    assert generate(model, texts, GREEDY) == [p[:12] for p in plain]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("Mistral", {"sliding_window": 9}),
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Qwen3", {}),
        ("Gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 8}),
    ],
)
def test_windows_biases_and_norms_of_other_architectures(tiny_llama, tmp_path, architecture, config):
    model = load(save_tiny_chat(tiny_llama, tmp_path, architecture=architecture, **config))
    model.end_token_ids = frozenset([3])
    plain = written(model, replace(GREEDY, max_new_tokens=30))
    model.compile(backend="eager")
    assert written(model, replace(GREEDY, max_new_tokens=30)) == plain


def test_hooks_inside_of_blocks_are_felt_whoever_put_them_there(model, make_direction):
    model.end_token_ids = frozenset([3])
    keep = Edit((make_direction("one"),), method=Method(norm_preserving=True))
    norm = model.hf.model.layers[1].post_attention_layernorm

    def texts() -> list[list[int]]:
        out = [written(model, GREEDY)]
        with model.edited(keep):
            out.append(written(model, GREEDY))
        handle = norm.register_forward_hook(lambda module, args, output: -output)
        out.append(written(model, GREEDY))
        handle.remove()
        return out

    plain = texts()
    model.compile(backend="eager")
    assert texts() == plain
    assert plain[0] != plain[1]
    assert plain[0] != plain[2]


def test_a_reply_goes_on_where_compiling_begins_and_ends(model):
    model.end_token_ids = frozenset([3])
    plain = written(model, GREEDY)
    steps, said = decode(model, [PROMPT], GREEDY), []
    model.compile(backend="eager")
    compiled = model.compiled
    for n in range(12):
        model.compiled = compiled if n % 3 else None
        said.append(next(steps).tokens[0])
    assert said == plain
    assert all("forward" not in vars(module) for module in model.hf.modules())


def test_an_exception_in_a_compiled_pass_leaves_the_plain_model(model):
    model.compile(backend="eager")

    def fail(module: object, args: object, output: object) -> None:
        raise RuntimeError("in the midst of it")

    plain = written(model, replace(GREEDY, max_new_tokens=1))
    handle = model.hf.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the midst"):
        model.compiled.warm_up()
    handle.remove()
    assert all("forward" not in vars(module) for module in model.hf.modules())
    assert written(model, replace(GREEDY, max_new_tokens=1)) == plain

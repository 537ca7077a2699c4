"""Sliders on the thoughts or on the answer: which tokens these are, and that decoding of every kind agrees on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slow_steering import EXACT, Slow, close_directions, exact, watched
from tiny_chat import SPECIAL, TEMPLATE, save_tiny_chat

from steer.chat.readout import look_inside
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.core.schedule import Part, Schedule
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.model.decode import decode, generate
from steer.model.kv_cache import PrefixCache
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel, load
from steer.model.steering.low_rank import NO_ANSWER
from steer.model.written import WrittenText
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Finished, Job, Token

OPENS = TEMPLATE.replace("<|assistant|> {%", "<|assistant|> <think> {%")
D = close_directions()
LENGTH = 16


@pytest.fixture(scope="module")
def thinker(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    """A tiny model, all of it in fp64, whose vocabulary has marks of thoughts and whose replies never end."""
    place = save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("thinker") / "chat", marks=("<think>", "</think>"))
    model = exact(load(place, dtype=torch.float64))
    model.end_token_ids = frozenset()
    return model


def ids(model: SteeredModel, text: str) -> list[int]:
    return model.encode(text)


def sampler(model: SteeredModel, seed: int = 0, *more: tuple[int, float]) -> Sampler:
    """Draws that close the thoughts after a few tokens, and no special token, which a reply's text does not have."""
    bias = ((ids(model, "</think>")[0], 3.5), *((i, -100.0) for i in range(len(SPECIAL))), *more)
    return Sampler(LENGTH, 1.0, seed=seed, repetition_penalty=1.0, logit_bias=bias)


def moved(part: Part, amount: float = 4.0, **limits: int) -> Edit:
    edit = Edit.of([
        Slider(D[0], "add", amount, Schedule(part, **limits)),
        Slider(D[1], "clamp", 1.0, Schedule(part, **limits)),
        Slider(D[2], "ablate", 1.0, Schedule(part, **limits)),
    ])  # fmt: skip
    assert edit is not None
    return edit


def thoughts_in(model: SteeredModel, made: Sequence[int], opened: bool) -> int:
    """How many tokens of a reply are thoughts, by the marks' ids."""
    open_, close = ids(model, "<think> </think>")
    if not opened and made[0] != open_:
        return 1  # the token that shows it
    return list(made).index(close) + 1 if close in made else NO_ANSWER


def slow(model: SteeredModel, prompt: Sequence[int], made: Sequence[int], edit: Edit, opened: bool) -> torch.Tensor:
    """The logits of the passes that write `made`, with the edit's moves on the tokens of their part alone."""
    found, moves = thoughts_in(model, made, opened), edit.as_moves()
    when = moves[0].when
    always = [replace(m, when=Schedule()) for m in moves]

    def acts(position: int) -> bool:
        i = position - (len(prompt) - 1)
        inside = 0 <= i < found if when.part == "thoughts" else i >= found
        i -= found if when.part == "answer" else 0
        return inside and i >= (when.after or 0) and (when.first is None or i < when.first)

    text = [*prompt, *made[:-1]]
    return Slow(model, lambda t: always if acts(t) else [], len(prompt)).logits(text)[len(prompt) - 1 :]


PROMPTS = {"opens": "<s> hello <|assistant|> <think>", "may": "<s> hello <|assistant|>"}
EDITS = {
    "thoughts": moved("thoughts"), "answer": moved("answer"), "first": moved("thoughts", first=2),
    "later": moved("answer", after=2), "begin": moved("answer", first=3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "reply", "answer"),
    [
        ("hello <|assistant|>", "", NO_ANSWER),
        ("hello <|assistant|>", "yes", 1),
        ("hello <|assistant|>", "<think> so so", NO_ANSWER),
        ("hello <|assistant|>", "<think> so </think>", 3),
        ("hello <|assistant|>", "<think> so </think> yes <think> so", 3),
        ("hello <|assistant|> <think>", "so", NO_ANSWER),
        ("hello <|assistant|> <think>", "so </think> yes", 2),
        ("hello <|assistant|> <think> </think>", "", 0),
        ("hello <|assistant|> <think> </think>", "<think> so", 0),
        ("<think> hello <|assistant|>", "yes", 1),
    ],
)
def test_the_answer_begins_after_the_mark_that_closes_the_thoughts(thinker, prompt, reply, answer):
    before, after = ids(thinker, prompt), ids(thinker, reply) if reply else []
    assert WrittenText(thinker.tokenizer, [*before, *after], len(before)).answer == answer
    written = WrittenText(thinker.tokenizer, before, len(before))
    for token in after:  # however often it is asked for
        assert written.answer in (NO_ANSWER, answer)
        written.append(token)
    assert written.answer == answer


def test_a_model_without_marks_has_no_thoughts(tiny_llama, tmp_path):
    model = load(save_tiny_chat(tiny_llama, tmp_path / "chat"))
    assert WrittenText(model.tokenizer, ids(model, "<s> hello"), 2).answer == 0


def test_marks_of_several_tokens_are_thoughts_to_their_last(tiny_llama, tmp_path):
    model = load(save_tiny_chat(tiny_llama, tmp_path / "chat", by_bytes=True, template=OPENS))
    for prompt, reply in (("<|assistant|>", "<think>é</think>"), ("<|assistant|> <think>\n", "é</think>")):
        written = WrittenText(model.tokenizer, ids(model, prompt), len(ids(model, prompt)))
        for token in ids(model, reply):
            assert written.answer == NO_ANSWER
            written.append(token)
        assert written.answer == len(ids(model, reply))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", EDITS)
def test_decoding_moves_the_part_alone_and_is_one_full_pass(thinker, name, kind):
    prompt, edit, seed = ids(thinker, PROMPTS[kind]), EDITS[name], 3
    draw = sampler(thinker, seed, *([] if kind == "opens" else [(ids(thinker, "<think>")[0], 3.5)]))
    with thinker.steering.applied([edit]), watched(thinker) as seen:
        made = [step.tokens[0] for step in decode(thinker, [prompt], draw)]
    full = slow(thinker, prompt, made, edit, kind == "opens")
    torch.testing.assert_close(torch.cat(seen), full, rtol=0, atol=EXACT)
    with thinker.steering.applied([edit]), watched(thinker) as seen:
        assert generate(thinker, [prompt], draw)[0] == made
    torch.testing.assert_close(torch.cat(seen), full, rtol=0, atol=EXACT)
    with thinker.steering.applied([edit]), torch.inference_mode():  # the reply is given, as where it is measured
        read = prefill(thinker, [[*prompt, *made[:-1]]], prompts=[len(prompt)])
        given = thinker.hf.lm_head(read.hidden[0, -len(made) :])
    torch.testing.assert_close(given, full, rtol=0, atol=EXACT)


def test_a_slider_on_the_answer_leaves_the_thoughts_and_changes_what_follows(thinker):
    prompt, changed = ids(thinker, PROMPTS["opens"]), 0
    for seed in range(3):
        plain = generate(thinker, [prompt], sampler(thinker, seed))[0]
        with thinker.steering.applied([moved("answer")]):
            steered = generate(thinker, [prompt], sampler(thinker, seed))[0]
        at = thoughts_in(thinker, plain, True)
        assert 1 <= at < LENGTH
        assert steered[:at] == plain[:at]
        changed += steered != plain
        with thinker.steering.applied([moved("thoughts")]):
            assert generate(thinker, [prompt], sampler(thinker, seed))[0] != plain
    assert changed == 3


def test_a_batch_whose_rows_close_at_different_times_is_each_row_alone(thinker):
    rows = [(ids(thinker, p), e) for p in PROMPTS.values() for e in (None, *EDITS.values())]
    prompts, edits = [p for p, _ in rows], [e for _, e in rows]
    draw = sampler(thinker, 5)
    with thinker.steering.applied(edits):
        together = generate(thinker, prompts, draw)
        steps = list(decode(thinker, prompts, draw))
    assert [[s.tokens[i] for s in steps] for i in range(len(rows))] == together
    assert len({thoughts_in(thinker, made, True) for made in together}) > 2
    for i, (prompt, edit) in enumerate(rows):
        with thinker.steering.applied([edit]):
            assert generate(thinker, [prompt], draw, [i])[0] == together[i]


def test_the_server_writes_what_the_chat_writes(thinker):
    draw = sampler(thinker, 7)
    cases = [(ids(thinker, p), e, k) for k, p in enumerate(PROMPTS.values()) for e in (None, *EDITS.values())]
    alone = []
    for prompt, edit, key in cases:
        with thinker.steering.applied([edit]):
            alone.append([s.tokens[0] for s in decode(thinker, [prompt], draw, [key])])
    begun = alone[2][:3]  # a reply that goes on within its thoughts
    with thinker.steering.applied([cases[2][1]]):
        on = [s.tokens[0] for s in decode(thinker, [[*cases[2][0], *begun]], draw, [0], begun=3)]
    engine = BatchingEngine(thinker, max_running=8)
    try:
        jobs = [Job(p, draw, lambda e=e: e, k) for p, e, k in cases]
        jobs.append(Job([*cases[2][0], *begun], draw, lambda: cases[2][1], 0, begun=3))
        assert written(engine, jobs) == [*alone, on]
    finally:
        engine.close()


def written(engine: BatchingEngine, jobs: Sequence[Job]) -> list[list[int]]:
    """The tokens of several jobs that run together."""
    from threading import Event as Flag

    out: list[list[int]] = [[] for _ in jobs]
    flags = [Flag() for _ in jobs]

    def listen(i: int, event: object) -> None:
        if isinstance(event, Token):
            out[i].append(event.id)
        else:
            assert isinstance(event, Finished), event
            flags[i].set()

    for i, job in enumerate(jobs):
        engine.submit(job, lambda event, i=i: listen(i, event))
    assert all(flag.wait(60) for flag in flags)
    return out


@pytest.mark.parametrize("name", EDITS)
def test_a_reply_that_goes_on_or_is_read_again_counts_from_its_begin(thinker, name):
    prompt, edit, draw = ids(thinker, PROMPTS["opens"]), EDITS[name], sampler(thinker, 3)
    with thinker.steering.applied([edit]), watched(thinker) as seen:
        made = [step.tokens[0] for step in decode(thinker, [prompt], draw)]
    for cut in (2, thoughts_in(thinker, made, True), LENGTH - 2):
        for memory in (None, PrefixCache()):
            greedy = Sampler(2, 0.0, repetition_penalty=1.0)
            with thinker.steering.applied([edit]), watched(thinker) as again:
                steps = decode(thinker, [[*prompt, *made[:cut]]], greedy, begun=cut, memory=memory)
                next(steps)
                if memory is not None:
                    memory.forget()
                next(steps)
            torch.testing.assert_close(again[0], seen[cut], rtol=0, atol=EXACT)


def test_readouts_read_a_reply_under_the_sliders_of_its_parts(thinker):
    prompt, draw = ids(thinker, PROMPTS["opens"]), sampler(thinker, 3)
    made = generate(thinker, [prompt], draw)[0]
    at = thoughts_in(thinker, made, True)
    for part, before, after in (("answer", False, True), ("thoughts", True, False)):
        edit = moved(part)
        kl = look_inside(thinker, prompt, made, [(0, edit), (1, edit)], {}).kl
        # The first token of the answer sees no other pass than its own; the others also see keys that were moved.
        assert [any(k > 1e-6 for k in kl[:at]), kl[at] > 1e-6 if before == after else after] == [before, after]
        if part == "answer":
            assert max(kl[:at]) < 1e-9 < kl[at]


def test_passes_of_ones_own_are_refused_since_steer_does_not_see_their_parts(thinker):
    with pytest.raises(UsageError, match="part text or reply"):
        thinker.hooks(moved("answer"))
    with thinker.edited(moved("answer")), pytest.raises(UsageError, match=r"model\.chat"):
        thinker.hf(input_ids=torch.tensor([[1, 2, 3]]))

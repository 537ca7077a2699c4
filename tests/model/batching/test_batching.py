"""The batching engine: a reply is what it would be alone, whoever else is served."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from batched import DRAWN, GREEDY, LONG, PATIENCE, PROMPT, ask, by_decoding, job
from tiny_chat import hooks_on, save_tiny_chat

from steer.checkpoint.fetch import DEFAULT_MODEL
from steer.core.edit import Edit
from steer.model.decode import decode
from steer.model.steered import SteeredModel, load
from steer.model.steering.receipts import Tally
from steer.serve import packed
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Event, Job, Token
from steer.serve.packed import NAME


@pytest.mark.slow
@pytest.mark.parametrize("read", [256, 11], ids=["prompts whole", "prompts in pieces"])
def test_replies_written_at_once_are_those_of_each_job_alone(endless, jobs, read, monkeypatch):
    monkeypatch.setattr(packed, "READ", read)
    wanted = [by_decoding(endless, one) for one in jobs]
    assert len({tuple(w) for w in wanted}) == len(jobs)
    with closing(BatchingEngine(endless, max_running=8)) as engine:
        alone = [ask(engine, one).wait().tokens for one in jobs]
        together = []
        for one in jobs:
            together.append(ask(engine, one))
            together[0].wait_for(len(together))  # the next comes while others are being written
        assert [t.wait().tokens for t in together] == alone == wanted
    assert all(t.last.reason == "length" for t in together)
    assert hooks_on(endless) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"),
    [("Qwen3", {}), ("Mistral", {"sliding_window": 8}), ("Llama", {"num_key_value_heads": 4})],
)
def test_it_holds_for_every_attention(architecture, config, tiny_llama, jobs, tmp_path):
    path = save_tiny_chat(tiny_llama, tmp_path / "other", architecture=architecture, **config)
    model = load(path, dtype=torch.float64)
    model.end_token_ids = frozenset()
    with closing(BatchingEngine(model, max_running=5)) as engine:
        assert model.hf.config._attn_implementation == NAME
        together = [ask(engine, one) for one in jobs]
        assert [t.wait().tokens for t in together] == [by_decoding(model, one) for one in jobs]


@pytest.mark.slow
def test_the_model_can_be_talked_to_beside_the_engine_and_neither_feels_the_other(endless, engine, jobs, moral):
    chat = {"temperature": 0.0, "max_new_tokens": 10}
    endless.sliders.put(moral, -3.0)
    steered = endless.chat("hello lie", **chat)
    wanted = [by_decoding(endless, one) for one in jobs]
    listeners = [ask(engine, one) for one in jobs]
    assert endless.chat("hello lie", **chat) == steered
    assert [x.wait().tokens for x in listeners] == wanted
    endless.sliders.reset()
    assert endless.chat("hello lie", **chat) != steered


@pytest.mark.slow
def test_a_slider_moved_in_mid_stream_changes_later_tokens_of_that_reply_alone(endless, engine, moral):
    edits: list[Edit | None] = [None]
    moved, still = [], [ask(engine, job(sampler=LONG, key=k)) for k in (1, 2)]
    plain = by_decoding(endless, job(sampler=LONG))

    def hear(event: Event) -> None:
        # In the engine's thread: exactly the fifth token is the first one under the slider.
        if isinstance(event, Token):
            moved.append(event.id)
            if len(moved) == 4:
                edits[0] = Edit(add=((moral, -4.0),))
        else:
            done.set()

    done = threading.Event()
    engine.submit(Job(PROMPT, LONG, lambda: edits[0]), hear)
    assert done.wait(PATIENCE)
    wanted = []
    with endless.steering.applied([None]):
        for step in decode(endless, [list(PROMPT)], LONG, [0]):
            wanted.append(step.tokens[0])
            if len(wanted) == 4:
                break
    assert moved[:4] == plain[:4] == wanted
    assert moved[4:] != plain[4:]
    assert moved == _moved_midway(endless, moral)
    assert [s.wait().tokens for s in still] == [by_decoding(endless, job(sampler=LONG, key=k)) for k in (1, 2)]


def _moved_midway(model: SteeredModel, moral) -> list[int]:
    out = []
    steps = decode(model, [list(PROMPT)], LONG, [0])
    try:
        for step in steps:
            out.append(step.tokens[0])
            if len(out) == 4:
                model.steering.set([Edit(add=((moral, -4.0),))])
    finally:
        model.steering.set([None])
    return out


def test_an_end_token_ends_a_reply_and_is_reported(endless, jobs):
    made = by_decoding(endless, job(sampler=LONG))
    end = made[7]
    endless.end_token_ids = frozenset([end])
    with closing(BatchingEngine(endless)) as engine:
        listener, other = ask(engine, job(sampler=LONG)), ask(engine, jobs[1])
        listener.wait()
        assert listener.tokens == made[: made.index(end) + 1]
        assert [e.end for e in listener.events[:-1]] == [False] * made.index(end) + [True]
        assert listener.last.reason == "stop"
        assert other.wait().tokens == by_decoding(endless, jobs[1])


def test_logprobs_are_those_of_the_models_own_distribution(endless, engine):
    asked = [ask(engine, replace(job(sampler=DRAWN, key=k), top_logprobs=k)) for k in (0, 3)]
    for k, listener in zip((0, 3), asked, strict=True):
        made = listener.wait().tokens
        with torch.inference_mode():
            logits = endless.hf(input_ids=torch.tensor([[*PROMPT, *made]])).logits[0, len(PROMPT) - 1 : -1]
        own = logits.float().log_softmax(-1)
        for i, token in enumerate(listener.events[:-1]):
            assert token.logprob == pytest.approx(float(own[i, token.id]), abs=1e-5)
            values, ids = own[i].topk(k)
            assert [t for t, _ in token.top] == ids.tolist()
            assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    silent = ask(engine, job()).wait().events[0]
    assert (silent.logprob, silent.top) == (None, ())


@pytest.mark.slow
def test_receipts_are_those_of_each_job_alone(endless, engine, jobs):
    del jobs[5]  # the one that ablates in some blocks alone: sliders do not
    listeners = [ask(engine, one) for one in jobs]
    for one, listener in zip(jobs, listeners, strict=True):
        tally = Tally()
        by_decoding(endless, one, tally)
        got, wanted = listener.wait().last.receipt, tally.receipt()
        if one.edit() is None:
            assert got is None
            continue
        assert (got.tokens, [(s.name, s.operation, s.tokens) for s in got.sliders]) == (
            wanted.tokens,
            [(s.name, s.operation, s.tokens) for s in wanted.sliders],
        )
        for mine, theirs in zip(got.sliders, wanted.sliders, strict=True):
            assert mine.mean_share == pytest.approx(theirs.mean_share, nan_ok=True)


def test_without_sliders_there_is_no_hook(endless, engine, jobs):
    counts: set[int] = set()
    seen = endless.hf.register_forward_pre_hook(lambda *_: counts.add(hooks_on(endless)))
    for one in (jobs[0], jobs[7]):
        ask(engine, one).wait()
    assert counts == {1}  # the one that counts
    ask(engine, jobs[1]).wait()
    assert max(counts) > 1
    seen.remove()
    assert hooks_on(endless) == 0


@pytest.mark.slow
@pytest.mark.model
def test_steered_replies_of_the_default_model_are_what_a_full_forward_would_choose(make_direction):
    model = load(DEFAULT_MODEL)
    push = replace(make_direction("push", site=14, width=model.anatomy.width), with_mean=20.0, without_mean=0.0)
    edits = [None, Edit(add=((push, 1.0),)), Edit(add=((push, -1.0),)), Edit((push,)), None]
    prompts = [model.prompt_ids([{"role": "user", "content": f"Tell me about {x}."}]) for x in ("a ship", "the sea")]
    sampler = replace(GREEDY, max_new_tokens=24)
    with closing(BatchingEngine(model)) as engine:
        asked = [(p, e, ask(engine, job(p, sampler, e))) for p in prompts for e in edits]
        for prompt, edit, listener in asked:
            made = listener.wait().tokens
            with torch.inference_mode(), model.steering.lock, model.steering.applied([edit]):
                logits = model.hf(input_ids=torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
            # Greedy up to rounding to bf16, where logits of 20 are 0.125 apart.
            assert float((logits.max(-1).values - chosen).max()) <= 0.25
    assert len({tuple(x.tokens) for _, _, x in asked}) >= 6

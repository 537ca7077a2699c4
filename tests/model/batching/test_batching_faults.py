"""The batching engine: nobody waits for ever, whatever fails, and the model is given back."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from batched import DRAWN, GREEDY, LONG, PATIENCE, PROMPT, ask, by_decoding, job, leave_pages
from tiny_chat import hooks_on, save_tiny_chat
from transformers import CONFIG_MAPPING

from steer.checkpoint.proof import _completed
from steer.checkpoint.tiny import model_class_of, tiny_config, tiny_model
from steer.core.edit import Edit
from steer.errors import MismatchError, SteerError, UnsupportedError, UsageError
from steer.model.steered import load
from steer.serve import packed
from steer.serve.batching import BatchingEngine
from steer.serve.engine import Busy, Event, Finished, Job, Token
from steer.serve.packed import Packing, Reading, check_files
from steer.serve.turns import FairScheduler


def test_a_job_that_is_cancelled_leaves_its_place_to_the_next(endless):
    with closing(BatchingEngine(endless, max_running=1, max_waiting=3)) as engine:
        first = ask(engine, job(sampler=LONG))
        second, third, fourth = (ask(engine, job(sampler=DRAWN, key=k)) for k in (1, 2, 3))
        first.wait_for(3)
        assert (engine.running, engine.waiting) == (1, 3)
        third.cancel()
        first.cancel()
        first.cancel()
        assert first.wait().last == third.wait().last == Finished("cancelled", None)
        assert 3 <= len(first.tokens) < 100
        assert third.tokens == []
        for k, listener in ((1, second), (3, fourth)):
            assert listener.wait().tokens == by_decoding(endless, job(sampler=DRAWN, key=k))
        second.cancel()  # over already
        assert [isinstance(e, Token) for e in second.events].count(False) == 1
        assert (engine.running, engine.waiting) == (0, 0)


def test_a_job_can_be_cancelled_by_its_own_listener(endless, engine):
    heard: list[Event] = []
    done = threading.Event()

    def hear(event: Event) -> None:
        heard.append(event)
        if len(heard) == 5:
            cancel()
        if not isinstance(event, Token):
            done.set()

    cancel = engine.submit(job(sampler=LONG), hear)
    assert done.wait(PATIENCE)
    assert [type(e) for e in heard] == [Token] * 5 + [Finished]


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(endless):
    with closing(BatchingEngine(endless, max_running=1, max_waiting=2)) as engine:
        taken = [ask(engine, job(sampler=LONG, key=k)) for k in range(3)]
        for _ in range(2):
            with pytest.raises(Busy, match="1 replies are being written and 2 wait") as busy:
                ask(engine, job())
            assert 1 <= busy.value.retry_after <= 60
        assert engine.waiting == 2
        assert all(len(t.wait().tokens) == 100 for t in taken)
        assert len(ask(engine, job()).wait().tokens) == 12


@pytest.mark.slow
def test_a_job_begins_when_the_pages_for_the_whole_of_it_are_free(endless, monkeypatch):
    # Four pages of 64 tokens: two jobs of 105 tokens take them all, and the one of 17 behind the third has to wait.
    leave_pages(monkeypatch, endless, 4)
    wanted = [by_decoding(endless, job(sampler=LONG, key=k)) for k in range(3)]
    with closing(BatchingEngine(endless, max_running=4)) as engine:
        taken = [ask(engine, job(sampler=LONG, key=k)) for k in range(3)]
        small = ask(engine, job())
        assert (engine.running, engine.waiting) == (2, 2)
        assert [t.wait().tokens for t in taken] == wanted
        assert small.wait().tokens == by_decoding(endless, job())


def test_the_longest_text_leaves_pages_for_another_beside_it(endless, monkeypatch):
    leave_pages(monkeypatch, endless, 3)
    with closing(BatchingEngine(endless, max_running=4)) as engine:
        assert engine.context == 64
    with closing(BatchingEngine(endless, max_running=1)) as engine:
        assert engine.context == 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (job(sampler=replace(GREEDY, max_new_tokens=124)), "at most 128 tokens of prompt and reply together, found 5"),
        (job(prompt=()), "at least one token"),
        (job(prompt=(1, 4, 9_999)), "token ids from 0 to"),
        (job(sampler=replace(GREEDY, logit_bias=((9_999, 1.0),))), "9999"),
    ],
)
def test_a_job_that_can_never_be_written_is_refused_at_once(endless, engine, bad, message):
    with pytest.raises(UsageError, match=message):
        ask(engine, bad)
    assert (engine.running, engine.waiting) == (0, 0)
    assert ask(engine, job()).wait().tokens == by_decoding(endless, job())


def test_sliders_that_fail_end_their_own_reply_alone(endless, engine, jobs, make_direction):
    asked = [0]

    def failing() -> Edit | None:
        asked[0] += 1
        return None if asked[0] < 4 else Edit((1 / 0,))  # pyright: ignore[reportArgumentType]

    wide = Edit((make_direction("wide", width=64),))
    good = [ask(engine, one) for one in jobs[:6]]
    broken, misfit = ask(engine, Job(PROMPT, LONG, failing)), ask(engine, job(sampler=LONG, edit=wide))
    assert isinstance(broken.wait().last, SteerError)
    assert "ZeroDivisionError" in str(broken.last)
    assert len(broken.tokens) == 3
    assert isinstance(misfit.wait().last, MismatchError)
    assert [g.wait().tokens for g in good] == [by_decoding(endless, one) for one in jobs[:6]]
    assert engine.running == 0


def test_a_listener_that_fails_loses_its_reply_alone(endless, engine, jobs, caplog):
    def deaf(event: Event) -> None:
        raise ConnectionError("gone")

    engine.submit(job(sampler=LONG), deaf)
    assert ask(engine, jobs[2]).wait().tokens == by_decoding(endless, jobs[2])
    assert "listener" in caplog.text
    _until(lambda: engine.running == 0)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the model", "in the bookkeeping"])
def test_after_a_step_that_failed_the_engine_goes_on(endless, jobs, where, monkeypatch):
    with closing(BatchingEngine(endless, max_running=2, max_waiting=8)) as engine:
        hit = [ask(engine, job(sampler=LONG, key=k)) for k in range(2)]
        waiting = [ask(engine, one) for one in jobs[:4]]
        hit[0].wait_for(2)
        hit[1].wait_for(2)

        def fail(*args: object) -> None:
            undo()
            raise RuntimeError("out of\nluck")

        if where == "in the model":
            undo = endless.hf.model.layers[1].register_forward_pre_hook(fail).remove
        else:
            monkeypatch.setattr(FairScheduler, "schedule_batch", fail)
            undo = monkeypatch.undo
        for listener in hit:
            assert str(listener.wait().last) == "the reply could not be written: RuntimeError: out of luck"
        assert [w.wait().tokens for w in waiting] == [by_decoding(endless, one) for one in jobs[:4]]
        assert ask(engine, jobs[5]).wait().tokens == by_decoding(endless, jobs[5])
    assert hooks_on(endless) == 0


def test_an_engine_that_fails_without_a_job_stops_and_says_so(endless, monkeypatch):
    own = endless.hf.config._attn_implementation
    with closing(BatchingEngine(endless)) as engine:
        over = ask(engine, job()).wait()

        def fail(*args: object) -> None:
            raise RuntimeError("no luck at all")

        monkeypatch.setattr(FairScheduler, "clear_cancelled_requests", fail)
        over.cancel()  # which asks the engine to look
        _until(lambda: not any(t.name == "steer-engine" for t in threading.enumerate()))
        for _ in range(2):
            with pytest.raises(SteerError, match="the engine has stopped: RuntimeError: no luck at all"):
                ask(engine, job())
    assert endless.hf.config._attn_implementation == own


def test_closing_ends_everything_promptly_and_gives_the_model_back(endless, jobs):
    own, ids = endless.hf.config._attn_implementation, torch.tensor([PROMPT])
    plain = endless.hf(input_ids=ids).logits
    random = torch.random.get_rng_state()
    engine = BatchingEngine(endless, max_running=2, max_waiting=8)
    listeners = [ask(engine, job(sampler=LONG, edit=jobs[3].edit())) for _ in range(4)]
    listeners[0].wait_for(2)
    start = time.perf_counter()
    engine.close()
    engine.close()
    assert time.perf_counter() - start < 2
    assert [x.last.reason for x in listeners] == ["cancelled"] * 4
    assert not any(t.name == "steer-engine" for t in threading.enumerate())
    assert endless.hf.config._attn_implementation == own
    assert hooks_on(endless) == 0
    assert torch.equal(endless.hf(input_ids=ids).logits, plain)
    assert torch.equal(torch.random.get_rng_state(), random)
    with pytest.raises(SteerError, match="closed"):
        ask(engine, job())


@pytest.mark.slow
def test_an_engine_without_jobs_closes_and_another_can_be_made(endless):
    for _ in range(3):
        with closing(BatchingEngine(endless)) as engine:
            assert ask(engine, job()).wait().tokens == by_decoding(endless, job())


@pytest.mark.slow
def test_memory_stays_flat_over_many_replies(endless, engine, jobs, moral):
    brief = replace(DRAWN, max_new_tokens=5)

    def serve(many: int) -> None:
        for k in range(many // 8):
            for listener in [ask(engine, replace(one, key=k, sampler=brief)) for one in jobs]:
                listener.wait()
        _until(lambda: engine.running == 0)
        for amount in range(16):  # the latest few edits are kept worked out, of whatever size
            endless.steering.work_out(Edit(add=((moral, float(amount)),)))
        gc.collect()

    tracemalloc.start()
    serve(120)
    before = tracemalloc.get_traced_memory()[0]
    serve(200)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # A text that leaves its record with transformers leaves 1,000 bytes; caches of other kinds fill up a little.
    assert grown < 200 * 500
    cache = engine._batcher._processor.cache  # transformers' own, which tells nobody how full it is
    assert cache.compute_free_capacity() == 1.0


def _until(true: Callable[[], bool]) -> None:
    end = time.perf_counter() + PATIENCE
    while not true():
        assert time.perf_counter() < end
        time.sleep(0.005)


# Another transformers


@pytest.mark.parametrize(
    "name",
    [
        "continuous_api.ContinuousBatchProcessor.prepare_next_batch",
        "continuous_api.ContinuousBatchProcessor.update_batch",
        "input_outputs.ContinuousBatchingIOs.get_model_kwargs",
        "cache_allocators.full_attention.FullAttentionCacheAllocator.needs_new_blocks",
    ],
)
def test_a_transformers_with_other_names_is_refused_by_its_version(endless, monkeypatch, name):
    own = endless.hf.config._attn_implementation
    monkeypatch.delattr(f"transformers.generation.continuous_batching.{name}")
    with pytest.raises(UnsupportedError, match=r"transformers 5\.\d+.*install transformers 5\.19") as error:
        BatchingEngine(endless)
    assert "\n" not in str(error.value)
    assert endless.hf.config._attn_implementation == own
    assert not any(t.name == "steer-engine" for t in threading.enumerate())


def test_texts_that_would_see_each_other_are_noticed_before_anyone_is_served(endless, monkeypatch):
    packing = packed.packing

    def leaking(inputs, window):
        out, new = packing(inputs, window), inputs["input_ids"].shape[1]
        if not inputs["read_index"][0].numel():
            reading = Reading(torch.arange(new)[None], slice(0, new), None)
            out["packings"] = {"full_attention": Packing((reading,), None)}
        return out

    monkeypatch.setattr(packed, "packing", leaking)
    with pytest.raises(UnsupportedError, match="other logits than alone"):
        BatchingEngine(endless)


def test_numbers_of_places_that_cannot_be_are_refused(model):
    for name, value in (("max_running", 0), ("max_waiting", -1), ("context", 0)):
        with pytest.raises(UsageError, match=f"{name}: expected"):
            BatchingEngine(model, **{name: value})


# Blocks that pages cannot hold


UNPAGED = {
    "qwen3_5_text": "linear_attention in 0-1;",
    "gptj": "an attention that cannot be replaced in 0-2;",
    "gemma4_text": r"heads x key \+ value: 2 x 24 \+ 24 in 0, 2; heads x key \+ value: 2 x 48 \+ 48 in 1, 3;",
    "nemotron_h": "linear_attention in 0; moe in 1; mlp in 3;",
    "llama4_text": "chunked_attention in 0-1;",
    "mamba": "linear_attention in 0-2;",
    "falcon_h1": "hybrid in 0-2;",
    "deepseek_v3": r"heads x key \+ value: 1 x 22 \+ 8 in 0-2;",
}


@pytest.mark.parametrize(
    "model_type", [t if i < 3 else pytest.param(t, marks=pytest.mark.slow) for i, t in enumerate(UNPAGED)]
)
def test_blocks_that_cannot_be_paged_are_named_and_the_model_chats_on(model_type, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    config = CONFIG_MAPPING[model_type]()
    model_class = model_class_of(config)
    assert model_class is not None

    def save(place, vocab_size):
        made = tiny_config(_completed(config, model_class), model_class)
        for key in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(made, key):
                setattr(made, key, vocab_size)
        tiny_model(made, model_class).float().save_pretrained(place)
        return place

    place, says = save_tiny_chat(save, tmp_path / "m"), f"{model_class.__name__}: .* {UNPAGED[model_type]} use chat"
    with pytest.raises(UnsupportedError, match=says):
        check_files(str(place), "m")  # no weight is read
    model = load(place, dtype="float32")
    own = model.hf.config._attn_implementation
    with pytest.raises(UnsupportedError, match=says) as error:
        BatchingEngine(model)
    assert "\n" not in str(error.value)
    assert model.hf.config._attn_implementation == own
    assert not any(t.name == "steer-engine" for t in threading.enumerate())
    assert model.replies([[{"role": "user", "content": "hello friend"}]], GREEDY)


def test_what_can_be_paged_is_known_from_the_config_too(tiny_llama, tmp_path, caplog):
    with caplog.at_level("DEBUG", "steer"):
        check_files(str(save_tiny_chat(tiny_llama, tmp_path / "m")), "m")
        check_files("someone/on-the-hub", "m")  # loading fetches it
    assert caplog.records == []

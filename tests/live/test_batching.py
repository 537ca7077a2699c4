"""The batching engine: a reply is what it would be alone, whoever else is served, and nobody is left hanging."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat

from steer.errors import MismatchError, SteerError, UnsupportedError, UsageError
from steer.live.decode import decode
from steer.live.model import SteeredModel, load
from steer.live.receipts import Tally
from steer.live.serve import packed
from steer.live.serve.batching import BatchingEngine
from steer.live.serve.engine import Busy, Event, Finished, Handle, Job, Token
from steer.live.serve.packed_attention import NAME, Reading
from steer.values.edit import Edit
from steer.values.move import Move
from steer.values.sampler import Sampler
from steer.values.when import Gate, When
from steer.weights.fetch import DEFAULT_MODEL

GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
DRAWN = Sampler(max_new_tokens=14, temperature=1.0, min_p=0.02, repetition_penalty=1.3, seed=3)
LONG = replace(DRAWN, max_new_tokens=100)
PROMPT = (1, 4, 20, 33, 5)
PATIENCE = 60.0


class Listener:
    """Hears what becomes of a job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.heard = threading.Condition()
        self.handle: Handle | None = None

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


def ask(engine: BatchingEngine, job: Job) -> Listener:
    listener = Listener()
    listener.handle = engine.submit(job, listener)
    return listener


def job(prompt: Sequence[int] = PROMPT, sampler: Sampler = GREEDY, edit: Edit | None = None, **more: int) -> Job:
    return Job(tuple(prompt), sampler, lambda: edit, **more)


def by_decoding(model: SteeredModel, one: Job, tally: Tally | None = None) -> list[int]:
    """What the decode loop writes for a job alone; its edit is asked once."""
    with model.steering.applied([one.edit()]):
        steps = decode(model, [list(one.prompt)], one.sampler, [one.key], tally=tally, begun=one.begun)
        return [step.tokens[0] for step in steps]


@pytest.fixture
def endless(model64: SteeredModel) -> SteeredModel:
    """A model without an end token, in fp64: every reply has its full length."""
    model64.hf.generation_config.eos_token_id = []
    return model64


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
        Edit(moves=(Move(moral, "clamp", 1.0), Move(late, "add", -1.0, When(gate=gate)))),
        Edit((moral,)),
        Edit(moves=(Move(moral, "add", 3.0, When("reply", first=5, after=2)),)),
        Edit((moral, other), 0.6, (1, 2), ((other, 0.5),)),
        Edit(moves=(Move(other, "scale", -1.0, When(ramp=6)), Move(moral, "cap", -1.0, When("reply")))),
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


# A reply is what it would be alone


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


@pytest.mark.parametrize(
    ("architecture", "config", "ours"),
    [("Qwen3", {}, True), ("Mistral", {"sliding_window": 8}, False), ("Llama", {"num_key_value_heads": 4}, True)],
)
def test_it_holds_for_every_attention(architecture, config, ours, tiny_llama, jobs, tmp_path):
    path = save_tiny_chat(tiny_llama, tmp_path / "other", architecture=architecture, **config)
    model = load(path, dtype=torch.float64)
    model.hf.generation_config.eos_token_id = []
    with closing(BatchingEngine(model, max_running=5)) as engine:
        assert (model.hf.config._attn_implementation == NAME) is ours
        together = [ask(engine, one) for one in jobs]
        assert [t.wait().tokens for t in together] == [by_decoding(model, one) for one in jobs]


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


def test_an_end_token_ends_a_reply_and_is_told(endless, jobs):
    made = by_decoding(endless, job(sampler=LONG))
    end = made[7]
    endless.hf.generation_config.eos_token_id = [end]
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


def test_receipts_are_those_of_each_job_alone(endless, engine, jobs):
    del jobs[5]
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
    seen = endless.hf.register_forward_pre_hook(lambda *_: counts.add(endless.steering.hook_count))
    for one in (jobs[0], jobs[7]):
        ask(engine, one).wait()
    assert counts == {0}
    ask(engine, jobs[1]).wait()
    assert max(counts) > 0
    seen.remove()
    assert hooks_on(endless) == 0


# Nobody hangs, nobody waits for ever


def test_a_job_that_is_cancelled_leaves_its_place_to_the_next(endless):
    with closing(BatchingEngine(endless, max_running=1, max_waiting=3)) as engine:
        first = ask(engine, job(sampler=LONG))
        second, third, fourth = (ask(engine, job(sampler=DRAWN, key=k)) for k in (1, 2, 3))
        first.wait_for(3)
        assert (engine.running, engine.waiting) == (1, 3)
        third.handle.cancel()
        first.handle.cancel()
        first.handle.cancel()
        assert first.wait().last == third.wait().last == Finished("cancelled", None)
        assert 3 <= len(first.tokens) < 100
        assert third.tokens == []
        for k, listener in ((1, second), (3, fourth)):
            assert listener.wait().tokens == by_decoding(endless, job(sampler=DRAWN, key=k))
        second.handle.cancel()  # over already
        assert [isinstance(e, Token) for e in second.events].count(False) == 1
        assert (engine.running, engine.waiting) == (0, 0)


def test_a_job_can_be_cancelled_by_its_own_listener(endless, engine):
    heard: list[Event] = []
    done = threading.Event()

    def hear(event: Event) -> None:
        heard.append(event)
        if len(heard) == 5:
            handle.cancel()
        if not isinstance(event, Token):
            done.set()

    handle = engine.submit(job(sampler=LONG), hear)
    assert done.wait(PATIENCE)
    assert [type(e) for e in heard] == [Token] * 5 + [Finished]


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


def test_a_job_begins_when_the_pages_for_the_whole_of_it_are_free(endless, monkeypatch):
    # Two pages of 64 tokens: jobs of 105 tokens take both, and the one of 17 beside them has to wait.
    monkeypatch.setattr(packed, "_pages", _fewer_pages(packed._pages))
    wanted = [by_decoding(endless, job(sampler=LONG, key=k)) for k in range(3)]
    with closing(BatchingEngine(endless, max_running=4)) as engine:
        taken = [ask(engine, job(sampler=LONG, key=k)) for k in range(3)]
        small = ask(engine, job())
        assert (engine.running, engine.waiting) == (1, 3)
        assert [t.wait().tokens for t in taken] == wanted
        assert small.wait().tokens == by_decoding(endless, job())


def _fewer_pages(made: Callable[..., dict[str, object]]) -> Callable[..., dict[str, object]]:
    return lambda *args: made(*args) | {"num_blocks": 2}


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
            scheduler = engine._batcher._processor.scheduler
            monkeypatch.setattr(scheduler, "schedule_batch", fail)
            undo = monkeypatch.undo
        for listener in hit:
            assert str(listener.wait().last) == "the reply could not be written: RuntimeError: out of luck"
        assert [w.wait().tokens for w in waiting] == [by_decoding(endless, one) for one in jobs[:4]]
        assert ask(engine, jobs[5]).wait().tokens == by_decoding(endless, jobs[5])
    assert hooks_on(endless) == 0


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


def test_an_engine_without_jobs_closes_and_another_can_be_made(endless):
    for _ in range(3):
        with closing(BatchingEngine(endless)) as engine:
            assert ask(engine, job()).wait().tokens == by_decoding(endless, job())


def test_memory_stays_flat_over_many_replies(endless, engine, jobs):
    brief = replace(DRAWN, max_new_tokens=5)

    def serve(many: int) -> None:
        for k in range(many // 8):
            for listener in [ask(engine, replace(one, key=k, sampler=brief)) for one in jobs]:
                listener.wait()
        _until(lambda: engine.running == 0)
        gc.collect()

    tracemalloc.start()
    serve(120)
    before = tracemalloc.get_traced_memory()[0]
    serve(200)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # One record that transformers keeps of a text is 1,000 bytes; worked-out sliders come and go.
    assert grown < 200 * 300
    cache = engine._batcher._processor.cache
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

    def leaking(inputs, dtype):
        out, new = packing(inputs, dtype), inputs["input_ids"].shape[1]
        if not inputs["read_index"][0].numel():
            out["readings"] = [Reading(slice(0, new), slice(0, new), 1, None)]
        return out

    monkeypatch.setattr(packed, "packing", leaking)
    with pytest.raises(UnsupportedError, match="other logits than alone"):
        BatchingEngine(endless)


def test_numbers_of_places_that_cannot_be_are_refused(model):
    for name, value in (("max_running", 0), ("max_waiting", -1), ("context", 0)):
        with pytest.raises(UsageError, match=f"{name}: expected"):
            BatchingEngine(model, **{name: value})


# The default model


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

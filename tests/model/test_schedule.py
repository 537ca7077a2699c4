"""When a slider acts: its values, and that positions are absolute whatever the cache, the batch or the packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slow_steering import (
    EXACT,
    Slow,
    close_directions,
    exact,
    fast_logits,
    make_dictionary,
    slow_logits,
    watched,
)
from tiny_chat import hooks_on
from torch import Tensor

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.schedule import ALWAYS, Gate, Schedule
from steer.core.slider import Intervention
from steer.errors import MismatchError
from steer.model.decode import decode, generate
from steer.model.kv_cache import growing_cache
from steer.model.steered import SteeredModel, load
from steer.model.steering.low_rank import ForwardContext

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")
PROMPTS = [[1, 4, 20, 33, 5], [1, 4, 71, 5], [1, 3, 9, 8, 7, 6, 4, 50, 5], [1]]
GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
D = close_directions()
LATE = replace(close_directions(site=2, n=1, seed=8)[0], name="late")
F = Feature("f", make_dictionary(), (3, 9, 21), (2.0, 1.0, 0.5))
WHENS = {
    "always": ALWAYS,
    "reply": Schedule("reply"),
    "first": Schedule(first=4),
    "after": Schedule(after=3),
    "ramp": Schedule(after=1, ramp=4),
    "above": Schedule(gate=Gate(D[1], above=-0.2)),
    "below": Schedule("reply", gate=Gate(F, below=0.3)),
}


def edit(name: str) -> Edit:
    """Every operation under one `when`, on directions and features, some of them set jointly."""
    when = WHENS[name]
    ablation = ALWAYS if when.gate else when
    made = Edit.of(
        [
            Intervention(D[0], "add", -1.0, when),
            Intervention(D[2], "clamp", 0.5, when),
            Intervention(D[3], "cap", -0.1, when),
            Intervention(LATE, "scale", 2.0, when),
            Intervention(F, "clamp", 0.8, when),
            Intervention(D[1], "ablate", 0.6, ablation),
        ]
    )
    assert made is not None
    return made


EDITS = {"none": None} | {name: edit(name) for name in WHENS}


@pytest.fixture(scope="module")
def endless(chat_checkpoint: Path) -> SteeredModel:
    """A tiny model, all of it in fp64, whose replies never end."""
    model = exact(load(chat_checkpoint, dtype=torch.float64))
    model.end_token_ids = frozenset()
    model.hf.generation_config.eos_token_id = []  # for what transformers itself generates
    return model


def assert_exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_a_gate_of_another_width_changes_nothing(model, moral):
    wide = Schedule(gate=Gate(Direction("wide", 0, torch.ones(64)), above=0.0))
    with pytest.raises(MismatchError, match=r"'wide' has width 64.*width 32"):
        model.steering.set([Edit(moves=(Intervention(moral, "add", 1.0, wide),))])
    assert hooks_on(model) == 0


def test_an_add_over_the_reply_moves_the_pass_that_writes_its_first_token_and_none_before(endless):
    prompt = PROMPTS[2]
    plain = fast_logits(endless, prompt, [], len(prompt))
    moved = fast_logits(endless, prompt, [Intervention(D[0], "add", 2.0, Schedule("reply"))], len(prompt))
    assert torch.equal(moved[:-1], plain[:-1])
    assert_exact(moved, slow_logits(endless, prompt, [Intervention(D[0], "add", 2.0, Schedule("reply"))], len(prompt)))
    assert float((moved[-1] - plain[-1]).abs().max()) > 0.01
    # From the second reply token on: the first is written as if nothing were there.
    later = [Intervention(D[0], "add", 2.0, Schedule(after=1))]
    assert torch.equal(fast_logits(endless, prompt, later, len(prompt)), plain)
    text = [*prompt, 40]
    assert not torch.equal(
        fast_logits(endless, text, later, len(prompt))[-1], fast_logits(endless, text, [], len(prompt))[-1]
    )


@pytest.mark.parametrize("name", WHENS)
def test_cached_decoding_token_by_token_is_one_full_pass(endless, name):
    prompt, edit = PROMPTS[2], EDITS[name]
    assert edit is not None
    with endless.steering.applied([edit]), watched(endless) as seen:
        made = generate(endless, [prompt], GREEDY)[0]
    text = prompt + made[:-1]
    full = slow_logits(endless, text, edit.as_moves(), len(prompt))[len(prompt) - 1 :]
    assert_exact(torch.cat(seen), full)
    assert full.argmax(-1).tolist() == made
    assert_exact(fast_logits(endless, text, edit.as_moves(), len(prompt))[len(prompt) - 1 :], full)


@pytest.mark.parametrize("parts", [(3, 3, 3), (1, 8), (8, 1), (5, 6, 7)])
@pytest.mark.parametrize("name", ["first", "ramp", "below"])
def test_a_prompt_read_in_parts_is_one_read_at_once(endless, name, parts):
    text, edit = [*PROMPTS[2], 30, 31, 32, 40, 41, 42, 43, 44, 45][: sum(parts)], EDITS[name]
    assert edit is not None
    prompt, cache, out, at = 7, growing_cache(endless.hf.config), [], 0
    with torch.inference_mode(), endless.steering.lock, endless.steering.applied([edit]):
        for n in parts:
            index = torch.arange(at, at + n)[None] - (prompt - 1)
            with endless.steering.passing(ForwardContext(index=index)):
                ids = torch.tensor([text[at : at + n]])
                out.append(endless.hf(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
            at += n
    assert_exact(torch.cat(out), slow_logits(endless, text, edit.as_moves(), prompt))


def test_a_batch_with_an_edit_a_row_is_each_text_alone_padding_included(endless):
    rows = [(p, e) for p in PROMPTS for e in EDITS.values()]
    prompts = [p for p, _ in rows]
    with endless.steering.applied([e for _, e in rows]), watched(endless) as seen:
        together = generate(endless, prompts, GREEDY)
    logits = torch.stack(seen, 1)
    for i, (prompt, edit) in enumerate(rows):
        moves = edit.as_moves() if edit else ()
        text = prompt + together[i][:-1]
        assert_exact(logits[i], slow_logits(endless, text, moves, len(prompt))[len(prompt) - 1 :])


def test_a_row_without_an_edit_is_bit_identical_to_no_steering(endless):
    ids = torch.tensor([PROMPTS[0]] * (len(EDITS) + 1))
    index = torch.arange(5)[None].expand(len(ids), 5) - 1
    with torch.inference_mode():
        plain = endless.hf(input_ids=ids).logits
        with endless.steering.applied([*EDITS.values(), None]), endless.steering.passing(ForwardContext(index=index)):
            steered = endless.hf(input_ids=ids).logits
    same = [torch.equal(a, b) for a, b in zip(plain, steered, strict=True)]
    assert same == [True, *[False] * len(WHENS), True]


def test_rows_that_leave_the_batch_change_no_other(endless):
    rows = [(p, e) for p in PROMPTS[:3] for e in EDITS.values()]
    prompts = [p for p, _ in rows]
    with endless.steering.applied([e for _, e in rows]):
        whole = generate(endless, prompts, GREEDY)
        # An end token that some rows come to and some do not, at different steps.
        where = {t: {r.index(t) for r in whole if t in r} for t in range(97)}
        end = max(where, key=lambda t: len(where[t]) * any(t not in r for r in whole))
        assert len(where[end]) > 1
        endless.end_token_ids = frozenset([end])
        try:
            cut = generate(endless, prompts, GREEDY)
        finally:
            endless.end_token_ids = frozenset()
    assert cut == [r[: r.index(end)] if end in r else r for r in whole]


@torch.inference_mode()
def test_several_texts_packed_into_one_are_each_alone(endless):
    texts = [PROMPTS[2], PROMPTS[0] + [40, 41, 42], [1, 4, 30], PROMPTS[1] + [9] * 6, PROMPTS[0], [1, 7] * 4]
    prompts, names = [9, 5, 3, 4, 5, 8], ["ramp", "first", "below", "after", "above", "reply"]
    rows = [EDITS[n] for n in reversed(names)]
    row = torch.cat([torch.full((len(t),), len(names) - 1 - i) for i, t in enumerate(texts)])
    of = torch.cat([torch.full((len(t),), i) for i, t in enumerate(texts)])
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    index = positions - (torch.tensor(prompts)[of] - 1)
    seen = (of[:, None] == of[None]) & (positions[:, None] >= positions[None])
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
    ids = torch.tensor([[t for text in texts for t in text]])
    with endless.steering.applied(rows):
        passing = ForwardContext(row=row, index=index[None], packed=True)
        with endless.steering.passing(passing):
            packed = endless.hf(input_ids=ids, position_ids=positions[None], attention_mask=mask).logits[0]
    for i, text in enumerate(texts):
        edit = EDITS[names[i]]
        assert edit is not None
        assert_exact(packed[of == i], slow_logits(endless, text, edit.as_moves(), prompts[i]))


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_transformers_own_generate_writes_the_same_tokens(endless, name):
    edit = EDITS[name]
    with endless.steering.applied([edit]):
        ours = generate(endless, PROMPTS[:3], GREEDY)
        alone = [_theirs(endless, [p])[0] for p in PROMPTS[:3]]
        assert alone == ours
        assert _theirs(endless, PROMPTS[:3]) == ours
        assert _theirs(endless, PROMPTS[:1]) == ours[:1]  # the clock begins anew with every text
    assert hooks_on(endless) == 0


def _theirs(model: SteeredModel, prompts: list[list[int]]) -> list[list[int]]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.hf.generate(
        ids, attention_mask=mask, max_new_tokens=GREEDY.max_new_tokens, do_sample=False, pad_token_id=0
    )
    return out[:, width:].tolist()


def test_rows_of_their_own_in_transformers_generate(endless):
    each = [EDITS["ramp"], None, EDITS["below"]]
    with endless.steering.applied(each):
        assert _theirs(endless, PROMPTS[:3]) == generate(endless, PROMPTS[:3], GREEDY)


# While a reply is written


def test_a_slider_moved_in_mid_stream_acts_on_the_next_token_and_on_none_before(endless):
    prompt, at = PROMPTS[2], 5
    before, after = EDITS["ramp"], EDITS["below"]
    assert before is not None
    assert after is not None
    endless.steering.set([before])
    with watched(endless) as seen:
        steps = decode(endless, [prompt], GREEDY)
        made = [next(steps).tokens[0] for _ in range(at)]
        endless.steering.set([after])
        made += [s.tokens[0] for s in steps]
    endless.steering.set([None])
    read = len(prompt) + at - 1  # tokens that had been read by then
    slow = Slow(endless, lambda t: (before if t < read else after).as_moves(), len(prompt))
    logits = slow.logits(prompt + made[:-1])[len(prompt) - 1 :]
    assert_exact(torch.cat(seen), logits)
    assert logits.argmax(-1).tolist() == made
    still = slow_logits(endless, prompt + made[:-1], before.as_moves(), len(prompt))[len(prompt) - 1 :]
    assert torch.equal(logits[:at], still[:at])
    assert float((logits[at] - still[at]).abs().max()) > 0.01


def test_changing_what_is_timed_registers_no_hook_and_ends_with_none(model, moral):
    model.steering.set([Edit.of([Intervention(moral, "clamp", 0.1, Schedule(first=3))])])
    hooks = hooks_on(model)
    assert hooks == model.steering.hook_count == 2  # the block, and the clock
    for amount in (0.2, 0.3):
        model.steering.set([Edit.of([Intervention(moral, "clamp", amount, Schedule(after=2))])])
        assert hooks_on(model) == hooks
    model.steering.set([None])
    assert hooks_on(model) == model.steering.hook_count == 0


def test_after_an_exception_in_a_timed_pass_no_hook_is_left_and_nothing_is_remembered(model, moral):
    edit = Edit.of([Intervention(moral, "clamp", 0.1, Schedule("reply", gate=Gate(moral, above=-9.0)))])
    plain = model.hf(input_ids=torch.tensor([PROMPTS[0]])).logits
    told = ForwardContext(index=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(IndexError), model.steering.applied([edit]), model.steering.passing(told):
        model.hf(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(IndexError), model.steering.applied([edit]):
        model.hf(input_ids=torch.tensor([[10**6]]))
    assert hooks_on(model) == 0
    assert model.steering.text is not told
    assert torch.equal(model.hf(input_ids=torch.tensor([PROMPTS[0]])).logits, plain)
    assert model.steering.lock.acquire(blocking=False)
    model.steering.lock.release()

"""When a slider acts: its values, and that positions are absolute whatever the cache, the batch or the packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slow_steering import (
    EXACT,
    Slow,
    close_directions,
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
from steer.core.slider import Slider
from steer.errors import MismatchError
from steer.model.decode import decode, generate
from steer.model.kv_cache import growing_cache
from steer.model.steered import SteeredModel
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
            Slider(D[0], "add", -1.0, when),
            Slider(D[2], "clamp", 0.5, when),
            Slider(D[3], "cap", -0.1, when),
            Slider(LATE, "scale", 2.0, when),
            Slider(F, "clamp", 0.8, when),
            Slider(D[1], "ablate", 0.6, ablation),
        ]
    )
    assert made is not None
    return made


EDITS = {"none": None} | {name: edit(name) for name in WHENS}


def assert_exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_a_gate_of_another_width_changes_nothing(model, moral):
    wide = Schedule(gate=Gate(Direction("wide", 0, torch.ones(64)), above=0.0))
    with pytest.raises(MismatchError, match=r"'wide' has width 64.*width 32"):
        model.steering.set([Edit(moves=(Slider(moral, "add", 1.0, wide),))])
    assert hooks_on(model) == 0


def test_an_add_over_the_reply_moves_the_pass_that_writes_its_first_token_and_none_before(exact_endless):
    prompt = PROMPTS[2]
    plain = fast_logits(exact_endless, prompt, [], len(prompt))
    moved = fast_logits(exact_endless, prompt, [Slider(D[0], "add", 2.0, Schedule("reply"))], len(prompt))
    assert torch.equal(moved[:-1], plain[:-1])
    assert_exact(moved, slow_logits(exact_endless, prompt, [Slider(D[0], "add", 2.0, Schedule("reply"))], len(prompt)))
    assert float((moved[-1] - plain[-1]).abs().max()) > 0.01
    # From the second reply token on: the first is written as if nothing were there.
    later = [Slider(D[0], "add", 2.0, Schedule(after=1))]
    assert torch.equal(fast_logits(exact_endless, prompt, later, len(prompt)), plain)
    text = [*prompt, 40]
    assert not torch.equal(
        fast_logits(exact_endless, text, later, len(prompt))[-1], fast_logits(exact_endless, text, [], len(prompt))[-1]
    )


@pytest.mark.parametrize("name", WHENS)
def test_cached_decoding_token_by_token_is_one_full_pass(exact_endless, name):
    prompt, edit = PROMPTS[2], EDITS[name]
    assert edit is not None
    with exact_endless.steering.applied([edit]), watched(exact_endless) as seen:
        made = generate(exact_endless, [prompt], GREEDY)[0]
    text = prompt + made[:-1]
    full = slow_logits(exact_endless, text, edit.as_moves(), len(prompt))[len(prompt) - 1 :]
    assert_exact(torch.cat(seen), full)
    assert full.argmax(-1).tolist() == made
    assert_exact(fast_logits(exact_endless, text, edit.as_moves(), len(prompt))[len(prompt) - 1 :], full)


@pytest.mark.parametrize("parts", [(3, 3, 3), (1, 8), (8, 1), (5, 6, 7)])
@pytest.mark.parametrize("name", ["first", "ramp", "below"])
def test_a_prompt_read_in_parts_is_one_read_at_once(exact_endless, name, parts):
    text, edit = [*PROMPTS[2], 30, 31, 32, 40, 41, 42, 43, 44, 45][: sum(parts)], EDITS[name]
    assert edit is not None
    prompt, cache, out, at = 7, growing_cache(exact_endless.hf.config), [], 0
    with torch.inference_mode(), exact_endless.steering.lock, exact_endless.steering.applied([edit]):
        for n in parts:
            index = torch.arange(at, at + n)[None] - (prompt - 1)
            with exact_endless.steering.passing(ForwardContext(index=index)):
                ids = torch.tensor([text[at : at + n]])
                out.append(exact_endless.hf(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
            at += n
    assert_exact(torch.cat(out), slow_logits(exact_endless, text, edit.as_moves(), prompt))


def test_a_batch_with_an_edit_a_row_is_each_text_alone_padding_included(exact_endless):
    rows = [(p, e) for p in PROMPTS for e in EDITS.values()]
    prompts = [p for p, _ in rows]
    with exact_endless.steering.applied([e for _, e in rows]), watched(exact_endless) as seen:
        together = generate(exact_endless, prompts, GREEDY)
    logits = torch.stack(seen, 1)
    for i, (prompt, edit) in enumerate(rows):
        moves = edit.as_moves() if edit else ()
        text = prompt + together[i][:-1]
        assert_exact(logits[i], slow_logits(exact_endless, text, moves, len(prompt))[len(prompt) - 1 :])


def test_a_row_without_an_edit_is_bit_identical_to_no_steering(exact_endless):
    ids = torch.tensor([PROMPTS[0]] * (len(EDITS) + 1))
    index = torch.arange(5)[None].expand(len(ids), 5) - 1
    with torch.inference_mode():
        plain = exact_endless.hf(input_ids=ids).logits
        with (
            exact_endless.steering.applied([*EDITS.values(), None]),
            exact_endless.steering.passing(ForwardContext(index=index)),
        ):
            steered = exact_endless.hf(input_ids=ids).logits
    same = [torch.equal(a, b) for a, b in zip(plain, steered, strict=True)]
    assert same == [True, *[False] * len(WHENS), True]


def test_rows_that_leave_the_batch_change_no_other(exact_endless):
    rows = [(p, e) for p in PROMPTS[:3] for e in EDITS.values()]
    prompts = [p for p, _ in rows]
    with exact_endless.steering.applied([e for _, e in rows]):
        whole = generate(exact_endless, prompts, GREEDY)
        # An end token that some rows come to and some do not, at different steps.
        where = {t: {r.index(t) for r in whole if t in r} for t in range(97)}
        end = max(where, key=lambda t: len(where[t]) * any(t not in r for r in whole))
        assert len(where[end]) > 1
        exact_endless.end_token_ids = frozenset([end])
        try:
            cut = generate(exact_endless, prompts, GREEDY)
        finally:
            exact_endless.end_token_ids = frozenset()
    assert cut == [r[: r.index(end)] if end in r else r for r in whole]


@torch.inference_mode()
def test_several_texts_packed_into_one_are_each_alone(exact_endless):
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
    with exact_endless.steering.applied(rows):
        passing = ForwardContext(row=row, index=index[None], packed=True)
        with exact_endless.steering.passing(passing):
            packed = exact_endless.hf(input_ids=ids, position_ids=positions[None], attention_mask=mask).logits[0]
    for i, text in enumerate(texts):
        edit = EDITS[names[i]]
        assert edit is not None
        assert_exact(packed[of == i], slow_logits(exact_endless, text, edit.as_moves(), prompts[i]))


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_transformers_own_generate_writes_the_same_tokens(exact_endless, name):
    edit = EDITS[name]
    with exact_endless.steering.applied([edit]):
        ours = generate(exact_endless, PROMPTS[:3], GREEDY)
        alone = [_theirs(exact_endless, [p])[0] for p in PROMPTS[:3]]
        assert alone == ours
        assert _theirs(exact_endless, PROMPTS[:3]) == ours
        assert _theirs(exact_endless, PROMPTS[:1]) == ours[:1]  # the clock begins anew with every text
    assert hooks_on(exact_endless) == 0


def _theirs(model: SteeredModel, prompts: list[list[int]]) -> list[list[int]]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.hf.generate(
        ids, attention_mask=mask, max_new_tokens=GREEDY.max_new_tokens, do_sample=False, pad_token_id=0
    )
    return out[:, width:].tolist()


def test_rows_of_their_own_in_transformers_generate(exact_endless):
    each = [EDITS["ramp"], None, EDITS["below"]]
    with exact_endless.steering.applied(each):
        assert _theirs(exact_endless, PROMPTS[:3]) == generate(exact_endless, PROMPTS[:3], GREEDY)


# While a reply is written


def test_a_slider_moved_in_mid_stream_acts_on_the_next_token_and_on_none_before(exact_endless):
    prompt, at = PROMPTS[2], 5
    before, after = EDITS["ramp"], EDITS["below"]
    assert before is not None
    assert after is not None
    exact_endless.steering.set([before])
    with watched(exact_endless) as seen:
        steps = decode(exact_endless, [prompt], GREEDY)
        made = [next(steps).tokens[0] for _ in range(at)]
        exact_endless.steering.set([after])
        made += [s.tokens[0] for s in steps]
    exact_endless.steering.set([None])
    read = len(prompt) + at - 1  # tokens that had been read by then
    slow = Slow(exact_endless, lambda t: (before if t < read else after).as_moves(), len(prompt))
    logits = slow.logits(prompt + made[:-1])[len(prompt) - 1 :]
    assert_exact(torch.cat(seen), logits)
    assert logits.argmax(-1).tolist() == made
    still = slow_logits(exact_endless, prompt + made[:-1], before.as_moves(), len(prompt))[len(prompt) - 1 :]
    assert torch.equal(logits[:at], still[:at])
    assert float((logits[at] - still[at]).abs().max()) > 0.01


def test_changing_what_is_timed_registers_no_hook_and_ends_with_none(model, moral):
    model.steering.set([Edit.of([Slider(moral, "clamp", 0.1, Schedule(first=3))])])
    hooks = hooks_on(model)
    assert hooks == 2  # the block, and the clock
    for amount in (0.2, 0.3):
        model.steering.set([Edit.of([Slider(moral, "clamp", amount, Schedule(after=2))])])
        assert hooks_on(model) == hooks
    model.steering.set([None])
    assert hooks_on(model) == 0


def test_after_an_exception_in_a_timed_pass_no_hook_is_left_and_nothing_is_remembered(model, moral):
    edit = Edit.of([Slider(moral, "clamp", 0.1, Schedule("reply", gate=Gate(moral, above=-9.0)))])
    plain = model.hf(input_ids=torch.tensor([PROMPTS[0]])).logits
    context = ForwardContext(index=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(IndexError), model.steering.applied([edit]), model.steering.passing(context):
        model.hf(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(IndexError), model.steering.applied([edit]):
        model.hf(input_ids=torch.tensor([[10**6]]))
    assert hooks_on(model) == 0
    assert model.steering.text is not context
    assert torch.equal(model.hf(input_ids=torch.tensor([PROMPTS[0]])).logits, plain)
    assert model.steering.lock.acquire(blocking=False)
    model.steering.lock.release()

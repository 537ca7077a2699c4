"""Decoding: the cache, the batch, the random streams and the sliders do not get in each other's way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat

from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.model import steered
from steer.model.decode import decode, generate
from steer.model.steered import load

GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
DRAWN = Sampler(max_new_tokens=14, temperature=1.0, min_p=0.02, repetition_penalty=1.3, seed=3)
ROUNDING = 3e-6  # transformers computes norms and softmax in fp32, whatever the weights are
PROMPTS = [[1, 4, 20, 33, 5], [1, 4, 71, 5], [1, 3, 9, 8, 7, 6, 4, 50, 5]]


@pytest.fixture
def edits(moral, make_direction) -> dict[str, Edit | None]:
    other = make_direction("other", site=2, seed=8)
    return {
        "none": None,
        "add": Edit(add=((moral, 1.5), (other, -1.0))),
        "ablate": Edit((moral,)),
        "some blocks": Edit((moral, other), 0.6, (1, 2), ((other, 0.5),)),
    }


@pytest.mark.parametrize("kind", ["none", "add", "ablate", "some blocks"])
def test_cached_decoding_is_the_full_forward(endless, edits, kind):
    prompt = PROMPTS[0]
    with torch.inference_mode(), endless.edited(edits[kind]) if edits[kind] else endless.record([]):
        with endless.record() as cached:
            made = generate(endless, [prompt], GREEDY)[0]
        with endless.record() as full:
            logits = endless.hf(input_ids=torch.tensor([prompt + made])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made
    for site in range(3):
        passes = cached.passes(site)
        assert [h.shape[1] for h in passes] == [len(prompt)] + [1] * (len(made) - 1)
        torch.testing.assert_close(torch.cat(passes, 1), full[site][:, :-1], rtol=0, atol=ROUNDING)
    by_cache = endless.hf.lm_head(endless.hf.model.norm(cached.passes(2)[-1]))[0, -1]
    torch.testing.assert_close(by_cache, logits[-2], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sampler", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_with_an_edit_a_row_is_each_row_alone(endless, edits, sampler):
    rows = [(p, e) for p in PROMPTS for e in edits.values()]
    prompts, keys = [p for p, _ in rows], list(range(len(rows)))
    with endless.steering.applied([e for _, e in rows]):
        together = generate(endless, prompts, sampler, keys)
    for key, (prompt, edit) in enumerate(rows):
        with endless.steering.applied([edit]):
            assert generate(endless, [prompt], sampler, [key])[0] == together[key]
    assert len({tuple(r) for r in together}) > len(PROMPTS)


def test_rows_that_end_early_leave_the_batch_and_change_no_other(endless, edits):
    rows = [(p, e) for p in PROMPTS for e in edits.values()]
    prompts, each = [p for p, _ in rows], [e for _, e in rows]
    with endless.steering.applied(each):
        whole = generate(endless, prompts, DRAWN)
    # An end token that some rows come to, at different steps, and some do not.
    where = {t: {r.index(t) for r in whole if t in r} for t in range(97)}
    end = max(where, key=lambda t: len(where[t]) * any(t not in r for r in whole))
    assert len(where[end]) > 1
    endless.end_token_ids = frozenset([end])
    with endless.steering.applied(each):
        steps = list(decode(endless, prompts, DRAWN))
        cut = generate(endless, prompts, DRAWN)
    assert cut == [r[: r.index(end)] if end in r else r for r in whole]
    sizes = [len(s.rows) for s in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_the_same_key_and_prompt_give_the_same_reply_whatever_the_batch(endless):
    alone = generate(endless, [PROMPTS[0]], DRAWN, [7])[0]
    assert generate(endless, [*PROMPTS, PROMPTS[0]], DRAWN, [1, 2, 3, 7])[-1] == alone
    twins = generate(endless, [PROMPTS[0]] * 3, DRAWN, [7, 7, 8])
    assert twins[0] == twins[1] == alone != twins[2]
    assert generate(endless, [PROMPTS[0]], replace(DRAWN, seed=4), [7])[0] != alone


def test_replies_come_in_the_order_asked_for_whatever_the_batches(model64, moral, monkeypatch):
    chats = [[{"role": "user", "content": " ".join(["lie"] * n)}] for n in (5, 1, 3, 2)]
    edits = [Edit(add=((moral, a),)) for a in (-2.0, 0.5, 1.0, 2.0)]
    whole = model64.replies(chats, DRAWN, edits)
    assert model64.replies(chats, DRAWN, edits, batch=2) == whole
    config = model64.hf.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
    assert model64.token_bytes == a_token
    passes = []
    count = model64.hf.model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(steered, "CACHE_BYTES", a_token)  # less than one reply takes: one chat at a time
    monkeypatch.setattr(steered, "CACHE_SHARE", 0)
    assert model64.replies(chats, DRAWN, edits) == whole
    count.remove()
    assert len(passes) >= sum(map(len, whole))
    for i, chat in enumerate(chats):
        assert model64.replies([chat], DRAWN, [edits[i]], keys=[i])[0] == whole[i]
    assert hooks_on(model64) == 0


def test_a_slider_moved_in_mid_stream_changes_the_next_token_and_no_earlier_one(model, moral):
    model.end_token_ids = frozenset()
    sampling = {"temperature": 0.0, "max_new_tokens": 10}
    plain = list(model.stream("hello lie", **sampling))
    assert len(plain) == 10
    model.sliders.put(moral)
    # An amount that changes the token right after the move, found by trying: greedy choices have margins.
    for amount in (-8.0, -4.0, 4.0, 8.0):
        model.sliders.reset()
        pieces = model.stream("hello lie", **sampling)
        moved = [next(pieces) for _ in range(4)]
        model.sliders["moral"] = amount
        moved += list(pieces)
        assert moved[:4] == plain[:4]
        if moved[4] != plain[4]:
            break
    else:
        pytest.fail("no amount changed the next token")
    model.sliders.reset()
    assert list(model.stream("hello lie", **sampling)) == plain


def test_an_abandoned_stream_disturbs_no_batch_that_is_being_written(endless, edits):
    each, ending = list(edits.values())[:3], replace(DRAWN, max_new_tokens=40)
    endless.end_token_ids = frozenset(range(60, 70))
    single = decode(endless, PROMPTS[:1], DRAWN)
    next(single)
    with endless.steering.applied(each):
        quiet = [s.tokens for s in decode(endless, PROMPTS, ending)]
        batch = decode(endless, PROMPTS, ending)
        steps = []
        for step in batch:
            steps.append(step.tokens)
            if len(step.rows) < 3:
                single.close()
    assert len(steps[-1]) < 3
    assert steps == quiet


def test_the_repetition_penalty_sees_no_padding(endless):
    # Rows are filled up with token 0, which is the likeliest here: were padding penalised, the padded row would differ.
    prompt = PROMPTS[1]
    logits = endless.hf(input_ids=torch.tensor([prompt])).logits[0, -1].detach()
    likelier = ((0, float(logits.max() - logits[0]) + 0.5),)
    sampler = replace(GREEDY, max_new_tokens=1, repetition_penalty=5.0, logit_bias=likelier)
    assert generate(endless, [prompt], sampler)[0] == [0]
    assert generate(endless, [prompt, PROMPTS[2]], sampler)[0] == [0]


def test_pieces_are_whole_characters_and_add_up_to_the_reply(tiny_llama, tmp_path):
    model = load(save_tiny_chat(tiny_llama, tmp_path / "bytes", by_bytes=True))
    model.end_token_ids = frozenset()
    chat = [{"role": "user", "content": "où, ça?"}]
    sampler = Sampler(max_new_tokens=80, temperature=1.5)
    made = model.replies([chat], sampler)[0]
    pieces = list(model.stream(chat, **sampler.__dict__))
    assert "".join(pieces) == model.text(made)
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])


def test_after_an_exception_in_mid_stream_no_hook_is_left(model, moral):
    model.end_token_ids = frozenset()
    pieces = model.stream("hello", max_new_tokens=5)
    with pytest.raises(ZeroDivisionError), model.steered({moral: 1.0}):
        next(pieces).index("") / 0
    assert hooks_on(model) == 0
    assert model.steering.lock.acquire(blocking=False)
    model.steering.lock.release()

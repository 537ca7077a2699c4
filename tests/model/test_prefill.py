"""Texts that begin alike are read once, and the model knows no difference."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache

from steer.core.edit import Edit
from steer.core.method import Kernel, Strengths
from steer.core.sampler import Sampler
from steer.model import decode
from steer.model import prefill as prefill_module
from steer.model.decode import generate
from steer.model.forward import hidden_states
from steer.model.kv_cache import select_rows
from steer.model.prefill import Beginning, prefill
from steer.model.steered import SteeredModel

SYSTEM, OTHER = [1, 3, 9, 8, 7, 6, 12, 13], [1, 3, 20, 21, 22, 23, 24]
TEXTS = [
    [*SYSTEM, 4, 50, 5],
    [*SYSTEM, 4, 51, 52, 53, 5],
    [*SYSTEM, 4, 51, 54, 5],
    [*OTHER, 4, 60, 61, 5],
    [*OTHER, 4, 62, 5],
    [1, 4, 71, 5],
]
DRAWN = Sampler(max_new_tokens=14, temperature=1.0, top_k=40, repetition_penalty=1.3, seed=3)


@pytest.fixture
def edits(moral, make_direction) -> list[Edit | None]:
    return [
        None,
        Edit(add=((moral, 1.5),)),
        Edit((moral,)),
        Edit(add=((make_direction("other", site=2, seed=8), -1.0),)),
    ]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the decoder is given, filling included."""
    counts: list[int] = []
    whole = prefill_module.decoder_pass

    def counted(model, ids, *rest):
        counts.append(ids.numel())
        return whole(model, ids, *rest)

    monkeypatch.setattr(prefill_module, "decoder_pass", counted)
    monkeypatch.setattr(prefill_module, "PASS", 0)  # the texts are short
    return counts


def test_what_is_read_in_parts_is_what_is_read_whole(model64: SteeredModel, edits, fed):
    rows = [(t, e) for e in range(len(edits)) for t in TEXTS]
    prompts = [max(1, len(t) - 2) for t, _ in rows]
    with model64.steering.applied(edits):
        read = prefill(model64, [t for t, _ in rows], prompts=prompts, which=[e for _, e in rows])
    assert sum(fed) < 0.75 * sum(len(t) for t, _ in rows)
    assert read.mask.sum(1).tolist() == [len(t) for t, _ in rows]
    for i, (text, e) in enumerate(rows):
        with model64.steering.applied([edits[e]]), torch.inference_mode():
            whole = hidden_states(model64, torch.tensor([text]))[0, prompts[i] - 1 :]
        torch.testing.assert_close(read.hidden[i, -len(whole) :], whole, rtol=0, atol=3e-6)


def test_an_edited_embedding_is_seen_though_the_first_blocks_are_not_edited(model64: SteeredModel, moral):
    late = Kernel(peak=2, width=1)
    edits = [
        None,
        Edit((moral,), strengths=Strengths(late, late, 1.0)),
        Edit((moral,), strengths=Strengths(late, late)),
    ]
    for applied, untouched in ((edits, 0), (edits[::2], 2)):
        rows = [(t, e) for e in range(len(applied)) for t in TEXTS]
        with model64.steering.applied(applied):
            assert model64.steering.untouched_blocks == untouched
            read = prefill(model64, [t for t, _ in rows], prompts=[2] * len(rows), which=[e for _, e in rows])
        for i, (text, e) in enumerate(rows):
            with model64.steering.applied([applied[e]]), torch.inference_mode():
                whole = hidden_states(model64, torch.tensor([text]))[0, 1:]
            torch.testing.assert_close(read.hidden[i, -len(whole) :], whole, rtol=0, atol=3e-6)


def test_texts_with_nothing_in_common_are_read_in_one_pass(model64: SteeredModel, fed):
    texts = [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]]
    prefill(model64, texts, prompts=[4, 4, 4])
    assert fed == [12]


def test_a_story_its_questions_and_their_answers_are_each_read_once(model64: SteeredModel, fed):
    story, questions = [1, *range(10, 40)], [[40 + q, *range(50, 60)] for q in range(3)]
    texts = [[*story, *question, 70 + answer, 75] for question in questions for answer in range(4)]
    asked = len(story) + len(questions[0])
    read = prefill(model64, texts, prompts=[asked] * len(texts))
    # The last token of each question is read with each answer: its output predicts the answer's first token.
    assert sum(fed) == len(story) + 3 * (len(questions[0]) - 1) + 3 * len(texts)
    for text, hidden in zip(texts, read.hidden, strict=True):
        whole = hidden_states(model64, torch.tensor([text]))[0, asked - 1 :]
        torch.testing.assert_close(hidden, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", range(4))
def test_a_beginning_read_before_is_not_read_again_by_any_batch(model64: SteeredModel, edits, fed, number):
    talk = [1, *range(10, 40)]
    stories = [[*talk, 40 + s, *range(50, 50 + 3 * s)] for s in range(4)]
    texts = [[*story, 4, 70 + answer, *[75] * answer] for story in stories for answer in range(3)]
    starts = [len(story) + 1 for story in stories for _ in range(3)]
    batches = [range(6), range(6, 11), range(11, 12)]
    with model64.steering.applied([edits[number]]), torch.inference_mode():
        begun = Beginning.of(model64, [t[:start] for t, start in zip(texts, starts, strict=True)])
        assert begun is not None
        assert begun.ids == tuple(talk)
        assert fed == [len(talk)]
        fed.clear()
        for batch in batches:
            asked = {"prompts": [starts[i] for i in batch], "begun": begun}
            read = prefill(model64, [texts[i] for i in batch], **asked)
            for i, hidden in zip(batch, read.hidden, strict=True):
                whole = hidden_states(model64, torch.tensor([texts[i]]))[0, starts[i] - 1 :]
                torch.testing.assert_close(hidden[-len(whole) :], whole, rtol=1e-9, atol=1e-9)
    assert sum(fed) < sum(len(t) - len(talk) for t in texts) + len(batches) * len(talk) / 2
    assert Beginning.of(model64, [[7, 8], [9, 8]]) is None


def test_replies_are_the_same_whether_or_not_their_beginnings_are_shared(model64: SteeredModel, edits, fed):
    rows = [(text, e, key) for e in range(len(edits)) for key, text in enumerate(TEXTS * 2)]
    prompts, which, keys = map(list, zip(*rows, strict=True))
    model64.end_token_ids = frozenset(range(30, 40))  # so that rows leave the batch at different steps
    with model64.steering.applied(edits):
        shared = generate(model64, prompts, DRAWN, keys, which=which)
        read = sum(fed)
        fed.clear()
        assert [generate(model64, [t], DRAWN, [key], which=[e])[0] for t, e, key in rows] == shared
    assert read < 0.8 * sum(fed)
    assert len({len(r) for r in shared}) > 3
    assert DRAWN.max_new_tokens in {len(r) for r in shared}


def test_residuals_summed_while_replies_are_written_are_those_of_a_second_pass(model64: SteeredModel):
    model64.end_token_ids = frozenset()
    # An end token that some rows come to.
    model64.end_token_ids = frozenset([generate(model64, TEXTS, DRAWN)[0][4]])
    sums = torch.zeros(model64.anatomy.blocks, len(TEXTS), model64.anatomy.width)
    made = generate(model64, TEXTS, DRAWN, sums=sums)
    assert {len(m) < DRAWN.max_new_tokens for m in made} == {True, False}
    for i, (text, reply) in enumerate(zip(TEXTS, made, strict=True)):
        with torch.inference_mode(), model64.record() as recording:
            hidden_states(model64, torch.tensor([[*text, *reply]]))
        for site in range(model64.anatomy.blocks):
            expected = recording[site][0, len(text) :].sum(0).float()
            torch.testing.assert_close(sums[site, i], expected, rtol=1e-5, atol=1e-4)


def test_rows_that_leave_move_as_few_others_as_they_are(model: SteeredModel, monkeypatch):
    kept: list[list[int]] = []

    def select(cache: Cache, rows: torch.Tensor, ahead: int | None = None) -> None:
        if ahead is None:  # else the rows of one prompt, which it reads once
            kept.append(rows.tolist())
        select_rows(cache, rows, ahead)

    monkeypatch.setattr(decode, "select_rows", select)
    model.end_token_ids = frozenset(range(30, 40))
    generate(model, TEXTS * 8, DRAWN)
    assert any(rows != sorted(rows) for rows in kept)
    for rows in kept:  # a row stays in its place, or takes that of one that leaves
        assert all(row == place or row >= len(rows) for place, row in enumerate(rows))

"""Receipts: on how many tokens every slider acted and how far, and a warning where one never did."""

from __future__ import annotations

import math
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch
from slow_steering import Slow, close_directions, make_dictionary

from steer.chat.session import Session
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.sampler import Sampler
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.model.decode import decode
from steer.model.steered import SteeredModel
from steer.model.steering.low_rank import ForwardContext, LowRankEdit
from steer.model.steering.receipts import Receipt, Tally

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")
PROMPTS = [[1, 4, 20, 33, 5], [1, 4, 71, 5], [1, 3, 9, 8, 7, 6, 4, 50, 5]]
GREEDY = Sampler(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
D = close_directions()
LATE = replace(close_directions(site=2, n=1, seed=8)[0], name="late")
F = Feature("f", make_dictionary(), (3, 9, 21), (2.0, 1.0, 0.5))
G = Feature("g", make_dictionary("topk", seed=5), (1, 2, 3), (1.0, 1.0, 2.0))
MOVES = {
    "add": [Slider(D[0], "add", -1.0)],
    "add a feature": [Slider(F, "add", -0.7)],
    "add at times": [Slider(F, "add", 0.5, Schedule(ramp=5)), Slider(D[0], "add", 1.0, Schedule(first=3))],
    "ablate": [Slider(D[0], "ablate", 1.0), Slider(D[1], "ablate", 1.0), Slider(LATE, "ablate", 1.0)],
    "ablate at times": [Slider(D[0], "ablate", 0.4, Schedule(after=2)), Slider(LATE, "ablate", 0.9)],
    "set": [
        Slider(D[0], "clamp", 0.5),
        Slider(D[1], "cap", -0.4),
        Slider(D[2], "scale", 3.0, Schedule("reply")),
    ],
    "features": [Slider(F, "clamp", 1.0), Slider(G, "scale", 2.0), Slider(LATE, "cap", 0.1)],
    "feature shares": [
        Slider(F, "cap", 0.2),
        Slider(G, "ablate", 0.5, Schedule(gate=Gate(D[1], above=-0.1))),
    ],
    "everything": [
        Slider(D[0], "add", 1.0),
        Slider(D[0], "clamp", 1.0, Schedule(ramp=3)),
        Slider(D[0], "ablate", 0.5),
        Slider(F, "clamp", 0.3, Schedule(first=5)),
        Slider(F, "scale", 0.0, Schedule(after=5)),
        Slider(LATE, "cap", 0.0, Schedule(gate=Gate(F, above=0.2))),
    ],
}


def written(model: SteeredModel, prompts: list[list[int]], edits: list[Edit | None], tally: Tally) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    with model.steering.applied(edits):
        for step in decode(model, prompts, GREEDY, tally=tally):
            for row, token in zip(step.rows, step.tokens, strict=True):
                out[row].append(token)
    return out


def wanted(model: SteeredModel, prompt: list[int], reply: list[int], moves: list[Slider]) -> dict[tuple, tuple]:
    """(name, operation, amount) -> (tokens, mean share), by the slow reference."""
    slow = Slow(model, lambda t: moves, len(prompt))
    slow.logits(prompt + reply[:-1])
    out = {}
    for m in moves:
        shares = list(slow.done.get(m, {}).values())
        out[m.name, m.operation, m.amount] = (len(shares), sum(shares) / len(shares) if shares else 0.0)
    return out


def figures(receipt: Receipt) -> dict[tuple, tuple]:
    out = {(s.name, s.operation, s.amount): (s.tokens, s.mean_share) for s in receipt.sliders}
    assert len(out) == len(receipt.sliders)
    return out


def approx(account: dict[tuple, tuple]) -> dict[tuple, tuple]:
    return {key: (n, pytest.approx(share, rel=1e-6)) for key, (n, share) in account.items()}


@pytest.mark.parametrize("name", MOVES)
def test_tokens_and_shares_are_those_of_the_definitions(exact_endless, name):
    tally, moves = Tally(), MOVES[name]
    reply = written(exact_endless, PROMPTS[:1], [Edit.of(moves)], tally)[0]
    receipt = tally.receipt()
    assert receipt.tokens == len(PROMPTS[0]) + len(reply) - 1
    account = wanted(exact_endless, PROMPTS[0], reply, moves)
    assert figures(receipt) == approx(account)
    assert any(n > 0 for n, _ in account.values())
    assert len(receipt.warnings) == sum(n == 0 for n, _ in account.values())


def test_every_text_of_a_batch_has_its_own_receipt_and_padding_counts_for_none(exact_endless):
    each = [None, *MOVES.values()]
    prompts = [PROMPTS[i % 3] for i in range(len(each))]
    tally = Tally()
    replies = written(exact_endless, prompts, [Edit.of(m) if m else None for m in each], tally)
    for i, moves in enumerate(each):
        receipt = tally.receipt(i)
        assert receipt.tokens == len(prompts[i]) + len(replies[i]) - 1
        assert figures(receipt) == approx(wanted(exact_endless, prompts[i], replies[i], moves or []))


def test_an_ablation_is_reported_once_whatever_writers_another_row_ablates(exact_endless, make_direction):
    everywhere = Edit((make_direction("one"),))
    somewhere = Edit((make_direction("one"),), 0.5, (1, 1))
    together, alone = Tally(), Tally()
    written(exact_endless, PROMPTS[:2], [everywhere, somewhere], together)
    written(exact_endless, PROMPTS[:1], [everywhere], alone)
    assert figures(together.receipt(0)) == approx(figures(alone.receipt(0)))
    assert together.receipt(0).sliders[0].tokens == together.receipt(0).tokens


def test_one_edit_for_a_whole_batch_is_reported_for_each_text(exact_endless):
    tally, moves = Tally(), MOVES["everything"]
    replies = written(exact_endless, PROMPTS, [Edit.of(moves)], tally)
    for i, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        assert figures(tally.receipt(i)) == approx(wanted(exact_endless, prompt, reply, moves))


@torch.inference_mode()
def test_texts_packed_into_one_have_their_own_receipts(exact_endless):
    texts, prompts = [PROMPTS[0] + [40, 41], PROMPTS[2], PROMPTS[1] + [9]], [5, 9, 4]
    names = ["everything", "add", "ablate"]
    rows = [Edit.of(MOVES[n]) for n in names]
    of = torch.cat([torch.full((len(t),), i) for i, t in enumerate(texts)])
    positions = torch.cat([torch.arange(len(t)) for t in texts])
    seen = (of[:, None] == of[None]) & (positions[:, None] >= positions[None])
    tally, starts = Tally(), [0, 7, 16, 21]
    parts = [(i + 10, i, slice(starts[i], starts[i + 1])) for i in range(3)]
    with exact_endless.steering.applied(rows):
        tally.begin(parts, rows)
        index = (positions - (torch.tensor(prompts)[of] - 1))[None]
        with exact_endless.steering.passing(ForwardContext(row=of, index=index, packed=True, tally=tally)):
            exact_endless.hf(
                input_ids=torch.tensor([[t for text in texts for t in text]]),
                position_ids=positions[None],
                attention_mask=torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)[None, None],
            )
    for i, text in enumerate(texts):
        receipt = tally.receipt(i + 10)
        assert receipt.tokens == len(text)
        reference = wanted(exact_endless, text[: prompts[i]], [*text[prompts[i] :], 0], MOVES[names[i]])
        assert figures(receipt) == approx(reference)


NEVER = {
    "a gate that never opens": Slider(D[0], "add", 1.0, Schedule(gate=Gate(D[1], above=1e6))),
    "a latent that never fires": Slider(Feature("f", make_dictionary(), (0,), (1e3,)), "cap", 5.0),
    "after a reply is over": Slider(D[0], "clamp", 1.0, Schedule(after=50)),
    "a cap that nothing reaches": Slider(D[0], "cap", 1e3),
    "a direction without a gap": Slider(Direction("flat", 1, D[0].vector, with_mean=0.0), "add", 3.0),
}


@pytest.mark.parametrize("why", NEVER)
def test_a_slider_that_never_fired_is_a_warning(exact_endless, why):
    move, tally = NEVER[why], Tally()
    written(exact_endless, PROMPTS[:1], [Edit.of([move, Slider(LATE, "add", 1.0)])], tally)
    receipt = tally.receipt()
    name, operation = move.name, move.operation
    assert receipt.warnings == [f"slider {name!r} ({operation} {move.amount:g}) never fired in this reply"]
    assert {s.name: s.tokens for s in receipt.sliders} == {name: 0, LATE.name: 16}
    assert receipt.describe()["warnings"] == receipt.warnings


def test_a_session_warns_of_a_slider_that_its_last_reply_never_met(model):
    model.end_token_ids = frozenset()
    session = Session(model, sampler=Sampler(max_new_tokens=4))
    session.sliders.put(Slider(D[0], "clamp", when=Schedule(after=9)), 0.1)
    list(session.reply("hello"))
    assert session.warnings() == ["slider 'd0' (clamp 0.1) never fired in this reply"]
    session.sampler = Sampler(max_new_tokens=12)
    list(session.reply("well"))
    assert session.warnings() == []
    assert [s.tokens for r in session.receipts for s in r.sliders] == [0, 3]


def test_sliders_on_one_direction_are_distinguished_by_name_and_by_what_they_do(exact_endless):
    tally = Tally()
    moves = [
        Slider(D[0], "add", 1.0),
        Slider(D[0], "add", 0.5, label="more"),
        Slider(D[0], "ablate", 0.5, label="less"),
        Slider(D[0], "clamp", 0.5),
        Slider(D[1], "clamp", 0.5, Schedule(first=3)),
        Slider(D[1], "clamp", 0.7, Schedule(after=3)),
    ]
    reply = written(exact_endless, PROMPTS[:1], [Edit.of(moves)], tally)[0]
    assert figures(tally.receipt()) == approx(wanted(exact_endless, PROMPTS[0], reply, moves))


def test_a_slider_that_moves_in_mid_reply_is_reported_by_its_last_amount_and_all_of_its_tokens(exact_endless):
    tally, amounts = Tally(), [0.5, 0.5, 1.0, 0.0, 2.0]
    exact_endless.steering.set([Edit.of([Slider(D[0], "add", amounts[0])])])
    steps = decode(exact_endless, PROMPTS[:1], GREEDY, tally=tally)
    for amount in amounts:
        exact_endless.steering.set([Edit.of([Slider(D[0], "add", amount), Slider(D[1], "clamp", amount)])])
        next(steps)
    exact_endless.steering.set([None])
    steps.close()
    (add, clamp) = tally.receipt().sliders
    assert (add.amount, add.tokens, clamp.amount, clamp.tokens) == (2.0, 5 + 1 + 1 + 1, 2.0, 9)
    unit = D[0].share(1.0)
    assert add.mean_share == pytest.approx(unit * (5 * 0.5 + 0.5 + 1.0 + 2.0) / 8)


class _Watched(Tally):
    """Counts the tensors that it is given, and knows which of them are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = 0
        self.alive: WeakSet[torch.Tensor] = WeakSet()

    def note(self, low_rank: LowRankEdit, change: torch.Tensor, context: ForwardContext, writes_to: int | None) -> None:
        self.noted += 1
        self.alive.add(change)
        super().note(low_rank, change, context, writes_to)


def test_many_passes_are_summed_up_on_the_way(exact_endless, monkeypatch):
    monkeypatch.setattr("steer.model.steering.receipts.PENDING", 3)
    tally, moves = _Watched(), MOVES["everything"]
    reply = written(exact_endless, PROMPTS[:1], [Edit.of(moves)], tally)[0]
    assert len(tally.alive) <= tally.noted / 6  # at most two of twelve passes
    first, again = tally.receipt(), tally.receipt()
    assert first == again
    assert figures(first) == approx(wanted(exact_endless, PROMPTS[0], reply, moves))


def test_a_share_of_an_unknown_norm_is_not_known(exact_endless):
    unknown = Feature("u", make_dictionary(norm=None), (3, 9), (1.0, 1.0))
    tally = Tally()
    written(
        exact_endless,
        PROMPTS[:1],
        [Edit.of([Slider(unknown, "clamp", 1.0), Slider(unknown, "add", 1.0)])],
        tally,
    )
    for slider in tally.receipt().sliders:
        assert slider.tokens > 0
        assert math.isnan(slider.mean_share)
    assert [s["mean_share"] for s in tally.receipt().describe()["sliders"]] == [None, None]


def test_nothing_applied_is_an_empty_receipt(exact_endless):
    tally = Tally()
    written(exact_endless, PROMPTS[:1], [None], tally)
    assert tally.receipt() == Receipt(16)
    assert Tally().receipt() == Receipt(0)

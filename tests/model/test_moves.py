"""Every operation, on directions and on features, against a slow reference that is worked out from the definitions."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from slow_steering import (
    EXACT,
    Slow,
    close_directions,
    compatible,
    exact,
    fast_logits,
    make_dictionary,
    slow_logits,
)
from tiny_chat import hooks_on

from steer.core.direction import Direction
from steer.core.edit import MAX_JOINT_DIRECTIONS, Edit
from steer.core.feature import Feature
from steer.core.schedule import ALWAYS, Gate, Schedule
from steer.core.slider import OPERATIONS, Slider
from steer.errors import UsageError
from steer.model.steered import SteeredModel, load
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.module_edits import module_edits

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")
TEXT, PROMPT = [1, 4, 20, 33, 9, 5, 61, 12, 47, 30, 8, 55, 24, 70], 6
AMOUNTS = {"add": -1.5, "ablate": 0.7, "clamp": 0.4, "cap": -0.3, "scale": 2.5}
DIRECTIONS = close_directions()
ONE, TOPK = make_dictionary(), make_dictionary("topk", seed=5)
FEATURES = [
    Feature("f0", ONE, (3, 9, 21), (2.0, 1.0, 0.5)),
    Feature("f1", ONE, (9, 30), (1.0, 3.0)),
    Feature("f2", TOPK, (1, 2, 3), (1.0, 1.0, 2.0)),
]
EARLIER = Direction("earlier", 0, torch.randn(32, generator=torch.Generator().manual_seed(4)), with_mean=0.8)
WHENS = {
    "always": ALWAYS,
    "reply": Schedule("reply"),
    "first": Schedule(first=4),
    "after": Schedule(after=3),
    "span": Schedule(first=6, after=2, ramp=3),
    "ramp": Schedule("reply", ramp=5),
    "above": Schedule(gate=Gate(EARLIER, above=0.3)),
    "below": Schedule(gate=Gate(FEATURES[1], below=0.2)),
    "reply and between": Schedule(after=1, gate=Gate(DIRECTIONS[3], above=-1.0, below=1.0)),
}


@pytest.fixture(scope="module")
def model64(chat_checkpoint: Path) -> SteeredModel:
    """A tiny model, all of it in fp64."""
    return exact(load(chat_checkpoint, dtype=torch.float64))


def assert_exact(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("target", [DIRECTIONS[0], FEATURES[0], FEATURES[2]], ids=lambda t: t.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_does_what_its_definition_says_whenever_it_acts(model64, operation, target, when):
    if operation == "ablate" and isinstance(target, Direction) and WHENS[when].gate is not None:
        with pytest.raises(UsageError, match="before a gate"):
            Slider(target, operation, 0.5, WHENS[when])
        return
    moves = [Slider(target, operation, AMOUNTS[operation], WHENS[when])]
    slow = Slow(model64, lambda t: moves, PROMPT)
    wanted = slow.logits(TEXT)
    assert_exact(fast_logits(model64, TEXT, moves, PROMPT), wanted)
    # It moved some tokens, and where it has a `when`, not all of them.
    moved = set(slow.done.get(moves[0], {}))
    assert moved
    if when != "always":
        assert len(moved) < len(TEXT)
    assert float((wanted - fast_logits(model64, TEXT, [], PROMPT)).abs().max()) > 1e-3
    assert hooks_on(model64) == 0


def mixture(seed: int) -> list[Slider]:
    """Three to seven sliders that may stand together: any operation, on anything, at any time."""
    pick = random.Random(seed)
    moves = []
    for _ in range(pick.randint(4, 9)):
        target = pick.choice([*DIRECTIONS, *FEATURES, EARLIER])
        operation = pick.choice(OPERATIONS)
        when = pick.choice([ALWAYS, *WHENS.values()])
        amount = pick.uniform(0.1, 1) if operation == "ablate" else pick.uniform(-1.5, 1.5)
        if when.gate is not None and (when.gate.site > target.site or operation == "ablate"):
            when = WHENS["reply"]
        moves.append(Slider(target, operation, amount, when))
    return compatible(moves)


@pytest.mark.parametrize("seed", range(24))
def test_any_mixture_is_the_sum_of_adds_and_the_least_change_that_sets_every_projection(model64, seed):
    moves = mixture(seed)
    wanted = slow_logits(model64, TEXT, moves, PROMPT)
    assert_exact(fast_logits(model64, TEXT, moves, PROMPT), wanted)
    shuffled = random.Random(seed + 1).sample(moves, len(moves))
    torch.testing.assert_close(fast_logits(model64, TEXT, shuffled, PROMPT), wanted, rtol=0, atol=EXACT)


def test_the_order_of_sliders_at_one_site_does_not_matter(model64):
    moves = [
        Slider(DIRECTIONS[0], "clamp", 0.5),
        Slider(DIRECTIONS[1], "cap", -0.5),
        Slider(DIRECTIONS[2], "scale", 0.0, Schedule("reply")),
        Slider(FEATURES[0], "clamp", 1.0),
        Slider(DIRECTIONS[3], "add", 1.0),
    ]
    every = [fast_logits(model64, TEXT, order, PROMPT) for order in permutations(moves)]
    for other in every[1:]:
        torch.testing.assert_close(other, every[0], rtol=0, atol=1e-12)


@torch.inference_mode()
def stream(model: SteeredModel, moves: list[Slider], site: int = 1) -> torch.Tensor:
    """The residual stream of the text after a block: `[tokens, d]`."""
    with model.record([site]) as recording, model.steering.lock, model.steering.applied([Edit.of(moves)]):
        index = torch.arange(len(TEXT))[None] - (PROMPT - 1)
        with model.steering.passing(ForwardContext(index=index)):
            model.hf(input_ids=torch.tensor([TEXT]))
    return recording[site][0]


def test_a_clamp_is_exact_whatever_is_added_and_set_beside_it(model64):
    d = DIRECTIONS
    moves = [
        Slider(d[0], "clamp", 0.5),
        Slider(d[1], "clamp", -1.0),
        Slider(d[2], "scale", 0.0),
        Slider(d[0], "add", 3.0),
        Slider(FEATURES[0], "clamp", 2.0),
    ]
    h = stream(model64, moves)
    for direction, value in ((d[0], 0.5), (d[1], -1.0), (d[2], 0.0)):
        stands = direction.without_mean + value * direction.gap
        torch.testing.assert_close(
            h @ direction.vector.double(), torch.full((len(TEXT),), stands, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_a_cap_lowers_what_is_above_it_and_touches_nothing_else(model64):
    d = DIRECTIONS[0]
    before = stream(model64, [])
    a = before @ d.vector.double()
    limit = a.sort().values[len(TEXT) // 2 - 1 : len(TEXT) // 2 + 1].mean()  # between two tokens, where none ties
    after = stream(model64, [Slider(d, "cap", (float(limit) - d.without_mean) / d.gap)])
    high = a > limit
    assert 0 < int(high.sum()) < len(TEXT)
    assert torch.equal(after[~high], before[~high])
    torch.testing.assert_close((after @ d.vector.double())[high], limit.expand(int(high.sum())), rtol=0, atol=1e-12)
    rest = before - torch.outer(a, d.vector.double())
    kept = after - torch.outer(after @ d.vector.double(), d.vector.double())
    torch.testing.assert_close(kept, rest, rtol=0, atol=1e-7)  # directions are unit vectors in fp32


def test_an_ablated_subspace_is_gone_and_amounts_may_differ(model64):
    d = DIRECTIONS
    whole = [Slider(x, "ablate", 1.0) for x in d]
    r = torch.stack([x.vector.double() for x in d])
    for site in range(3):
        assert float((stream(model64, whole, site) @ r.T).abs().max()) < 1e-12
    # At the embedding nothing comes before: each projection keeps its own share.
    each = [Slider(x, "ablate", a) for x, a in zip(d, (1.0, 0.5, 0.25, 0.0), strict=True)]
    embedding = model64.hf.get_input_embeddings()
    before = embedding(torch.tensor([TEXT]))[0]
    with model64.edited(Edit(moves=tuple(each))):
        after = embedding(torch.tensor([TEXT]))[0]
    torch.testing.assert_close((after @ r[:3].T), (before @ r[:3].T) * torch.tensor([0.0, 0.5, 0.75]).double())


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("when", ["always", "reply"])
def test_two_clamps_on_nearly_parallel_directions_both_hold(model64, angle, when):
    one = DIRECTIONS[0]
    other = nearly(one, angle)
    moves = [Slider(one, "clamp", 0.5, WHENS[when]), Slider(other, "clamp", 0.5, WHENS[when])]
    h = stream(model64, moves)
    acting = torch.arange(len(TEXT)) >= (0 if when == "always" else PROMPT - 1)
    for direction in (one, other):
        stands = direction.without_mean + 0.5 * direction.gap
        wrong = (h @ direction.vector.double() - stands)[acting].abs().max()
        assert float(wrong) < 1e-11 / angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("when", ["always", "reply"])
def test_directions_that_are_parallel_but_for_rounding_count_as_one(chat_checkpoint, when, dtype):
    model = load(chat_checkpoint, dtype=dtype)
    one = DIRECTIONS[0]
    other = nearly(one, math.pi - 1e-7)
    clamps = [Slider(one, "clamp", 0.5, WHENS[when]), Slider(other, "clamp", 0.5, WHENS[when])]
    torch.testing.assert_close(stream(model, clamps), stream(model, clamps[:1]), rtol=0, atol=1e-4)
    gone = [Slider(x, "ablate", 1.0, WHENS[when]) for x in (one, other)]
    torch.testing.assert_close(stream(model, gone), stream(model, gone[:1]), rtol=0, atol=1e-4)


def nearly(direction: Direction, angle: float) -> Direction:
    """Another direction at an angle to it, with the same statistics; with their opposite where it points backwards."""
    v = direction.vector.double()
    side = torch.randn(32, generator=torch.Generator().manual_seed(11)).double()
    side -= (side @ v) * v
    vector = math.cos(angle) * v + math.sin(angle) * side / side.norm()
    sign = math.copysign(1, math.cos(angle))
    means = {"with_mean": sign * direction.with_mean, "without_mean": sign * direction.without_mean}
    return Direction("near", direction.site, vector, **means)


@pytest.mark.parametrize("target", [DIRECTIONS[0], FEATURES[0]], ids=["direction", "feature"])
@pytest.mark.parametrize("other", ["clamp", "cap", "scale"])
def test_two_sliders_that_set_one_thing_are_refused_by_name(target, other):
    one, two = Slider(target, "clamp", 1.0, label="calm"), Slider(target, other, 0.5, label="bold")
    with pytest.raises(UsageError, match="'calm' and 'bold'") as caught:
        Edit.of([one, two])
    assert "\n" not in str(caught.value)
    Edit.of([one, Slider(target, "add", 0.5, label="bold")])


@pytest.mark.parametrize("amounts", [(0.5, 0.5), (0.5, 1.0)])
def test_two_ablations_of_one_direction_are_refused_whatever_their_amounts(amounts):
    moves = [Slider(DIRECTIONS[0], "ablate", a, label=f"gone {i}") for i, a in enumerate(amounts)]
    with pytest.raises(UsageError, match="'gone 0' and 'gone 1'"):
        Edit.of(moves)


def test_one_direction_loaded_twice_is_one_direction(model64, tmp_path):
    again = Direction.load(DIRECTIONS[0].save(tmp_path / "again.safetensors"))
    with pytest.raises(UsageError, match="'mine' and 'again'"):
        Edit.of([Slider(DIRECTIONS[0], "clamp", 1.0, label="mine"), Slider(again, "cap", 0.0, label="again")])
    # In a bake's list it is there once.
    wanted = slow_logits(model64, TEXT, [Slider(DIRECTIONS[0], "ablate", 1.0)], PROMPT)
    with model64.edited(Edit((DIRECTIONS[0], again))), torch.inference_mode():
        torch.testing.assert_close(model64.hf(torch.tensor([TEXT])).logits[0], wanted, rtol=0, atol=1e-6)


SPLIT = [
    (Schedule(first=3), Schedule(after=3)),
    (Schedule(first=3, after=1), Schedule(after=5, ramp=2)),
    (Schedule(gate=Gate(EARLIER, below=0.2)), Schedule(gate=Gate(EARLIER, above=0.2))),
    (Schedule("reply", gate=Gate(EARLIER, above=0.1, below=0.4)), Schedule(gate=Gate(EARLIER, above=0.4))),
]


@pytest.mark.parametrize("target", [DIRECTIONS[0], FEATURES[0], FEATURES[2]], ids=lambda t: t.name)
@pytest.mark.parametrize("split", range(len(SPLIT)))
def test_two_sliders_may_set_one_thing_on_tokens_that_differ(model64, target, split):
    one, other = SPLIT[split]
    moves = [
        Slider(target, "clamp", 1.0, one, "one"),
        Slider(target, "scale", -0.5, other, "other"),
        Slider(DIRECTIONS[1], "cap", -0.4),
    ]
    slow = Slow(model64, lambda t: moves, PROMPT)
    assert_exact(fast_logits(model64, TEXT, moves, PROMPT), slow.logits(TEXT))
    assert all(slow.done.get(m) for m in moves[:2])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ALWAYS, Schedule("reply")),
        (Schedule("reply"), Schedule(first=2)),
        (Schedule(first=4), Schedule(after=3)),
        (Schedule("reply"), Schedule(gate=Gate(EARLIER, above=0.2))),
        (Schedule(gate=Gate(EARLIER, above=0.2)), Schedule(gate=Gate(EARLIER, above=0.4))),
        (Schedule(gate=Gate(EARLIER, above=0.2)), Schedule(gate=Gate(DIRECTIONS[3], below=0.2))),
    ],
)
@pytest.mark.parametrize("target", [DIRECTIONS[0], FEATURES[0]], ids=["direction", "feature"])
def test_two_sliders_that_might_set_one_thing_on_one_token_are_refused(target, one, other):
    with pytest.raises(UsageError, match="'one' and 'other'"):
        Edit.of([Slider(target, "clamp", 1.0, one, "one"), Slider(target, "cap", 0.0, other, "other")])


def test_outliers_are_left_alone_by_what_reads_latents_and_by_nothing_else(model64):
    norms = stream(model64, []).norm(dim=-1)
    # In the widest gap around the middle: at the norm of a token itself, rounding would decide.
    ordered = norms.sort().values[len(norms) // 4 : -(len(norms) // 4)]
    at = int(ordered.diff().argmax())
    limit = float(ordered[at] + ordered[at + 1]) / 2
    feature = Feature("small", make_dictionary(norm=limit / 10), (3, 9), (1.0, 2.0))
    moves = [
        Slider(feature, "clamp", 1.0),
        Slider(feature, "add", 0.5),
        Slider(DIRECTIONS[0], "clamp", 1.0),
    ]
    slow = Slow(model64, lambda t: moves, PROMPT)
    assert_exact(fast_logits(model64, TEXT, moves, PROMPT), slow.logits(TEXT))
    assert set(slow.done[moves[0]]) == set((norms <= limit).nonzero().flatten().tolist())
    assert len(slow.done[moves[1]]) == len(slow.done[moves[2]]) == len(TEXT)


def test_as_many_directions_as_may_come_and_go_together_are_set_exactly(model64):
    whens = [
        *(w for w in WHENS.values() if w.gate is None),
        Schedule(after=1),
        Schedule(first=9),
        WHENS["above"],
        ALWAYS,
    ]
    directions = close_directions(n=MAX_JOINT_DIRECTIONS, seed=6)
    moves = [Slider(d, "clamp", 0.3, w) for d, w in zip(directions, whens, strict=True)]
    assert_exact(fast_logits(model64, TEXT, moves, PROMPT), slow_logits(model64, TEXT, moves, PROMPT))


def test_adds_of_any_time_are_summed(model64):
    d = DIRECTIONS[0]
    moves = [
        Slider(d, "add", 1.0),
        Slider(d, "add", -0.5, Schedule("reply")),
        Slider(d, "add", 2.0, Schedule(after=2, ramp=4)),
    ]
    before, after = stream(model64, []), stream(model64, moves)
    wanted = [1.0] * 5 + [0.5, 0.5, 1.0, 1.5, 2.0, 2.5, 2.5, 2.5, 2.5]
    moved = (after - before) @ d.vector.double() / d.gap
    torch.testing.assert_close(moved, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def test_neutral_amounts_leave_no_hook_whatever_their_when(model64):
    plain = fast_logits(model64, TEXT, [], PROMPT)
    neutral = [
        Slider(target, operation, amount, when)
        for target in (DIRECTIONS[0], FEATURES[0])
        for operation, amount in (("add", 0.0), ("ablate", 0.0), ("scale", 1.0))
        for when in WHENS.values()
        if not (operation == "ablate" and isinstance(target, Direction) and when.gate)
    ]
    assert Edit.of(neutral) is None
    with model64.edited(Edit(moves=tuple(neutral))):
        assert hooks_on(model64) == 0
        assert torch.equal(fast_logits(model64, TEXT, neutral, PROMPT), plain)


@pytest.mark.parametrize("operation", ["clamp", "cap", "scale"])
def test_a_token_far_beyond_the_sites_norm_is_left_alone(model64, ids, make_direction, operation):
    with model64.record([1]) as before, torch.inference_mode():
        model64.hf(ids)
    norms = before[1].norm(dim=-1)
    between = float(norms.median())  # half of the tokens count as outliers
    direction = replace(make_direction("one"), residual_norm=between / 10)
    with model64.steered({Slider(direction, operation): -3.0}), model64.record([1]) as after, torch.inference_mode():
        model64.hf(ids)
    moved = (after[1] - before[1]).norm(dim=-1) > 1e-9
    assert torch.equal(moved, norms <= between)
    assert 0 < int(moved.sum()) < moved.numel()
    unknown = Slider(replace(direction, residual_norm=math.nan), operation)
    with model64.steered({unknown: -3.0}), torch.inference_mode(), model64.record([1]) as after:
        model64.hf(ids)
    assert bool(((after[1] - before[1]).norm(dim=-1) > 1e-9).all())


@pytest.mark.parametrize("operation", ["ablate", "clamp", "cap", "scale"])
def test_half_precision_is_off_by_no_more_than_a_few_roundings_of_the_stream(chat_checkpoint, operation):
    model = load(chat_checkpoint, dtype=torch.bfloat16)
    r = replace(DIRECTIONS[0], residual_norm=1e6)
    edit = Edit.of([Slider(r, operation, AMOUNTS[operation])])
    alpha, beta, upper = Slider(r, operation, AMOUNTS[operation]).coefficients[0]
    h = 3 * torch.randn(64, 1, 32, generator=torch.Generator().manual_seed(7)).bfloat16()
    wide = h.double()
    a = wide @ r.vector.double()
    wanted = wide + (alpha * a + beta).clamp(max=upper)[..., None] * r.vector.double()
    program = next(iter(module_edits((edit,), model.anatomy, model.steering.gain).values()))
    moved = (wanted - wide).norm(dim=-1)
    off = (program.apply(h, ForwardContext()).double() - wanted).norm(dim=-1) / (wide.norm(dim=-1) + moved)
    # bf16 keeps eight bits: rounding the result alone puts it off by up to 2^-9 of its norm.
    assert off.max() < 2**-8
    assert moved.max() > 2**-4 * wide.norm(dim=-1).max()

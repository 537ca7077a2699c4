"""A `Schedule` and a `Gate` as values: what share acts on which reply token, and what can never be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slow_steering import close_directions, share_at

from steer.core.direction import Direction
from steer.core.edit import MAX_JOINT_DIRECTIONS, Edit
from steer.core.schedule import ALWAYS, Gate, Schedule
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.model.steering.low_rank import ForwardContext, ReplyWindow

D = close_directions()
LATE = replace(close_directions(site=2, n=1, seed=8)[0], name="late")


@pytest.mark.parametrize(
    ("when", "shares"),
    [
        (ALWAYS, [1, 1, 1, 1, 1, 1, 1]),
        (Schedule("reply"), [0, 0, 1, 1, 1, 1, 1]),
        (Schedule(first=2), [0, 0, 1, 1, 0, 0, 0]),
        (Schedule(after=0), [0, 0, 1, 1, 1, 1, 1]),
        (Schedule(after=2), [0, 0, 0, 0, 1, 1, 1]),
        (Schedule("reply", first=4, after=1), [0, 0, 0, 1, 1, 1, 0]),
        (Schedule(ramp=4), [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (Schedule(after=1, ramp=2, first=4), [0, 0, 0, 0.5, 1, 1, 0]),
    ],
)
def test_the_share_that_acts_is_reported_by_the_reply_token_that_is_written(when, shares):
    index = torch.arange(-2, 5)
    window, x = ReplyWindow(torch.tensor(when.window, dtype=torch.float64).view(4, 1, 1, 1)), torch.zeros(1).double()
    assert window.share(ForwardContext(index=index[None]), x).flatten().tolist() == shares
    assert [share_at(when, int(i)) for i in index] == shares
    assert when.timed is (when is not ALWAYS)


@pytest.mark.parametrize(
    ("when", "shares"),
    [
        (Schedule("thoughts"), [0, 1, 1, 1, 0, 0, 0]),
        (Schedule("thoughts", after=1, ramp=4), [0, 0, 0.25, 0.5, 0, 0, 0]),
        (Schedule("answer"), [0, 0, 0, 0, 1, 1, 1]),
        (Schedule("answer", first=2), [0, 0, 0, 0, 1, 1, 0]),
        (Schedule("answer", after=1, ramp=2), [0, 0, 0, 0, 0, 0.5, 1]),
    ],
)
def test_thoughts_and_answer_are_counted_apart(when, shares):
    text = ForwardContext(index=torch.arange(-1, 6)[None], answer=torch.tensor([[3]]))
    window, x = ReplyWindow(torch.tensor(when.window, dtype=torch.float64).view(4, 1, 1, 1)), torch.zeros(1).double()
    assert window.share(text, x).flatten().tolist() == shares
    assert when.timed


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (Schedule("thoughts"), Schedule("answer"), True),
        (Schedule("thoughts"), Schedule("reply"), False),
        (Schedule("thoughts", first=3), Schedule("reply", after=3), True),
        (Schedule("answer", after=3), Schedule("reply", first=3), True),
        (Schedule("answer", first=3), Schedule("reply", after=3), False),
        (Schedule("answer", first=3), Schedule("answer", after=3), True),
        (Schedule("answer"), ALWAYS, False),
    ],
)
def test_parts_that_no_token_can_share_exclude_each_other(one, other, apart):
    assert one.excludes(other) is other.excludes(one) is apart
    for a, b in ((one, other), (other, one)):
        sliders = [Slider(D[0], "clamp", 1.0, a), Slider(D[0], "clamp", 0.0, b)]
        if apart:
            assert Edit.of(sliders)
        else:
            with pytest.raises(UsageError, match="one of them at most on any token"):
                Edit.of(sliders)


@pytest.mark.parametrize(
    "bad",
    [
        {"part": "prompt"},
        {"first": 0},
        {"first": 2.0},
        {"first": True},
        {"after": -1},
        {"ramp": 0},
        {"first": 3, "after": 3},
        {"first": 2, "after": 5},
    ],
)
def test_a_when_that_can_never_be_is_refused_in_one_line(bad):
    with pytest.raises(UsageError, match=r"when: .*expected") as caught:
        Schedule(**bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "limits",
    [{}, {"above": float("nan")}, {"below": float("inf")}, {"above": 1.0, "below": 1.0}, {"above": 2.0, "below": 1.0}],
)
def test_a_gate_without_an_opening_is_refused(limits):
    with pytest.raises(UsageError, match="gate on 'd0'"):
        Gate(D[0], **limits)


def test_a_gate_on_a_direction_without_a_gap_has_no_unit():
    flat = Direction("flat", 1, D[0].vector, with_mean=0.5, without_mean=0.5)
    with pytest.raises(UsageError, match="a gap of 0"):
        Gate(flat, above=0.0)


def test_a_gate_that_is_read_too_late_is_refused():
    for operation in ("add", "clamp"):
        with pytest.raises(UsageError, match="gate at its site 1 or before it, found 'late' at site 2"):
            Slider(D[0], operation, 1.0, Schedule(gate=Gate(LATE, above=0.0)))


def test_a_gate_opens_strictly_between_its_limits():
    amounts = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert Gate(D[0], above=0.0, below=1.0).open(amounts).tolist() == [0, 0, 1, 0, 0]
    assert Gate(D[0], above=0.0).open(amounts).tolist() == [0, 0, 1, 1, 1]
    assert Gate(D[0], below=1.0).open(amounts).tolist() == [1, 1, 1, 0, 0]


def test_more_directions_than_can_come_and_go_together_are_refused_by_name():
    many = close_directions(n=MAX_JOINT_DIRECTIONS + 1)
    Edit.of([Slider(d, "clamp", 0.0) for d in many])
    Edit.of([Slider(d, "clamp", 0.0, Schedule("reply")) for d in many[1:]])
    with pytest.raises(UsageError, match=r"'d0'.*'d10'.*at most 10 directions .*found 11"):
        Edit.of([Slider(d, "clamp", 0.0, Schedule("reply")) for d in many])


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (ALWAYS, ALWAYS, False),
        (Schedule(first=3), Schedule(after=3), True),
        (Schedule(first=3), Schedule(after=2), False),
        (Schedule("reply"), Schedule(first=1), False),
        (Schedule(gate=Gate(D[0], above=0.0)), Schedule(gate=Gate(D[0], below=0.0)), True),
        (Schedule(gate=Gate(D[0], above=0.0)), Schedule(gate=Gate(D[0], above=-1.0, below=0.5)), False),
        (Schedule(gate=Gate(D[0], above=0.0)), Schedule(gate=Gate(D[1], below=0.0)), False),
        (Schedule(gate=Gate(D[0], above=0.0)), Schedule(gate=Gate(replace(D[0]), below=0.0)), True),
        (Schedule(gate=Gate(D[0], above=0.0)), Schedule(gate=Gate(D[0].at(2), below=0.0)), False),
        (Schedule(first=2, gate=Gate(D[0], above=0.0)), Schedule(after=2, gate=Gate(D[0], above=0.0)), True),
    ],
)
def test_whens_exclude_each_other_where_no_token_can_have_both(one, other, apart):
    assert one.excludes(other) is other.excludes(one) is apart

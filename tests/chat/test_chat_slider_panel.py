"""The sliders of a page: their ranges, their words, what is over the limit, and what a page keeps of profiles."""

from __future__ import annotations

import math

import pytest
from feature_indexes import keep_dictionary
from tiny_chat import keep_direction

from steer.chat.profile_store import (
    file_name,
    forget_profile,
    keep_profile,
    load_profile,
    profile_bytes,
    saved_profiles,
    uploaded_profile,
)
from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.core.trait import Trait
from steer.errors import SteerError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")


@pytest.fixture
def board(chat, model, checkpoint, make_direction):
    keep_dictionary(model)
    weak = make_direction("moralizing", seed=9)
    keep_direction(checkpoint, Direction("moralizing", 2, weak.vector, with_mean=0.1, residual_norm=1.0))
    return chat.panel


def names(board) -> list[str]:
    return [r.name for r in board.rows()]


def test_traits_come_first_then_what_was_pinned(board):
    assert names(board) == ["moral", "moralizing"]
    board.pin("L1/5")
    board.pin("preach")
    assert names(board) == ["moral", "moralizing", "L1/5", "preach"]
    assert [(r.kind, r.pinned) for r in board.rows()] == [("trait", False)] * 2 + [("feature", True)] * 2
    board.set("preach", 1.0)
    board.unpin("preach")
    assert names(board) == ["moral", "moralizing", "L1/5"]
    with pytest.raises(UsageError, match="kindness"):
        board.pin("kindness")
    with pytest.raises(UsageError, match="latent 0"):
        board.pin("L1/0")
    assert board.pinned == ["L1/5"]


def test_a_slider_that_stands_somewhere_is_shown_and_one_at_rest_is_not_kept(board, chat):
    board.set("against", 0.5)
    assert names(board)[-1] == "against"
    board.set("moral", 0.0)
    assert dict(chat.sliders) == {"against": 0.5}
    board.set("moral", 0.1)
    board.set("moral", 0.0)
    assert dict(chat.sliders) == {"against": 0.5, "moral": 0.0}
    assert not board.row("moral").moves


def test_words_in_place_of_numbers(board):
    by_name = {r.name: r for r in [*board.rows(), *map(board.row, ("preach", "against", "L1/5"))]}
    assert (by_name["moral"].title, by_name["moral"].description) == ("moral", "The direction 'moral'.")
    assert by_name["moralizing"].description == Trait.load("moralizing").summary
    assert by_name["preach"].title == "moralizing, 2 features"
    assert by_name["against"].title == "moralizing, one feature"
    assert by_name["L1/5"].title == "on \u201cmercy\u201d"
    assert by_name["L1/5"].description == (
        "Fires on one token in 17, as on \u201cmercy\u201d; adding it makes \u201cmercy\u201d likelier."
    )
    assert "Features that tell the trait" in by_name["preach"].description


def test_ranges_are_those_that_were_measured_else_half_of_what_is_too_much(board, chat):
    row = board.row("moral")  # amount 1 moves it by 2 of the norm
    assert (row.safe, row.calibrated) == ((-0.2, 0.2), False)
    assert row.low < -0.2 < 0.2 < row.high
    weak = board.row("moralizing")  # amount 1 moves it by 0.1
    assert weak.safe == (-2.0, 2.0)
    chat.use(Profile("c", sliders=(ProfileSlider("moral", 0.3, range=(-0.5, 0.25)),)))
    row = board.row("moral")
    assert (row.safe, row.calibrated, row.red, row.share) == ((-0.5, 0.25), True, True, pytest.approx(0.6))
    assert row.low < -0.5 < 0.25 < row.high
    assert board.warnings() == ["moral stands at 0.3, beyond its calibrated range -0.5 to 0.25"]
    board.set("moral", 0.2)
    assert not board.row("moral").red
    board.set("moral", 5.0)
    assert board.row("moral").high >= 5.0


def test_a_weak_direction_has_a_range_that_is_not_nothing(board, checkpoint, make_direction, chat):
    strong = make_direction("strong")
    chat.sliders.put(Direction("strong", 1, strong.vector, with_mean=50.0, residual_norm=1.0))
    row = board.row("strong")
    assert 0 < row.safe[1] < 0.01
    assert row.low < row.safe[0] < 0 < row.safe[1] < row.high
    chat.sliders.put(Direction("unknown", 1, strong.vector), 0.5)
    row = board.row("unknown")
    assert (row.safe, math.isnan(row.share)) == ((-2.0, 2.0), True)
    assert [b.share for b in board.budgets()] == [0.0]


def test_operations_and_times_can_be_changed(board, chat):
    board.set("moral", 0.5)
    assert board.row("moral").operations == ("add", "ablate", "clamp", "cap", "scale")
    board.reshape("moral", when=Schedule("reply", after=3))
    assert (chat.sliders["moral"], board.row("moral").when.after) == (0.5, 3)
    board.reshape("moral", "clamp")
    row = board.row("moral")
    assert (row.operation, math.isnan(row.amount), row.neutral, row.moves) == ("clamp", True, None, False)
    assert row.when.after == 3
    board.set("moral", 0.0)
    assert board.row("moral").moves
    board.off("moral")
    assert math.isnan(board.row("moral").amount)
    board.reshape("moral", "ablate")
    assert (board.row("moral").low, board.row("moral").high) == (0.0, 1.0)
    assert board.row("against").operations == ("add",)
    with pytest.raises(UsageError, match="positive units"):
        board.reshape("against", "clamp")


def test_budgets_tell_each_site_and_when_it_is_too_much(board, chat):
    assert board.budgets() == []
    board.set("moral", 0.1)
    board.set("moralizing", 1.0)
    first, second = board.budgets()
    assert (first.site, first.share, first.level, first.limit) == (1, pytest.approx(0.2), "fine", 0.8)
    assert (second.site, second.share) == (2, pytest.approx(0.1))
    assert first.parts == (("moral", pytest.approx(0.2)),)
    board.set("moral", 0.3)
    assert board.budgets()[0].level == "near"
    board.set("moral", -0.4)
    assert board.budgets()[0].level == "over"
    assert "fall apart" in board.budgets()[0].words
    assert any("fall apart" in w for w in chat.warnings())
    board.on = False
    assert board.budgets()[0].share == 0.0
    assert chat.warnings() == []


def test_what_pulls_apart_cancels_in_a_budget(board, chat):
    target = chat.sliders.slider("moral").target
    chat.sliders.put(Slider(target, label="other"), -0.3)
    board.set("moral", 0.3)
    (budget,) = board.budgets()
    assert budget.share == pytest.approx(0.0, abs=1e-6)
    assert sorted(p[1] for p in budget.parts) == [pytest.approx(0.6)] * 2
    assert {p[0] for p in budget.parts} == {"moral", "moral (other)"}


def test_undo_and_redo_and_reset_tell_widgets_to_be_drawn_anew(board):
    began = board.revision
    board.set("moral", 0.1)
    board.set("moral", 0.2)
    assert board.revision == began
    assert board.undo()
    assert (board.row("moral").amount, board.revision) == (0.1, began + 1)
    assert board.redo()
    assert board.row("moral").amount == 0.2
    board.reset_all()
    assert board.row("moral").amount == 0.0
    assert board.undo()
    assert board.row("moral").amount == 0.2
    for _ in range(2):
        assert board.undo()
    assert not board.undo()


def test_the_master_switch_leaves_every_slider_where_it_stands(board, chat, new_chat):
    plain = new_chat().say("hello")
    board.set("moral", -3.0)
    board.on = False
    off = chat.say("hello")
    assert chat.writer.wait(20)
    board.on = True
    chat.clear()
    on = chat.say("hello")
    assert chat.writer.wait(20)
    assert off.text == plain.text != on.text
    assert off.written.profile.sliders == ()
    assert board.row("moral").amount == -3.0


def test_a_slider_whose_file_is_gone_is_left_out_and_the_page_is_still_drawn(board, home):
    board.pin("preach")
    for file in home.rglob("sliders.yaml"):
        file.unlink()
    board._backend.sliders._known.clear()
    assert names(board) == ["moral", "moralizing"]


def test_profiles_are_kept_given_away_and_taken(chat, home):
    assert saved_profiles() == {}
    chat.panel.set("moral", 0.3)
    chat.panel.reshape("moral", when=Schedule("reply", first=3))
    with pytest.raises(UsageError, match="without /"):
        chat.profile("noir/../x")
    profile = chat.profile("noir \u2603:..x")
    place = keep_profile(profile)
    assert place.parent == home / "profiles"
    assert list(saved_profiles()) == [place.stem]
    assert load_profile(place.stem) == profile
    chat.panel.reset_all()
    back = uploaded_profile(profile_bytes(profile), "noir.yaml")
    chat.use(back)
    assert chat.sliders["moral"] == 0.3
    assert chat.panel.row("moral").when.first == 3
    forget_profile(place.stem)
    forget_profile(place.stem)
    with pytest.raises(UsageError, match="expected one of none so far"):
        load_profile(place.stem)
    assert file_name("...") == "profile"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff\xfe", "expected a profile"),
        (b"name: x\nsliders: 3", "sliders"),
        (b"name: x\nsliders: [{slider: /etc/d.safetensors, amount: 1}]", "name the direction instead"),
        (b"name: x\nnotes: " + b"y" * 1_000_001, "at most 1,000,000 bytes"),
    ],
)
def test_an_upload_that_is_no_profile_is_refused_in_a_line(data, told):
    with pytest.raises(SteerError, match=told) as e:
        uploaded_profile(data, "sent.yaml")
    assert "\n" not in str(e.value)

"""The sliders of a page: their ranges, their words, what is over the limit, and what a page keeps of profiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from feature_indexes import keep_dictionary
from tiny_chat import keep_direction

from steer.chat.local import LocalBackend
from steer.chat.profile_store import (
    file_name,
    forget_profile,
    keep_profile,
    load_profile,
    profile_bytes,
    saved_profiles,
    uploaded_profile,
)
from steer.chat.slider_panel import SliderPanel
from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.core.trait import Trait
from steer.errors import SteerError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")


@pytest.fixture
def panel(chat, model, checkpoint, make_direction):
    keep_dictionary(model)
    weak = make_direction("moralizing", seed=9)
    keep_direction(checkpoint, Direction("moralizing", 2, weak.vector, with_mean=0.1, residual_norm=1.0))
    return chat.panel


def names(panel) -> list[str]:
    return [r.name for r in panel.rows()]


def test_traits_come_first_then_what_was_pinned(panel):
    assert names(panel) == ["moralizing", "moral"]
    panel.pin("L1/5")
    panel.pin("preach")
    assert names(panel) == ["moralizing", "moral", "L1/5", "preach"]
    assert [(r.kind, r.pinned) for r in panel.rows()] == [("trait", False)] * 2 + [("feature", True)] * 2
    panel.set("preach", 1.0)
    panel.unpin("preach")
    assert names(panel) == ["moralizing", "moral", "L1/5"]
    with pytest.raises(UsageError, match="kindness"):
        panel.pin("kindness")
    with pytest.raises(UsageError, match="latent 0"):
        panel.pin("L1/0")
    assert panel.pinned == ["L1/5"]


def test_a_slider_that_stands_somewhere_is_shown_and_one_at_rest_is_not_kept(panel, chat):
    panel.set("against", 0.5)
    assert names(panel)[-1] == "against"
    panel.set("moral", 0.0)
    assert dict(chat.sliders) == {"against": 0.5}
    panel.set("moral", 0.1)
    panel.set("moral", 0.0)
    assert dict(chat.sliders) == {"against": 0.5, "moral": 0.0}
    assert not panel.row("moral").moves


def test_words_in_place_of_numbers(panel):
    by_name = {r.name: r for r in [*panel.rows(), *map(panel.row, ("preach", "against", "L1/5"))]}
    assert (by_name["moral"].title, by_name["moral"].description) == ("moral", "The direction 'moral'.")
    assert by_name["moralizing"].description == Trait.load("moralizing").summary
    assert by_name["moralizing"].ends == ("never lectures", "preaches")
    assert by_name["moral"].ends == ("less", "more")
    assert by_name["preach"].title == "moralizing, 2 features"
    assert by_name["against"].title == "moralizing, one feature"
    assert by_name["L1/5"].title == "on \u201cmercy\u201d"
    assert by_name["L1/5"].description == (
        "Fires on one token in 17, as on \u201cmercy\u201d; adding it makes \u201cmercy\u201d likelier."
    )
    assert "Features that indicate the trait" in by_name["preach"].description


SEARCHED = {
    "with": "You are a merry pirate who talks of the sea and of nothing else.", "without": "You are a clerk.",
    "calibrated": [-1.5, 1.25], "verdict": {"says": "steers but drags KL along", "drags": ["KL"], "auroc": 0.9},
}  # fmt: skip


def searched(checkpoint, make_direction, **provenance):
    """A direction in the library, as a search from two sentences leaves it."""
    found = make_direction("pirate", seed=5)
    keep_direction(checkpoint, replace(found, provenance=SEARCHED | provenance))


def test_a_slider_from_two_sentences_has_them_at_its_ends_its_range_and_its_verdict(panel, checkpoint, make_direction):
    searched(checkpoint, make_direction)
    row = panel.row("pirate")
    assert (row.group, row.deletable, row.safe, row.calibrated) == ("mine", True, (-1.5, 1.25), True)
    assert row.ends == ("You are a clerk.", "You are a merry pirate who talks of the\u2026")
    assert (row.verdict.works, row.verdict.auroc) == (False, 0.9)
    assert row.verdict.sentence == "It works, and changes this too: the wording in general."
    panel.set("pirate", 1.4)
    assert panel.row("pirate").red


@pytest.mark.parametrize("provenance", [{"calibrated": ["a", 1]}, {"calibrated": [1, 2]}, {"calibrated": None}])
def test_a_range_that_a_strangers_file_made_up_is_none(panel, checkpoint, make_direction, provenance):
    searched(checkpoint, make_direction, **provenance)
    assert not panel.row("pirate").calibrated


def test_sliders_are_grouped_found_by_their_words_and_deleted_if_they_are_ones_own(panel, checkpoint, make_direction):
    searched(checkpoint, make_direction)
    panel.pin("L1/5")
    assert [(r.name, r.group) for r in panel.rows()] == [
        ("moralizing", "traits"), ("moral", "mine"), ("pirate", "mine"), ("L1/5", "features"),
    ]  # fmt: skip
    assert [r.name for r in panel.rows() if r.matches("SEA nothing")] == ["pirate"]
    assert [r.name for r in panel.rows() if r.matches("preaches")] == ["moralizing"]
    panel.set("pirate", 1.0)
    panel.delete("pirate")
    assert "pirate" not in names(panel)
    assert panel.budgets() == []
    with pytest.raises(UsageError, match="expected one that was made on this machine"):
        panel.delete("L1/5")


def test_ranges_are_those_that_were_measured_else_half_of_what_is_too_much(panel, chat):
    row = panel.row("moral")  # amount 1 moves it by 2 of the norm
    assert (row.safe, row.calibrated) == ((-0.2, 0.2), False)
    assert row.low < -0.2 < 0.2 < row.high
    weak = panel.row("moralizing")  # amount 1 moves it by 0.1
    assert weak.safe == (-2.0, 2.0)
    chat.use(Profile("c", sliders=(ProfileSlider("moral", 0.3, range=(-0.5, 0.25)),)))
    row = panel.row("moral")
    assert (row.safe, row.calibrated, row.red, row.share) == ((-0.5, 0.25), True, True, pytest.approx(0.6))
    assert row.low < -0.5 < 0.25 < row.high
    assert panel.warnings() == ["moral is at 0.3, beyond its calibrated range -0.5 to 0.25"]
    panel.set("moral", 0.2)
    assert not panel.row("moral").red
    panel.set("moral", 5.0)
    assert panel.row("moral").high >= 5.0


def test_a_weak_direction_has_a_range_that_is_not_nothing(panel, checkpoint, make_direction, chat):
    strong = make_direction("strong")
    chat.sliders.put(Direction("strong", 1, strong.vector, with_mean=50.0, residual_norm=1.0))
    row = panel.row("strong")
    assert 0 < row.safe[1] < 0.01
    assert row.low < row.safe[0] < 0 < row.safe[1] < row.high
    chat.sliders.put(Direction("unknown", 1, strong.vector), 0.5)
    row = panel.row("unknown")
    assert (row.safe, math.isnan(row.share)) == ((-2.0, 2.0), True)
    assert [b.share for b in panel.budgets()] == [0.0]


def test_operations_and_times_can_be_changed(panel, chat):
    panel.set("moral", 0.5)
    assert panel.row("moral").operations == ("add", "ablate", "clamp", "cap", "scale")
    panel.reshape("moral", when=Schedule("reply", after=3))
    assert (chat.sliders["moral"], panel.row("moral").when.after) == (0.5, 3)
    panel.reshape("moral", "clamp")
    row = panel.row("moral")
    assert (row.operation, math.isnan(row.amount), row.neutral, row.moves) == ("clamp", True, None, False)
    assert row.when.after == 3
    panel.set("moral", 0.0)
    assert panel.row("moral").moves
    panel.off("moral")
    assert math.isnan(panel.row("moral").amount)
    panel.reshape("moral", "ablate")
    assert (panel.row("moral").low, panel.row("moral").high) == (0.0, 1.0)
    assert panel.row("against").operations == ("add",)
    with pytest.raises(UsageError, match="positive units"):
        panel.reshape("against", "clamp")


def test_budgets_show_each_site_and_when_it_is_too_much(panel, chat):
    assert panel.budgets() == []
    panel.set("moral", 0.1)
    panel.set("moralizing", 1.0)
    first, second = panel.budgets()
    assert (first.site, first.share, first.level, first.limit) == (1, pytest.approx(0.2), "fine", 0.8)
    assert (second.site, second.share) == (2, pytest.approx(0.1))
    assert first.parts == (("moral", pytest.approx(0.2)),)
    panel.set("moral", 0.3)
    assert panel.budgets()[0].level == "near"
    panel.set("moral", -0.4)
    assert panel.budgets()[0].level == "over"
    assert "fall apart" in panel.budgets()[0].words
    assert any("fall apart" in w for w in chat.warnings())
    panel.on = False
    assert panel.budgets()[0].share == 0.0
    assert chat.warnings() == []


def test_what_pulls_apart_cancels_in_a_budget(panel, chat):
    target = chat.sliders.slider("moral").target
    chat.sliders.put(Slider(target, label="other"), -0.3)
    panel.set("moral", 0.3)
    (budget,) = panel.budgets()
    assert budget.share == pytest.approx(0.0, abs=1e-6)
    assert sorted(p[1] for p in budget.parts) == [pytest.approx(0.6)] * 2
    assert {p[0] for p in budget.parts} == {"moral", "moral (other)"}


def test_undo_and_redo_and_reset_make_widgets_be_drawn_again(panel):
    began = panel.revision
    panel.set("moral", 0.1)
    panel.set("moral", 0.2)
    assert panel.revision == began
    assert panel.undo()
    assert (panel.row("moral").amount, panel.revision) == (0.1, began + 1)
    assert panel.redo()
    assert panel.row("moral").amount == 0.2
    panel.reset_all()
    assert panel.row("moral").amount == 0.0
    assert panel.undo()
    assert panel.row("moral").amount == 0.2
    for _ in range(2):
        assert panel.undo()
    assert not panel.undo()


def test_the_master_switch_leaves_every_slider_where_it_stands(panel, chat, new_chat):
    plain = new_chat().say("hello")
    panel.set("moral", -3.0)
    panel.on = False
    off = chat.say("hello")
    assert chat.writer.wait(20)
    panel.on = True
    chat.clear()
    on = chat.say("hello")
    assert chat.writer.wait(20)
    assert off.text == plain.text != on.text
    assert off.written.profile.sliders == ()
    assert panel.row("moral").amount == -3.0


def test_a_slider_whose_file_is_gone_is_left_out_and_the_page_is_still_drawn(panel, model, home):
    panel.pin("preach")
    for file in home.rglob("sliders.yaml"):
        file.unlink()
    assert names(SliderPanel(LocalBackend(model), panel.pinned)) == ["moralizing", "moral"]


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
    ("data", "says"),
    [
        (b"\xff\xfe", "expected a profile"),
        (b"name: x\nsliders: 3", "sliders"),
        (b"name: x\nsliders: [{slider: /etc/d.safetensors, amount: 1}]", "name the direction instead"),
        (b"name: x\nnotes: " + b"y" * 1_000_001, "at most 1,000,000 bytes"),
    ],
)
def test_an_upload_that_is_no_profile_is_refused_in_a_line(data, says):
    with pytest.raises(SteerError, match=says) as e:
        uploaded_profile(data, "sent.yaml")
    assert "\n" not in str(e.value)

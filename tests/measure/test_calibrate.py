"""Safe ranges: on a tiny model with sliders whose range is known by construction, and on the default merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_chat import hooks_on, save_tiny_chat
from whole_vocabulary import kl

from steer.core.direction import Direction
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import PRESETS, Sampler
from steer.core.slider import Slider
from steer.core.trait import NeutralPrompts
from steer.errors import MismatchError, UsageError
from steer.measure.calibrate import (
    LADDER,
    LONGEST,
    Limits,
    NeutralCosts,
    SliderCalibration,
    Trial,
    TriedAmount,
    calibrate,
)
from steer.measure.harness import mean_repetition
from steer.model.sliders import BUDGET, as_edit
from steer.model.steered import SteeredModel, load
from steer.verbs.tables import calibration_table

SITE = 2
SOON = Sampler(temperature=1.0, repetition_penalty=1.0)
ANY_KL = 1e6
"""A limit that nothing reaches."""


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("calibrate") / "chat", max_position_embeddings=256))


@pytest.fixture(scope="module")
def lie(model: SteeredModel) -> Direction:
    """A direction that makes the model say one word: far along it, replies are nothing else."""
    unembedding = model.hf.lm_head.weight.detach() * model.hf.base_model.norm.weight.detach()
    word = unembedding[model.tokenizer.convert_tokens_to_ids("lie")] - unembedding.mean(0)
    return Direction("lie", SITE, word, mean=0.2, std=0.5, with_mean=1.0, without_mean=0.0, residual_norm=10.0)


def test_costs_are_measured_after_the_thoughts_of_a_model_that_thinks_unasked(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    marks = ("<think>", "</think>")
    place = save_tiny_chat(tiny_llama, tmp_path / "chat", marks=marks, max_position_embeddings=256)
    thinker = load(place)
    open_, close = thinker.encode(" ".join(marks))
    costs = NeutralCosts(thinker, replace(SOON, logit_bias=((open_, 6.0), (close, 4.0), (2, -100.0))))
    thought = [(context, text) for context, text in costs.replies if context[-1] == close]
    assert thought
    assert all(open_ in context for context, _ in thought)
    assert all(text[0] != open_ for context, text in costs.replies if context[-1] != close)
    endless = replace(SOON, logit_bias=((open_, 100.0),))
    with pytest.raises(UsageError, match=r"expected replies to neutral prompts, found .* thoughts left out"):
        NeutralCosts(thinker, endless)


@pytest.fixture
def profile(lie: Direction, tmp_path: Path) -> Callable[..., Profile]:
    """`profile(operation, **changes of the direction)`: one slider on it."""

    def make(operation: str | None = None, *, sampler: Sampler = SOON, when: ScheduleSpec | None = None, **changes):
        replace(lie, **changes).save(tmp_path / "lie.safetensors")
        entry = ProfileSlider("lie.safetensors", 1.0, operation, when, range=(-9.0, 9.0))
        return Profile("tried", sampler=sampler, sliders=(entry,), folder=tmp_path)

    return make


def only(model: SteeredModel, profile: Profile, **limits: float) -> SliderCalibration:
    return calibrate(model, profile, limits=Limits(**limits)).sliders[0]


@pytest.fixture(scope="module")
def costs(model: SteeredModel) -> NeutralCosts:
    return NeutralCosts(model, SOON)


def direct_kl(costs: NeutralCosts, slider: Slider, amount: float) -> float:
    """The same divergence with one ordinary forward pass a text and no batch."""
    model, out = costs.model, []
    for texts in (costs.replies, costs.prose):
        sides = []
        for edit in (None, as_edit(model, [(slider, amount)])):
            with model.steering.applied([edit]), torch.inference_mode():
                whole = [model.hf(torch.tensor([[*a, *b]])).logits[0].log_softmax(-1) for a, b in texts]
            sides.append([x[len(a) - 1 : -1] for x, (a, _) in zip(whole, texts, strict=True)])
        out.append(kl(*sides))
    return max(out)


def test_the_range_of_add_ends_where_the_divergence_reaches_its_limit(model, lie, profile, costs):
    found = only(model, profile(), kl=0.05, repetition=1.0)
    assert found.ends == ("KL", "KL")
    assert found.range is not None
    low, high = found.range
    assert low < 0 < high
    for end in found.range:
        assert found.at(end).kl == pytest.approx(direct_kl(costs, Slider(lie), end), rel=1e-3)
        assert direct_kl(costs, Slider(lie), end) <= 0.05 < direct_kl(costs, Slider(lie), end * 1.1)


def test_every_tested_amount_inside_the_range_passed_and_the_next_one_did_not(model, profile):
    found = only(model, profile(), kl=0.05, repetition=1.0)
    assert found.range is not None
    low, high = found.range
    inside = [t for t in found.tested if low <= t.amount <= high]
    assert all(t.passed and t.kl <= 0.05 for t in inside)
    assert not next(t for t in found.tested if t.amount > high).passed
    assert not next(t for t in reversed(found.tested) if t.amount < low).passed
    assert found.at(0.0).kl == 0.0


def test_an_amount_that_failed_ends_the_range_though_one_beyond_it_passed(lie, costs):
    trial = Trial(costs, Slider(lie), Limits(kl=1.0, repetition=0.1))
    ample = costs.repetition + 0.2

    def end(*found: tuple[float, float, float | None]) -> tuple[float, str]:
        trial.tested = {a: TriedAmount(a, None, cost, 0.0, again) for a, cost, again in ((0.0, 0.0, 0.0), *found)}
        return trial.end(1)

    assert end((1.0, 0.5, 0.0), (2.0, 1.5, None), (3.0, 0.8, 0.0)) == (1.0, "KL")
    assert end((1.0, 0.5, 0.0), (2.0, 0.6, ample), (3.0, 0.8, 0.0)) == (1.0, "repetition")
    # Where no replies were written the range cannot end.
    assert end((1.0, 0.5, 0.0), (2.0, 0.6, None), (3.0, 0.7, ample)) == (1.0, "repetition")
    assert end((1.0, 0.5, 0.0), (2.0, 0.6, None), (3.0, 0.7, 0.0)) == (3.0, "share")


def test_no_amount_is_tried_beyond_the_share_at_which_the_chat_warns(model, profile):
    found = only(model, profile(residual_norm=0.1), kl=ANY_KL, repetition=1.0)
    assert found.range == (-0.08, 0.08)
    assert found.ends == ("share", "share")
    assert max(t.share or 0.0 for t in found.tested) == pytest.approx(BUDGET)
    uneven = only(model, profile(residual_norm=0.7777), kl=ANY_KL, repetition=1.0)
    assert BUDGET - 0.02 < max(t.share or 0.0 for t in uneven.tested) <= BUDGET


def test_a_slider_that_moves_nothing_ends_at_the_furthest_amount_tried(model, profile):
    found = only(model, profile(with_mean=0.0))
    assert (found.range, found.ends) == ((-LONGEST, LONGEST), ("distance", "distance"))
    assert {t.kl for t in found.tested} == {0.0}


def test_replies_that_repeat_one_word_end_the_range_where_the_divergence_does_not(model, profile, costs):
    found = only(model, profile(residual_norm=50.0), kl=ANY_KL, repetition=0.1)
    assert found.range is not None
    assert found.ends is not None
    high = found.range[1]
    assert found.ends[1] == "repetition"
    worse = next(t for t in found.tested if t.amount > high)
    assert worse.repetition is not None
    assert worse.repetition > costs.repetition + 0.1 >= (found.at(high).repetition or 0.0)
    # Refined: the amount beyond is a quarter step away, not the ladder's next.
    assert worse.amount - high < 40 / 4


def test_repetition_is_that_of_the_replies_which_the_profiles_sampler_draws(model, lie, profile):
    costs = NeutralCosts(model, replace(SOON, seed=3))
    edit = as_edit(model, [(Slider(lie), 4.0)])
    prompts = NeutralPrompts.load().held_out[-24:]
    chats = [[{"role": "user", "content": p}] for p in prompts]
    alone = model.replies(chats, replace(SOON, seed=3, max_new_tokens=48), [edit] * len(chats))
    assert costs.repetitions([None, edit]) == [costs.repetition, mean_repetition(alone)]
    greedy = NeutralCosts(model, PRESETS["greedy"])
    assert greedy.repetition > costs.repetition


def test_a_clamps_range_lies_around_the_amount_that_costs_least(model, profile):
    cheapest = []
    for mean in (0.0, 3.0):
        found = only(model, profile("clamp", mean=mean), kl=0.03, repetition=1.0)
        assert found.range is not None
        assert found.range[0] < found.centre < found.range[1]
        assert 0 < found.at(found.centre).kl <= min(t.kl for t in found.tested if t.repetition is not None)
        cheapest.append(found)
    # Wherever the mean of neutral chat is said to be.
    near, far = cheapest
    assert far.range == pytest.approx(near.range, abs=0.5)


def test_a_clamp_that_costs_too_much_where_it_does_least_has_no_range(model, profile):
    tried = profile("clamp")
    found = calibrate(model, tried, limits=Limits(kl=1e-6))
    assert (found.sliders[0].range, found.sliders[0].ends, found.sliders[0].inside) == (None, None, False)
    assert found.applied(tried).sliders[0].range is None
    assert "no range" in calibration_table(found)


@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_a_caps_range_reaches_from_where_it_caps_nothing_to_where_it_costs_too_much(model, profile, gap):
    found = only(model, profile("cap", mean=0.0, std=2.0, with_mean=gap), kl=0.02, repetition=1.0)
    assert found.range is not None
    assert found.ends is not None
    top = 1 if gap > 0 else 0
    assert found.range[top] == found.centre
    assert found.ends[top] == "operation"
    assert found.ends[1 - top] == "KL"
    assert found.at(found.centre).kl < 0.002 < found.at(found.range[1 - top]).kl <= 0.02


def test_ablate_stays_within_0_and_1_and_scale_goes_both_ways_from_1(model, profile):
    gone = only(model, profile("ablate"), kl=ANY_KL, repetition=1.0)
    assert (gone.range, gone.ends) == ((0.0, 1.0), ("operation", "operation"))
    part = only(model, profile("ablate"), kl=gone.at(1.0).kl / 2, repetition=1.0)
    assert part.range is not None
    assert part.range[0] == 0 < part.range[1] < 1
    scaled = only(model, profile("scale"), kl=0.2, repetition=1.0)
    assert scaled.range is not None
    assert scaled.range[0] < 1 < scaled.range[1]


def test_a_slider_counts_as_acting_on_every_token_and_when_it_is_switched_off(model, profile):
    always = profile()
    late = profile(when=ScheduleSpec("reply", after=200))
    late = replace(late, sliders=(replace(late.sliders[0], enabled=False),))
    assert calibrate(model, late).sliders == calibrate(model, always).sliders


def test_sliders_are_moved_alone_and_those_that_stand_come_back(model, lie, profile):
    alone = calibrate(model, profile())
    model.sliders.put(replace(lie, name="other"), 3.0)
    try:
        assert calibrate(model, profile()).as_json() == alone.as_json()
        assert dict(model.sliders) == {"other": 3.0}
        assert hooks_on(model) == 1
    finally:
        model.sliders.replace({})
    assert hooks_on(model) == 0


def test_the_result_is_written_into_the_profile_and_is_json(model, profile, tmp_path):
    tried = profile()
    counts: list[int] = []
    found = calibrate(model, tried, on_tokens=counts.append)
    written = Profile.load(found.applied(tried).save(tmp_path / "tried.yaml"))
    assert written.sliders[0].range == found.sliders[0].range != tried.sliders[0].range
    assert sum(counts) == found.tokens > 0
    data = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert data["sliders"][0]["range"] == list(found.sliders[0].range or ())
    assert len(data["sliders"][0]["tested"]) >= 2 * len(LADDER)
    assert "lie" in calibration_table(found)


def test_what_is_not_finite_is_beyond_the_limit_and_null_in_json():
    for chat, prose in ((float("inf"), 0.01), (0.01, float("inf")), (float("nan"), 0.01), (0.01, float("nan"))):
        tried = TriedAmount(1.0, None, chat, prose)
        assert not tried.kl <= Limits().kl
        assert None in (tried.as_json()["kl_chat"], tried.as_json()["kl_prose"])


def test_prompts_are_of_the_split_that_finding_never_sees(costs):
    asked = set(costs.prompts)
    neutral = NeutralPrompts.load()
    assert asked <= set(neutral.held_out)
    assert not asked & set(neutral.fit)


@pytest.mark.parametrize("limits", [{"kl": 0.0}, {"kl": float("nan")}, {"repetition": -0.1}])
def test_a_limit_that_nothing_keeps_to_is_a_usage_error(limits):
    with pytest.raises(UsageError, match=f"{next(iter(limits))}: expected a limit above 0"):
        Limits(**limits)


def test_a_profile_without_sliders_and_a_direction_of_another_model_are_refused(model, profile):
    with pytest.raises(UsageError, match=r"'tried'.*found none"):
        calibrate(model, replace(profile(), sliders=()))
    counts: list[int] = []
    with pytest.raises(MismatchError, match="width 16"):
        calibrate(model, profile(vector=torch.ones(16)), on_tokens=counts.append)
    assert not counts


@pytest.mark.model
def test_the_default_merges_moralizing_has_a_range_on_both_sides():
    place = Path(__file__).parents[2] / "demo" / "merged"
    if not place.is_dir():
        pytest.skip("make demo writes the default merge")
    found = calibrate(load(place), Profile("shipped", sliders=(ProfileSlider("moralizing", -1.0),)))
    slider = found.sliders[0]
    assert slider.range is not None
    assert -3 < slider.range[0] < -1 < 0 < 1 < slider.range[1] < 3
    for side, end in zip((-1, 1), slider.range, strict=True):
        assert slider.at(end).kl <= found.limits.kl
        assert (slider.at(end).repetition or 0.0) <= found.repetition + found.limits.repetition
        beyond = [t for t in slider.tested if t.amount * side > end * side]
        assert all(not t.passed and t.kl > found.limits.kl for t in beyond)
    assert slider.inside
    # Under a minute on two quiet cores, at the rate the demo measures.
    assert found.tokens < 45_000

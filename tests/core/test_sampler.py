"""Sampler settings: every wrong one is named, presets are what they say, stages run only where they do something."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from steer.core.sampler import CHAT, MEASURE, ORDER, PRESETS, TEMPERATURE_LAST, Sampler, preset
from steer.errors import UsageError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 2.5, "whole number"),
        ("max_new_tokens", True, "whole number"),
        ("temperature", -0.1, "0 (greedy)"),
        ("temperature", 1e-9, "0 (greedy)"),
        ("temperature", float("nan"), "number"),
        ("temperature", float("inf"), "number"),
        ("temperature", "hot", "number"),
        ("temperature", None, "number"),
        ("top_k", -1, "at least 0"),
        ("top_k", 40.0, "whole number"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.01, "at most 1"),
        ("min_p", -0.1, "at least 0"),
        ("min_p", 1.1, "at most 1"),
        ("typical_p", 0, "above 0"),
        ("repetition_penalty", 0, "at least 1e-06"),
        ("frequency_penalty", 2.1, "at most 2"),
        ("presence_penalty", -2.1, "at least -2"),
        ("dry_multiplier", -1, "at least 0"),
        ("dry_base", 0.9, "at least 1"),
        ("dry_allowed_length", -1, "at least 0"),
        ("dry_range", -1, "at least 0"),
        ("dry_sequence_breakers", "\n", "a list"),
        ("dry_sequence_breakers", ["\n", ""], "expected text"),
        ("dry_sequence_breakers", [1], "expected text"),
        ("xtc_probability", 1.5, "at most 1"),
        ("xtc_threshold", -0.5, "at least 0"),
        ("logit_bias", 3, "a list"),
        ("logit_bias", [3], "a list"),
        ("logit_bias", [(1, 2), (1, 3)], "different"),
        ("logit_bias", {"hello": 1}, "whole number"),
        ("logit_bias", {-1: 1}, "at least 0"),
        ("logit_bias", {True: 1}, "whole number"),
        ("logit_bias", {5: 101}, "at most 100"),
        ("logit_bias", {5: float("nan")}, "finite number"),
        ("order", "penalties", "a list"),
        ("order", ["penalties", "top_a"], "temperature, top_k"),
        ("order", [*ORDER, "dry"], "at most once"),
        ("order", [["dry"]], "one of penalties"),
        ("seed", 1.5, "whole number"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_what_was_expected(name, value, expected):
    with pytest.raises(UsageError) as caught:
        Sampler(**{name: value})
    line = str(caught.value)
    assert re.match(rf"{name}(\[\d+\])*: expected ", line)
    assert expected in line
    assert "found" in line
    assert "\n" not in line


def test_every_field_is_checked():
    for field in fields(Sampler):
        with pytest.raises(UsageError, match=f"^{field.name}: "):
            Sampler(**{field.name: object()})


def test_a_stage_that_is_set_but_left_out_of_the_order_is_refused():
    without = tuple(s for s in ORDER if s != "min_p")
    with pytest.raises(UsageError, match=r"order: expected min_p in it, because min_p 0\.1 is set"):
        Sampler(min_p=0.1, order=without)
    assert Sampler(order=without).order == without
    with pytest.raises(UsageError, match=r"presence_penalty 0\.5 is set, found only nothing"):
        Sampler(temperature=1.0, repetition_penalty=1.0, presence_penalty=0.5, order=())


def test_lists_and_mappings_become_values_that_compare_and_hash():
    given = Sampler(order=list(ORDER), dry_sequence_breakers=["."], logit_bias={"7": -100, 3: 1.5})
    assert given == Sampler(dry_sequence_breakers=(".",), logit_bias=((7, -100.0), (3, 1.5)))
    assert hash(given) == hash(replace(given))
    assert Sampler(**vars(given)) == given


def test_settings_that_were_there_before_have_their_defaults():
    assert (Sampler().temperature, Sampler().repetition_penalty, Sampler().max_new_tokens) == (0.8, 1.05, 256)
    assert Sampler().stages == ("penalties", "temperature")
    assert MEASURE.stages == ("penalties", "temperature", "top_k")
    assert PRESETS["plain"] is CHAT


def test_only_stages_that_do_something_are_run_and_none_that_shapes_a_greedy_choice():
    everything = Sampler(
        top_k=5, top_p=0.9, min_p=0.1, typical_p=0.9, frequency_penalty=0.1, dry_multiplier=0.8, xtc_probability=0.5
    )
    assert everything.stages == ORDER
    assert replace(everything, order=TEMPERATURE_LAST).stages == TEMPERATURE_LAST
    assert replace(everything, temperature=0).stages == ("penalties", "dry")
    assert PRESETS["greedy"].stages == ()


def test_presets_are_what_they_are_said_to_be():
    assert list(PRESETS) == ["greedy", "plain", "wild", "near-greedy"]
    plain, wild, near = PRESETS["plain"], PRESETS["wild"], PRESETS["near-greedy"]
    assert (plain.temperature, plain.min_p, plain.repetition_penalty) == (1.0, 0.1, 1.02)
    assert wild == replace(plain, temperature=1.4)
    assert (near.temperature, near.min_p, near.repetition_penalty) == (3.0, 0.5, 1.03)
    assert near.stages == ("penalties", "min_p", "temperature")
    assert near.temperature_last
    assert not plain.temperature_last
    assert preset("wild") is wild


def test_an_unknown_preset_names_those_there_are_and_the_nearest():
    with pytest.raises(UsageError, match=r"one of greedy, plain, wild, near-greedy, found 'plane'; did you mean plain"):
        preset("plane")

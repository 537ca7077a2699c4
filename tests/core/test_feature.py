"""A feature and what can be done to it: amounts have a unit, and what makes no sense is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steer.core.dictionary import Dictionary
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.errors import MismatchError, UnsupportedError, UsageError


@pytest.fixture
def dictionary() -> Dictionary:
    """Three latents on a stream of width 4, decoder rows along the axes."""
    W_dec = torch.tensor([[2.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 1.0, 0]])
    return Dictionary("standard", W_dec.T.clone(), torch.zeros(3), W_dec, torch.zeros(4), site=1, norm=10.0)


@pytest.fixture
def pair(dictionary: Dictionary) -> Feature:
    return Feature("pair", dictionary, (0, 1), (2.0, -1.0))


def test_an_edit_needs_amounts_and_is_not_changed_by_replace(pair):
    with pytest.raises(UsageError, match="'pair': expected an amount, found none"):
        Edit.of([Slider(pair)])
    with pytest.raises(TypeError):
        replace(Edit.of([Slider(pair, "add", 1.0)]), strength=0.5)  # it would come back unchanged


def test_amount_1_of_add_is_one_unit_of_every_latent(pair):
    assert pair.direction.gap * pair.direction.vector.tolist()[0] == pytest.approx(4.0)
    shift = pair.direction.gap * pair.direction.vector
    torch.testing.assert_close(shift, torch.tensor([4.0, -3.0, 0, 0]))
    assert pair.share(-2) == pytest.approx(1.0)
    assert Slider(pair).share(-2) == pytest.approx(1.0)
    assert math.isnan(Feature("f", replace(pair.dictionary, norm=None), (0,), (1.0,)).share(1))


def test_coefficients_say_what_each_operation_does(dictionary):
    feature = Feature("f", dictionary, (0, 2), (2.0, 0.5))

    def coefficients(operation, amount):
        return Slider(feature, operation, amount).coefficients

    free = math.inf
    assert coefficients("add", 1.5) == ((0.0, 3.0, free), (0.0, 0.75, free))
    assert coefficients("clamp", 1.5) == ((-1.0, 3.0, free), (-1.0, 0.75, free))
    assert coefficients("cap", 1.5) == ((-1.0, 3.0, 0.0), (-1.0, 0.75, 0.0))
    assert coefficients("scale", 1.5) == ((0.5, 0.0, free), (0.5, 0.0, free))
    assert coefficients("ablate", 0.25) == ((-0.25, 0.0, free), (-0.25, 0.0, free))


@pytest.mark.parametrize(
    ("operation", "neutral"), [("add", 0.0), ("ablate", 0.0), ("scale", 1.0), ("clamp", None), ("cap", None)]
)
def test_the_neutral_amount_depends_on_the_operation(dictionary, operation, neutral):
    slider = Slider(Feature("f", dictionary, (0,), (1.0,)), operation)
    assert slider.neutral == neutral
    if neutral is not None:
        assert Edit.of([slider.at(neutral)]) is None
    moving = {0.0, 1.0} - {neutral}
    for amount in moving:
        edit = Edit.of([slider.at(amount)])
        assert edit is not None
        assert [(m.operation, m.amount) for m in edit.as_moves()] == [(operation, amount)]


def test_a_negative_unit_is_for_add_alone(pair):
    Slider(pair, "add")
    for operation in ("clamp", "cap", "scale", "ablate"):
        with pytest.raises(UsageError, match="positive units"):
            Slider(pair, operation)
        with pytest.raises(UsageError, match="positive units"):
            Slider(pair, operation, 1.0)


@pytest.mark.parametrize(
    ("indices", "units"),
    [((), ()), ((0, 0), (1.0, 1.0)), ((0,), (1.0, 2.0)), ((3,), (1.0,)), ((-1,), (1.0,)), ((0,), (0.0,)),
     ((0,), (math.nan,))],
)  # fmt: skip
def test_latents_that_are_none_and_units_that_are_none_are_refused(dictionary, indices, units):
    with pytest.raises(UsageError, match="feature 'f'"):
        Feature("f", dictionary, indices, units)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_a_dictionary_that_normalises_inputs_has_no_fixed_direction(dictionary, normalize):
    with pytest.raises(UnsupportedError, match=normalize):
        Feature("f", replace(dictionary, normalize=normalize), (0,), (1.0,))


@pytest.mark.parametrize(("operation", "amount"), [("ablate", 1.5), ("add", math.inf), ("clamp", "much"), ("cup", 1)])
def test_an_amount_or_operation_out_of_range_is_a_usage_error(dictionary, operation, amount):
    with pytest.raises(UsageError, match="slider 'f'"):
        Slider(Feature("f", dictionary, (0,), (1.0,)), operation, amount)


def test_a_width_that_does_not_fit_names_both(pair):
    pair.check_width(4, "model")
    with pytest.raises(MismatchError, match="width 4, model has residual width 8"):
        pair.check_width(8, "model")


def test_two_moves_that_read_one_latent_are_refused_and_adds_are_not(dictionary):
    one, other = Feature("one", dictionary, (0, 1), (1.0, 1.0)), Feature("other", dictionary, (1,), (1.0,))
    Edit(moves=(Slider(one, "clamp", 1.0), Slider(other, "add", 1.0)))
    Edit(moves=(Slider(one, "clamp", 1.0), Slider(other, "scale", 1.0)))
    with pytest.raises(UsageError, match=r"'one' and 'other'.*latent 1"):
        Edit(moves=(Slider(one, "clamp", 1.0), Slider(other, "ablate", 1.0)))


def test_an_edit_shows_its_moves(pair):
    edit = Edit(moves=(Slider(pair, "add", -2.0),))
    (move,) = edit.describe()["moves"]
    assert (move["name"], move["latents"], move["operation"], move["amount"]) == ("pair", [0, 1], "add", -2.0)
    assert move["share_of_residual_norm"] == 1.0
    assert "moves" not in Edit((pair.direction,)).describe()

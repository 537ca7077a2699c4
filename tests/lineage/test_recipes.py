"""Moves on recipes: what each makes of its parent's recipe, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import UsageError
from steer.lineage.lineage import Move, Node
from steer.lineage.recipes import apply, check_start, child, describe, models_of, same_merge, short_name

STOCK: dict[str, Any] = {
    "merge_method": "model_stock",
    "base_model": "/m/base",
    "models": [{"model": "/m/a"}, {"model": "base+/m/tunes/b"}],
    "dtype": "float32",
}
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "/m/a", "parameters": {"weight": 0.5}}, {"model": "/m/b", "parameters": {"weight": 1.5}}],
}
CALM = {"name": "calm", "sliders": [{"slider": "moralizing", "amount": -1.0}]}


def entries(recipe: dict[str, Any]) -> dict[str, Any]:
    return {e["model"]: e.get("parameters") for e in recipe["models"]}


def test_a_move_changes_what_it_says_and_leaves_its_parent_alone() -> None:
    before = str(STOCK)
    added = apply(Move("add", "/m/c"), STOCK)
    assert added == {**STOCK, "models": [*STOCK["models"], {"model": "/m/c"}]}
    assert apply(Move("remove", "/m/c"), added) == STOCK
    assert str(STOCK) == before


def test_a_new_model_gets_the_mean_weight_of_the_others_or_its_own() -> None:
    assert entries(apply(Move("add", "/m/c"), LINEAR))["/m/c"] == {"weight": 1.0}
    assert entries(apply(Move("add", "/m/c", 0.25), LINEAR))["/m/c"] == {"weight": 0.25}
    everywhere = {**LINEAR, "models": [{"model": "/m/a"}], "parameters": {"weight": 2.0}}
    assert entries(apply(Move("add", "/m/c"), everywhere))["/m/c"] is None


def test_a_model_that_becomes_the_base_leaves_its_place_to_the_old_base() -> None:
    swapped = apply(Move("base", "/m/a"), STOCK)
    assert (swapped["base_model"], models_of(swapped)) == ("/m/a", ["/m/base", "base+/m/tunes/b"])
    replaced = apply(Move("base", "/m/c"), STOCK)
    assert (replaced["base_model"], models_of(replaced)) == ("/m/c", models_of(STOCK))


def test_a_method_keeps_what_it_knows_and_gets_the_weights_that_it_needs() -> None:
    ties = apply(Move("method", None, "ties", {"density": 0.5}), STOCK)
    assert (ties["merge_method"], ties["parameters"]) == ("ties", {"density": 0.5})
    assert set(map(str, entries(ties).values())) == {"{'weight': 1.0}"}
    assert entries(apply(Move("weight", "/m/a", 0.3), ties))["/m/a"] == {"weight": 0.3}
    back = apply(Move("method", None, "model_stock"), ties)
    assert back == STOCK


def test_a_profile_is_carried_beside_the_recipe_and_inherited() -> None:
    parent = Node("0", Move("start"), "given", STOCK)
    carried = child(parent, "1a", Move("profile", profile=CALM), "by hand")
    assert (carried.recipe, carried.profile) == (STOCK, CALM)
    heir = child(carried, "2a", Move("add", "/m/c"), "by hand")
    assert heir.profile == CALM
    assert child(heir, "3a", Move("profile"), "by hand").profile is None


@pytest.mark.parametrize(
    ("recipe", "move", "words"),
    [
        (STOCK, Move("add", "/m/a"), "add a: expected a model that the recipe has not, found one of its models"),
        (STOCK, Move("add", "/m/base"), "found its base"),
        (STOCK, Move("add"), "expected a model, found none"),
        (STOCK, Move("add", "/m/c", 0.5), "expected a method with weights, found model_stock"),
        (STOCK, Move("remove", "/m/zzz"), r"expected one of a, base\+b, found zzz"),
        (STOCK, Move("remove", "/m/base"), "it is the base; swap the base first"),
        (STOCK, Move("remove", "/m/a"), "mergekit does not accept it: model_stock: .* at least 3 inputs"),
        ({**LINEAR, "models": LINEAR["models"][:1]}, Move("remove", "/m/a"), "found its last one"),
        (STOCK, Move("base", "/m/base"), "expected a change"),
        (LINEAR, Move("base", "/m/a"), "expected a method with a base, found linear"),
        (STOCK, Move("weight", "/m/a", 0.5), "expected a method with weights"),
        (LINEAR, Move("weight", "/m/a", 0.5), "expected a change"),
        (LINEAR, Move("weight", "/m/a", "lots"), "expected a number as weight, found 'lots'"),
        (LINEAR, Move("weight", "/m/zzz", 2.0), "expected one of a, b, found zzz"),
        (STOCK, Move("method", None, "magic"), "expected one of .*linear.*, found 'magic'"),
        (STOCK, Move("method", None, 3.0), "expected the name of a merge method"),
        (STOCK, Move("method", None, "slerp"), "expected the parameter t of slerp"),
        (STOCK, Move("method", None, "nearswap", {"t": 0.1}), "exactly 2 inputs; got 3"),
        (LINEAR, Move("method", None, "model_stock"), "requires a base"),
        (STOCK, Move("start"), "expected a move on a recipe"),
    ],
)  # fmt: skip
def test_what_a_recipe_does_not_allow_is_refused_in_one_line(recipe: Any, move: Move, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        apply(move, recipe)
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_there_already_is_no_move() -> None:
    with pytest.raises(UsageError, match="expected a change"):
        child(Node("0", Move("start"), "given", STOCK), "1a", Move("profile"), "by hand")


def test_a_start_without_models_is_refused() -> None:
    with pytest.raises(UsageError, match=r"start\.yml: expected a recipe with models, found slices"):
        check_start({"merge_method": "passthrough", "slices": []}, "start.yml")
    with pytest.raises(UsageError, match=r"start\.yml: expected each model once, found a twice"):
        check_start({**STOCK, "models": [{"model": "/m/a"}, {"model": "/m/a"}, {"model": "/m/b"}]}, "start.yml")


def test_the_order_of_models_makes_no_other_merge() -> None:
    turned = {**STOCK, "models": STOCK["models"][::-1]}
    assert same_merge(turned, None) == same_merge(STOCK, None)
    assert same_merge(STOCK, CALM) != same_merge(STOCK, None)
    assert same_merge({**STOCK, "dtype": "bfloat16"}, None) != same_merge(STOCK, None)


def test_moves_are_said_in_words() -> None:
    said = [
        describe(m)
        for m in (
            Move("start"),
            Move("add", "smollm2-135m-instruct+/m/tunes/calm"),
            Move("add", "/m/a", 0.25),
            Move("remove", "owner/name"),
            Move("base", "/m/a"),
            Move("weight", "/m/a", 2.0),
            Move("method", None, "ties", {"density": 0.5}),
            Move("profile", profile=CALM),
            Move("profile"),
        )
    ]
    assert said == [
        "start",
        "add smollm2-135m-instruct+calm",
        "add a with weight 0.25",
        "remove name",
        "swap the base to a",
        "weight of a 2",
        "merge by ties (density 0.5)",
        "carry the profile calm",
        "carry no profile",
    ]
    assert short_name("/m/a") == "a"

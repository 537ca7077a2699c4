"""YAML of strangers: as large as its file says, and every mistake in it one line."""

from __future__ import annotations

import time

import pytest

from steer.core.small_files import load_yaml
from steer.errors import SteerError

BOMB = "\n".join(
    [f"a0: &a0 [{', '.join('x' * 9)}]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
)
MERGED = "\n".join(
    ["m0: &m0 {k: v}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 30))]
)
CHAIN = "\n".join(["c0: &c0 [x]", *(f"c{i}: &c{i} [*c{i - 1}]" for i in range(1, 60))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 50,000 values"),
        (MERGED, "more than 50,000 values"),
        (CHAIN, "more than 32 levels"),
        ("a: &a [*a]", "an alias in line 1 to a value that contains it"),
        ("a: &a {b: *a}", "an alias in line 1 to a value that contains it"),
        ("a: *nothing", "undefined alias"),
        ("[" * 100_000, "more than 32 levels"),
        ("{a: " * 100_000, "more than 32 levels"),
        ("- " * 100_000, "more than 32 levels"),
        ("a: !!timestamp x", "expected a recipe in YAML"),
        ("a: !!int ''", "expected a recipe in YAML"),
        ("a: !!float ''", "expected a recipe in YAML"),
        ("a: !!bool x", "expected a recipe in YAML"),
        ("a: !!binary é", "expected a recipe in YAML"),
        ("a: 2024-02-30", "expected a recipe in YAML"),
        ("a: !!python/object/apply:os.system [id]", "expected a recipe in YAML"),
        ("a: 1\na: 2", "'a' a second time"),
        ("? [a, b]\n: c", "expected a recipe in YAML"),
        ("a: \x1b[2J", "expected a recipe in YAML"),
        ('a: x\nb: ["\\ud800"]', "half a surrogate pair (\\ud800 to \\udfff) in a text in line 2"),
        ('"\\udc00": x', "half a surrogate pair"),
        ("- x\n" * 60_000, "more than 50,000 values"),
    ],
)
@pytest.mark.parametrize("aliases", [True, False])
def test_a_stranger_s_yaml_is_one_line_and_soon(text, says, aliases):
    began = time.monotonic()
    with pytest.raises(SteerError) as caught:
        load_yaml(text.encode(), "r.yml", "a recipe", aliases=aliases)
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert message.startswith("r.yml: expected a recipe in YAML, found ")
    assert message.isprintable()
    assert len(message) < 300
    assert says in message or "an anchor or alias" in message


def test_aliases_that_a_recipe_has_mean_what_yaml_says():
    text = """
models:
- &a {model: x, parameters: &p {weight: 1, density: 2}}
- {model: y, parameters: {<<: *p, weight: 3}}
- *a
"""
    a = {"model": "x", "parameters": {"weight": 1, "density": 2}}
    wanted = {"models": [a, {"model": "y", "parameters": {"weight": 3, "density": 2}}, a]}
    assert load_yaml(text.encode(), "r.yml", "a recipe", aliases=True) == wanted
    twice = "x: {y: &b {<<: &a {k: 1}, k: 2}}\nz: {<<: *b, k: 3}\nw: *b\n"
    assert load_yaml(twice.encode(), "r.yml", "a recipe", aliases=True)["w"] == {"k": 2}

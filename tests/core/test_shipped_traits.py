"""The traits that ship are whole, each with two ends that people understand; every mistake in a file is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.core.trait import TopicPool, Trait, shipped_traits
from steer.errors import SteerError

GOOD: dict[str, Any] = {"name": "dry", "summary": "Says it dryly.", "with": "Be dry.", "without": "Be warm."}


def test_at_least_sixteen_traits_ship_and_no_two_say_the_same() -> None:
    traits = [Trait.load(name) for name in shipped_traits()]
    assert len(traits) >= 16
    for values in zip(*((t.summary, t.with_instruction, t.without_instruction, t.low_end, t.high_end) for t in traits),
                      strict=True):  # fmt: skip
        assert len({v.casefold() for v in values}) == len(traits)


@pytest.mark.parametrize("name", shipped_traits())
def test_a_shipped_trait_is_valid_and_says_what_its_ends_do(name: str) -> None:
    file = Path(__file__).parents[2] / "steer" / "traits" / f"{name}.yaml"
    assert Trait.mistakes(file) == []
    trait = Trait.load(name)
    assert trait.name == name
    assert trait.without_instruction
    for end in (trait.low_end, trait.high_end):
        assert end == (end or "").strip().removesuffix(".") != ""
    assert set(yaml.safe_load(file.read_text("utf-8"))) >= {"low_end", "high_end"}
    if name not in ("moralizing", "compliance", "initiative"):  # whose files say why they have other topics
        assert trait.fit == TopicPool.load().fit


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"low_end": "stays dry", "high_end": "is warm"}, []),
        ({"with": None, "markers": [" "]}, ["with: expected a value, found none; add it",
                                            "markers[0]: expected text, found none; fill it in"]),
        ({"low_end": "x" * 41, "high_end": "a\nb"}, [
            "low_end: expected at most 40 characters, found 41; shorten it",
            "high_end: expected plain text, found the character '\\n'; take it out"]),
        ({"marker": ["a"], "topics": 3, "name": "a/b"}, [
            "expected keys among name, summary, with, without, markers, fit, held_out, low_end, high_end, found "
            "'marker'; did you mean 'markers'?",
            "expected keys among name, summary, with, without, markers, fit, held_out, low_end, high_end, found "
            "'topics'; take it out",
            "name: expected a name of at most 64 letters, digits, '_', '.' and '-', found 'a/b'; rename it"]),
        ({"fit": ["One.", "one.", "Two."], "held_out": ["Two."], "without": "be  DRY."}, [
            "expected opposite instructions under 'with' and 'without', found the same",
            "topic 'one.' is twice under 'fit'; expected different, unseen topics",
            "expected at least 4 topics under 'fit', found 3; add some",
            "topic 'Two.' is in both 'fit' and 'held_out'; expected different, unseen topics",
            "expected at least 2 topics under 'held_out', found 1; add some"]),
        ({"fit": [f"Topic {n}." for n in range(9)]}, [
            "expected topics under 'fit' and 'held_out', found no 'held_out'; add it"]),
    ],
)  # fmt: skip
def test_every_mistake_in_a_file_is_a_line_and_load_raises_one_of_them(
    tmp_path: Path, change: dict[str, Any], found: list[str]
) -> None:
    file = tmp_path / "dry.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (GOOD | change).items() if v is not None}))
    lines = [f"{file}: {line}" for line in found]
    assert Trait.mistakes(file) == lines
    if lines:
        with pytest.raises(SteerError) as caught:
            Trait.load(file)
        assert str(caught.value) in lines
    else:
        Trait.load(file)


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: [1\n", b"\xff\xfe\x00", b"text", b"1: a\nnull: b\n"])
def test_a_file_of_another_kind_has_lines_too(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "dry.yaml"
    file.write_bytes(content)
    lines = Trait.mistakes(file)
    assert lines
    assert all(line.startswith(f"{file}: ") and "expected" in line and "\n" not in line for line in lines)
    assert Trait.mistakes(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: expected a trait, found none; check "
                                                      "the path"]  # fmt: skip

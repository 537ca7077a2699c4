"""Traits: the ones that ship keep what is measured unseen, and a file that is no trait says why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.core.trait import NeutralPrompts, Trait, shipped_traits
from steer.errors import SteerError, UsageError

TUNES = Path(__file__).parents[2] / "examples" / "merge" / "tunes"
GOOD: dict[str, Any] = {
    "name": "dry",
    "summary": "Says it dryly.",
    "with": "Be dry.",
    "without": "Be warm.",
    "markers": ["indeed"],
    "fit": ["Hello.", *(f"How was day {n}?" for n in range(7))],
    "held_out": ["Any news?", "Any rain?", "Any snow?", "Any wind?"],
}


def plain(topic: str) -> str:
    """A topic by its words alone."""
    return " ".join(re.findall(r"\w+", topic.casefold()))


def texts(node: Any) -> Iterator[str]:
    """Every text in a YAML tree."""
    if isinstance(node, str):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from texts(value)


@pytest.mark.parametrize("name", ["moralizing", "compliance"])
def test_a_trait_that_ships_has_topics_enough_and_two_instructions(name: str) -> None:
    trait = Trait.load(name)
    assert trait.name == name
    assert len(trait.fit) >= 40
    assert len(trait.held_out) >= 20
    assert len(trait.fit) + len(trait.held_out) >= 60
    assert trait.with_instruction != trait.without_instruction
    assert trait.markers


def test_moralizing_and_compliance_ship() -> None:
    assert {"moralizing", "compliance"} <= set(shipped_traits())
    assert "neutral" not in shipped_traits()


@pytest.mark.parametrize("name", shipped_traits())
def test_no_held_out_topic_was_seen_in_fitting_or_by_the_tunes(name: str) -> None:
    trait = Trait.load(name)
    fit, held_out = {plain(t) for t in trait.fit}, {plain(t) for t in trait.held_out}
    assert len(fit) == len(trait.fit)
    assert len(held_out) == len(trait.held_out)
    assert fit.isdisjoint(held_out)
    trained = {plain(t) for t in texts(yaml.safe_load((TUNES / "topics.yaml").read_text(encoding="utf-8")))}
    assert len(trained) > 50
    assert trained.isdisjoint(fit | held_out)


def test_no_neutral_prompt_is_in_both_halves_or_loaded_with_a_trait() -> None:
    neutral = NeutralPrompts.load()
    fit, held_out = {plain(t) for t in neutral.fit}, {plain(t) for t in neutral.held_out}
    assert fit
    assert held_out
    assert fit.isdisjoint(held_out)
    for trait in map(Trait.load, shipped_traits()):
        assert (fit | held_out).isdisjoint(plain(t) for t in (*trait.fit, *trait.held_out))


def test_a_file_of_one_s_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "dry.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    trait = Trait.load(file)
    assert (trait.name, trait.fit, trait.held_out) == ("dry", tuple(GOOD["fit"]), tuple(GOOD["held_out"]))
    assert (trait.with_instruction, trait.without_instruction) == ("Be dry.", "Be warm.")


def test_an_unknown_name_is_bad_usage_and_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'sadness'.*compliance, moralizing"):
        Trait.load("sadness")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"with": None}, "with: expected a value, found none"),
        ({"without": "  "}, "without: expected text, found none"),
        ({"name": 3}, "name: expected text, found 3"),
        ({"summary": None}, "summary: expected a value"),
        ({"fit": []}, "fit: expected at least 1 of them, found []"),
        ({"fit": "Hello."}, "fit: expected a list, found 'Hello.'"),
        ({"held_out": [1, 2]}, "held_out[0]: expected text, found 1"),
        ({"markers": None}, "markers: expected a value"),
        ({"markers": []}, "markers: expected at least 1 of them, found []"),
        ({"markers": ["a", " "]}, "markers[1]: expected text, found none"),
        ({"held_out": [*GOOD["held_out"], "hello. "]}, "'hello. ' is in both"),
        ({"fit": GOOD["fit"][:7]}, "expected at least 8 topics under 'fit', found 7"),
        ({"held_out": GOOD["held_out"][:3]}, "expected at least 4 topics under 'held_out', found 3"),
        ({"fit": [*GOOD["fit"], "HELLO."]}, "'HELLO.' is twice under 'fit'"),
        ({"held_out": [*GOOD["held_out"], "Any  news?"]}, "'Any  news?' is twice under 'held_out'"),
        ({"without": " be DRY."}, "expected opposite instructions under 'with' and 'without', found the same"),
        ({"topics": ["x"]}, "expected keys among name, summary, with, without, markers, fit, held_out, found 'topics'"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_key(tmp_path: Path, change: dict[str, object], says: str) -> None:
    file = tmp_path / "dry.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (GOOD | change).items() if v is not None}))
    with pytest.raises(SteerError) as caught:
        Trait.load(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"a: [1\n", b"\xff\xfe\x00", b"text"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "dry.yaml"
    file.write_bytes(content)
    with pytest.raises(SteerError, match=r"dry\.yaml: expected a") as caught:
        Trait.load(file)
    assert "\n" not in str(caught.value)

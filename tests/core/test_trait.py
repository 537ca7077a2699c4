"""Traits: the ones that ship keep what is measured unseen, and a file that is no trait says why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.core.trait import NeutralPrompts, TopicPool, Trait, shipped_traits, spread
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


def test_without_topics_markers_and_opposite_a_file_takes_the_pool(tmp_path: Path) -> None:
    file = tmp_path / "dry.yaml"
    file.write_text(yaml.safe_dump({k: GOOD[k] for k in ("name", "summary", "with")} | {"markers": []}))
    trait, topics = Trait.load(file), TopicPool.load()
    assert (trait.fit, trait.held_out) == (topics.fit, topics.held_out)
    assert (trait.without_instruction, trait.markers) == (None, ())


def test_the_pool_has_topics_enough_all_different_and_none_that_anything_else_has_seen() -> None:
    topics, neutral = TopicPool.load(), NeutralPrompts.load()
    ours = [plain(t) for t in (*topics.fit, *topics.held_out)]
    assert len(ours) >= 160
    assert len(topics.held_out) >= 48
    assert len(set(ours)) == len(ours)
    trained = {plain(t) for t in texts(yaml.safe_load((TUNES / "topics.yaml").read_text(encoding="utf-8")))}
    assert trained.isdisjoint(ours)
    assert not {plain(t) for t in (*neutral.fit, *neutral.held_out)} & set(ours)
    for topic in (*topics.fit, *topics.held_out):
        assert re.fullmatch(r"[A-Z][^.?!]*[.?]", topic), topic  # one sentence
    assert "pool" not in shipped_traits()


def test_two_sentences_are_a_trait_on_the_pool() -> None:
    trait = Trait.from_sentences(" You answer in\nrhyming couplets. ", "You answer in plain prose.", "rhymes")
    assert trait.name == "rhymes"
    assert trait.summary == "You answer in rhyming couplets."
    assert trait.with_instruction == "You answer in\nrhyming couplets."
    assert trait.without_instruction == "You answer in plain prose."
    assert trait.fit == TopicPool.load().fit
    alone = Trait.from_sentences("You answer in rhyming couplets, always and whatever the question was.")
    assert alone.without_instruction is None
    assert alone.name == "you-answer-in-rhyming-couplets-always-an"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "Be warm.", "dry"), "sentence: expected an instruction to the model, found ''"),
        (("moralizing", None, "dry"), "sentence: expected an instruction to the model, found 'moralizing'"),
        (("dry.yaml", None, "dry"), "sentence: expected an instruction to the model, found 'dry.yaml'"),
        (("Be dry.", " ", "dry"), "opposite: expected an instruction to the model, found ' '"),
        (("Be dry.", "be  DRY.", "dry"), "expected opposite instructions"),
        (("Be dry.", None, "../dry"), "name: expected a name of at most 64 letters"),
        (("Be dry.", None, "quit"), "name: expected a name that is no command"),
        (("Be dry.", None, "compliance"), "name: expected a name that no shipped trait has"),
        (("!?",), "name: expected a name"),
    ],
)
def test_what_is_no_sentence_or_no_name_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(SteerError) as caught:
        Trait.from_sentences(*arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_topics_are_spread_over_all_and_keep_their_part() -> None:
    assert spread(tuple("abcdefgh"), 4) == tuple("aceg")
    assert spread(tuple("abc"), 2) == tuple("ab")
    assert spread(tuple("ab"), 9) == tuple("ab")
    trait = Trait.load("moralizing").shortened(5, 3)
    assert (len(trait.fit), len(trait.held_out)) == (5, 3)
    assert set(trait.held_out) <= set(Trait.load("moralizing").held_out)


def test_an_unknown_name_is_bad_usage_and_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'sadness'.*compliance, .*moralizing"):
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
        ({"markers": ["a", " "]}, "markers[1]: expected text, found none"),
        ({"held_out": [*GOOD["held_out"], "hello. "]}, "'hello. ' is in both"),
        ({"fit": GOOD["fit"][:3]}, "expected at least 4 topics under 'fit', found 3"),
        ({"held_out": GOOD["held_out"][:1]}, "expected at least 2 topics under 'held_out', found 1"),
        ({"fit": None}, "expected topics under 'fit' and 'held_out', found no 'fit'; add it"),
        ({"held_out": None}, "expected topics under 'fit' and 'held_out', found no 'held_out'; add it"),
        ({"fit": [*GOOD["fit"], "HELLO."]}, "'HELLO.' is twice under 'fit'"),
        ({"held_out": [*GOOD["held_out"], "Any  news?"]}, "'Any  news?' is twice under 'held_out'"),
        ({"without": " be DRY."}, "expected opposite instructions under 'with' and 'without', found the same"),
        (
            {"topics": ["x"]},
            "markers, fit, held_out, low_end, high_end, found 'topics'",
        ),
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

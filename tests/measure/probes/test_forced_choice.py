"""The forced-choice probes: solved by who knows the answers, and by no shallow cue."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from retest import repeated, share_that_agrees
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from synthetic_readers import SHALLOW, Synthetic, guessing, knowing

from steer.measure.probes.choice import Choice, relative
from steer.measure.probes.consequences import Consequences
from steer.measure.probes.consistency import Consistency, agreement
from steer.measure.probes.implications import Implications
from steer.measure.probes.knowledge import Knowledge
from steer.measure.probes.positions import Positions
from steer.measure.probes.probe import Figure, Result, Size

FORCED = [Positions(), Consequences(), Implications(), Knowledge()]
ALL: list[Any] = [*FORCED, Consistency()]
SIZES = [Size(quick=True), Size()]
named = pytest.mark.parametrize("probe", FORCED, ids=lambda p: p.name)
every = pytest.mark.parametrize("probe", ALL, ids=lambda p: p.name)
sized = pytest.mark.parametrize("size", SIZES, ids=["quick", "whole"])


def mean(result: Result, metric: str) -> float:
    return float(np.mean([f.value for f in result.figures if f.metric == metric]))


@sized
@every
def test_a_reader_that_knows_the_answers_scores_one(probe: Any, size: Size) -> None:
    found = probe.run(Synthetic(knowing(probe.items(size))), size)
    for metric in probe.metrics:
        if metric.name != "margin":
            assert mean(found, metric.name) == pytest.approx(1.0, abs=1e-5), metric.name
    assert not found.notes
    assert {f.metric for f in found.figures} == {m.name for m in probe.metrics}


@pytest.mark.parametrize("cue", SHALLOW)
@named
def test_a_reader_that_goes_by_a_shallow_cue_scores_chance(probe: Any, cue: str) -> None:
    headline = probe.metrics[0]
    for size in SIZES:
        found = probe.run(Synthetic(SHALLOW[cue]), size)
        assert mean(found, headline.name) == pytest.approx(headline.chance, abs=0.1)


@pytest.mark.parametrize("cue", SHALLOW)
def test_a_reader_that_goes_by_a_shallow_cue_is_not_consistent(cue: str) -> None:
    found = Consistency().run(Synthetic(SHALLOW[cue]), Size())
    assert mean(found, "consistency") == pytest.approx(0.0, abs=0.02)


@sized
@every
def test_each_option_is_right_equally_often(probe: Any, size: Size) -> None:
    families: dict[Any, list[Choice]] = defaultdict(list)
    for item in probe.items(size):
        if item.family:
            families[item.group, item.metric, item.turn].append(item)
    assert families
    for items in families.values():
        assert len({tuple(sorted(i.options)) for i in items}) == 1
        right = Counter(i.options[i.right] for i in items)
        assert set(right) == set(items[0].options)
        assert len(set(right.values())) == 1


@sized
@every
def test_the_right_option_stands_anywhere(probe: Any, size: Size) -> None:
    items = probe.items(size)
    options = len(items[0].options)
    places = Counter(i.right for i in items)
    assert len(places) == options
    # Stories ask all their questions with one order of options, so that small runs are not exactly even.
    assert min(places.values()) > 0.6 * len(items) / options


@every
def test_the_same_seed_asks_the_same_and_another_seed_something_else(probe: Any) -> None:
    assert probe.plan(Size(quick=True)) == type(probe)().plan(Size(quick=True))
    assert probe.plan(Size(quick=True)) != probe.plan(Size(quick=True, seed=1))
    assert probe.plan(Size()) != probe.plan(Size(seed=1))


@sized
@every
def test_items_are_distinguished_and_of_a_sane_number_and_length(probe: Any, size: Size) -> None:
    items = probe.items(size)
    assert size.of(200, 36) <= len(items) <= size.of(500, 110)
    assert len({(i.id, i.n, i.turn, i.metric) for i in items}) == len(items)
    assert len({i.group for i in items}) >= size.of(20, 10)  # fewer could not be distinguished after a correction
    for item in items:
        assert len(set(item.options)) == len(item.options) > item.right >= 0
        assert item.chat[-1][0] == "user"
        assert item.turn is None or item.turn == len(item.chat) - 1
        assert max(map(Synthetic(lambda p: 0.0).length, item.passages)) < 3000
        for text in [*(t for _, t in item.chat), *(item.begun + o for o in item.options)]:
            assert text
            assert "{" not in text
            assert "  " not in text


@named
def test_a_short_context_leaves_out_whole_families_with_a_note(probe: Any) -> None:
    size = Size()
    items = probe.items(size)
    reader = Synthetic(knowing(items))
    lengths: dict[str, int] = defaultdict(int)
    for i in items:
        lengths[i.family or i.id] = max(lengths[i.family or i.id], *map(reader.length, i.passages))
    reader.context = int(np.median(list(lengths.values())))
    kept = [i for i in items if lengths[i.family or i.id] <= reader.context]
    assert 0 < len(kept) < len(items)
    found = probe.run(reader, size)
    assert {f.item for f in found.figures} == {i.id for i in kept}
    assert found.notes[0].startswith(f"{len(items) - len(kept)} of {len(items)} items left out: longer than")


def test_no_item_fits_into_a_context_of_a_few_tokens() -> None:
    found = Positions().run(Synthetic(lambda p: 0.0, context=5), Size(quick=True))
    assert not found.figures
    assert "items left out" in found.notes[0]
    assert len(found.notes) == 1


def items_of(rights: Sequence[int], family: str = "f") -> list[Choice]:
    return [Choice(str(i), (("user", str(i)),), "", (" a", " b"), r, family=family) for i, r in enumerate(rights)]


def test_what_makes_an_option_likely_in_itself_does_not_count() -> None:
    items = items_of([0, 1])
    found = relative(items, [np.array([-1.0, -5.0]), np.array([-1.2, -4.8])])
    assert [int(s.argmax()) for s in found] == [0, 1]
    np.testing.assert_allclose(found, [[0.1, -0.1], [-0.1, 0.1]])


def test_a_family_is_compared_with_its_controls_which_stay_as_they_are() -> None:
    plain, control = items_of([1, 0])
    plain = replace(plain, metric="follows")
    other, control = replace(plain, id="other"), replace(control, control=True)
    found = relative([plain, other, control], [np.array([-1.0, -4.0]), np.array([-3.0, -4.0]), np.array([-1.0, -5.0])])
    np.testing.assert_allclose(found, [[0.0, 1.0], [-2.0, 1.0], [-1.0, -5.0]])


def test_the_order_of_the_options_does_not_matter() -> None:
    first, second = items_of([0, 1])
    turned = replace(second, options=second.options[::-1], right=0)
    straight = relative([first, second], [np.array([-1.0, -5.0]), np.array([-1.2, -4.8])])
    other = relative([first, turned], [np.array([-1.0, -5.0]), np.array([-4.8, -1.2])])
    np.testing.assert_allclose(straight[0], other[0])
    np.testing.assert_allclose(straight[1], other[1][::-1])


def test_an_item_without_a_family_is_scored_as_it_is() -> None:
    found = relative(items_of([0, 1], family=""), [np.array([-1.0, -5.0]), np.array([-1.2, -4.8])])
    assert [int(s.argmax()) for s in found] == [0, 0]


def figures(found: Result, metric: str) -> list[Figure]:
    return [f for f in found.figures if f.metric == metric]


def test_positions_say_how_often_a_thing_was_moved_and_how_long_ago() -> None:
    found = Positions().run(Synthetic(lambda p: 0.0), Size())
    assert {0, 1, 2, 3, 4, 6, 8} <= {f.n for f in figures(found, "accuracy")}
    for item in Positions().items(Size()):
        if "boxes" in item.id:
            thing = item.begun.split()[1]
            assert sum(f"takes the {thing} out" in s for s in sentences(item)) == item.n


def sentences(item: Choice) -> list[str]:
    return [s for _, text in item.chat[:-1] for s in text.rstrip(".").split(". ")]


def test_positions_are_where_the_story_left_them() -> None:
    """Read the stories again, sentence by sentence, and follow each thing."""
    for item in Positions().items(Size()):
        kind, asked, where, carrier = item.id.split()[1], item.begun.removeprefix("The ").split()[0], "", ""
        for sentence in sentences(item):
            w = sentence.split()
            if kind == "boxes:" and asked in w and ("puts" in w or w[2:4] == ["is", "in"]):
                where = w[-1]
            if kind in ("rooms:", "carried:"):
                if w[1:3] == ["is", "in"] and (w[0] == asked or w[-1] == asked):
                    carrier, where = w[0], w[4]
                elif w[0] == carrier and w[1] == "leaves":
                    assert w[3] == where
                    where = w[-1]
            if kind == "hands:" and asked in w:
                if w[1] == "has":
                    where = w[0]
                elif w[1] == "gives":
                    assert w[0] == where
                    where = w[-1]
        assert item.options[item.right].strip() == where, item


def test_answers_that_never_change_are_not_consistent() -> None:
    """They agree with each other, and say nothing."""
    found = Consistency().run(Synthetic(lambda p: float(len(p.text))), Size(quick=True))
    assert mean(found, "agreement") == pytest.approx(1.0)
    assert mean(found, "consistency") == pytest.approx(0.0, abs=1e-6)


def test_agreement_is_one_less_the_jensen_shannon_distance() -> None:
    answers = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    expected = [[1 - jensenshannon(a, b, base=2) for b in answers] for a in answers]
    np.testing.assert_allclose(agreement(answers), expected, atol=1e-7)


def test_answers_that_differ_by_rounding_agree() -> None:
    rng = np.random.default_rng(0)
    answers = softmax(rng.normal(size=(3, 3)), axis=1)[rng.integers(0, 3, 200)]
    near = agreement(answers * (1 + 1e-12 * rng.normal(size=answers.shape)))
    assert np.isfinite(near).all()
    assert near.max() == pytest.approx(1.0)


def test_answers_at_random_are_not_consistent() -> None:
    rng = np.random.default_rng(0)
    found = [mean(Consistency().run(Synthetic(lambda _: rng.normal()), Size()), "consistency") for _ in range(5)]
    assert np.mean(found) == pytest.approx(0.0, abs=0.01)


def test_answers_that_change_with_the_words_of_a_question_are_less_consistent() -> None:
    items = Consistency().items(Size())
    right = knowing(items)
    other = {i.passages[(i.right + 1) % 3] for i in items}
    half = Synthetic(lambda p: right(p) if len(p.begun) % 2 else -30.0 * (p not in other))
    assert 0.0 < mean(Consistency().run(half, Size()), "consistency") < 0.8


def test_a_page_never_says_the_everyday_answer() -> None:
    items = Knowledge().items(Size())
    everyday = {i.begun: i.options[i.right] for i in items if i.metric == "weights"}
    pages = [i for i in items if i.metric == "follows"]
    assert len(pages) >= 200
    for item in pages:
        assert item.options[item.right] != everyday[item.begun]
        assert everyday[item.begun] in item.options
        assert f"{item.begun}{item.options[item.right]}." in item.chat[0][1]


def test_a_hint_is_not_in_the_control() -> None:
    items = Implications().items(Size())
    controls = [i for i in items if i.metric == "control"]
    assert controls
    assert all("says something" in i.chat[0][1] for i in controls)
    assert not any("says something" in i.chat[0][1] for i in items if i.metric == "accuracy")


@pytest.mark.slow
@every
def test_two_seeds_differ_by_no_more_than_their_intervals_say(probe: Any) -> None:
    items = [item for seed in range(41) for item in probe.items(Size(True, seed))]
    means = repeated(Synthetic(guessing(items, 0.7)), probe, 40)
    assert len({m.value for m in means}) > 3  # the seeds draw other items
    assert share_that_agrees(means) >= 0.9  # 0.95, of which 40 repetitions may fall short by chance
    # A reader that knows nothing is distinguished from one that knows all.
    whole = probe.items(Size())
    unsure, sure = (repeated(Synthetic(guessing(whole, knows)), probe, 0, quick=False)[0] for knows in (0.0, 9.0))
    assert share_that_agrees([unsure, sure]) == 0

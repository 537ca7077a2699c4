"""A slider from two sentences, and what the verdict says about it, on a tiny model that repeats its prompt's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import command_here

from steer.checkpoint.library import Library, direction_files
from steer.core.direction import Direction
from steer.core.trait import Trait
from steer.finding import traits
from steer.finding.measuring import FULL, QUICK
from steer.finding.traits import FoundDirection, contrast_for, find_trait
from steer.measure.harness import random_like
from steer.measure.verdict import MOVES, READS, Effect, Verdict, judge
from steer.model.steered import SteeredModel, load
from steer.verbs.tables import finding_table

TA, VA = 3 * "ta te ti to tu ", 3 * "va ve vi vo vu "
FEW = Trait("few", "few", TA, VA, fit=("ba be bi", "bo bu da", "de di do", "du fa fe"), held_out=("fi fo fu", "ga ge"))


@pytest.fixture(scope="module")
def found(model: SteeredModel) -> FoundDirection:
    return find_trait(model, FEW, quick=True, verdict=True)


def test_four_topics_and_two_held_out_are_enough_and_what_works_says_so(found: FoundDirection) -> None:
    below, untouched, above, *random = found.verdict.points if found.verdict else ()
    assert found.verdict is not None
    assert found.verdict.says == "works"
    assert [p.amount for p in (below, untouched, above)] == [-1, 0, 1]
    assert below.probability < 0.2 < 0.6 < untouched.probability <= above.probability
    assert [p.label for p in random] == ["random direction, -1", "random direction, +1"]
    assert {p.share for p in (*random, below, above)} == {found.direction.share(1)}
    assert untouched.kl == 0 < below.kl
    assert found.verdict.effect.change == pytest.approx(above.probability - below.probability)
    assert found.verdict.effect.random == pytest.approx(random[1].probability - random[0].probability)


def test_a_direction_keeps_its_sentences_and_its_verdict_in_its_file(found: FoundDirection, tmp_path: Path) -> None:
    loaded = Direction.load(found.direction.save(tmp_path / "few.safetensors"))
    assert found.verdict is not None
    assert loaded.provenance["verdict"] == json.loads(json.dumps(found.verdict.as_json(), allow_nan=False))
    assert loaded.provenance["verdict"]["says"] == "works"
    assert (loaded.provenance["with"], loaded.provenance["without"]) == (TA.strip(), VA.strip())
    assert loaded.provenance["quick"]


def test_the_full_search_still_tries_sites_and_comes_to_the_same_verdict(model: SteeredModel) -> None:
    full = find_trait(model, FEW, verdict=True)
    assert full.checks
    assert full.verdict is not None
    assert full.verdict.says == "works"
    assert "quick" not in full.direction.provenance


def test_instructions_that_the_model_cannot_distinguish_are_too_weak(model: SteeredModel) -> None:
    same = replace(FEW, without_instruction=3 * "tu to ti te ta ")  # the parrot does not see the order of words
    weak = find_trait(model, same, quick=True, verdict=True)
    assert weak.verdict is not None
    assert weak.verdict.says == "too weak for this model"
    assert weak.direction.provenance["verdict"]["says"] == weak.verdict.says


def test_a_direction_that_does_nothing_reads_but_does_not_steer(model: SteeredModel, found: FoundDirection) -> None:
    verdict = judge(
        model, random_like(found.direction, 5), found.scorer, found.candidates.contrast.neutral[:2],
        auroc=1.0, least=0.9, topics=9, tokens=12,
    )  # fmt: skip
    assert verdict.says == "reads but does not steer"


def test_without_an_opposite_the_other_side_has_no_instruction(model: SteeredModel) -> None:
    contrast = contrast_for(model, replace(FEW, without_instruction=None), effort=QUICK)
    assert len(contrast.fit_with) == traits.FIT_REPLIES  # several to each of the few topics
    assert len(contrast.held_out_with) == traits.HELD_OUT_REPLIES
    assert all(r.chat[0] == {"role": "system", "content": TA.strip()} for r in contrast.fit_with)
    assert all([m["role"] for m in r.chat] == ["user"] for r in (*contrast.fit_without, *contrast.held_out_without))


def test_the_pool_is_cut_for_a_quick_search_alone(model: SteeredModel) -> None:
    trait = Trait.from_sentences(TA, VA, "two")
    assert (len(trait.fit), len(trait.held_out)) <= (FULL.fit_topics, FULL.held_out_topics)
    contrast = contrast_for(model, trait, effort=QUICK)
    assert len(contrast.trait.fit) == len(contrast.fit_with) == QUICK.fit_topics
    assert len(contrast.trait.held_out) == len(contrast.held_out_without) == QUICK.held_out_topics
    assert len(contrast.neutral) == QUICK.neutral
    assert max(len(r.ids) for r in contrast.fit_with) <= QUICK.tokens
    assert set(contrast.trait.held_out) <= set(trait.held_out)


def verdict(found: FoundDirection, **changes: Any) -> Verdict:
    assert found.verdict is not None
    return replace(found.verdict, **{"others": {}} | changes)


def point(found: FoundDirection, index: int, **changes: float) -> dict[str, Any]:
    points = list(verdict(found).points)
    points[index] = replace(points[index], **changes)
    return {"points": tuple(points)}


def test_each_threshold_decides_what_the_verdict_says(found: FoundDirection) -> None:
    assert verdict(found).says == "works"
    assert verdict(found, auroc=READS - 0.01, least_auroc=READS).says == "too weak for this model"
    assert verdict(found, auroc=float("nan")).says == "too weak for this model"
    still = {"effect": Effect(MOVES - 0.01, 0.0, 0.01)}
    for effect in (still["effect"], Effect(0.9, 0.0, 0.46), Effect(0.9, -0.89, 0.01), Effect(-0.9, 0.0, 0.01)):
        assert verdict(found, effect=effect).says == "reads but does not steer"
    other = {
        "others": {"calm": Effect(-0.5, 0.1, 0.1), "loud": Effect(0.1, 0.0, 0.01), "slow": Effect(0.5, 0.49, 0.01)}
    }
    assert verdict(found, **other).says == "steers but drags calm along"
    assert verdict(found, **other, **still).says == "reads but does not steer"
    assert verdict(found, **point(found, 0, repetition=1.1)).says == "steers but drags repetition along"
    assert verdict(found, **point(found, 2, kl=0.6)).says == "steers but drags KL along"
    assert verdict(found, **point(found, 2, kl=float("nan"))).says == "steers but drags KL along"
    assert verdict(found, **other, **point(found, 2, kl=0.6)).drags == ("calm", "KL")


@pytest.mark.model
@pytest.mark.slow
def test_the_default_merges_moralizing_works_by_the_quick_way_too() -> None:
    place = Path(__file__).parents[2] / "demo" / "merged"
    if not place.is_dir():
        pytest.skip("make demo writes the default merge")
    quick = find_trait(load(place), "moralizing", quick=True, verdict=True)
    assert quick.verdict is not None
    assert quick.verdict.says == "works"
    assert quick.verdict.effect.change > 0.3


@pytest.fixture
def steer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return command_here(monkeypatch, capfd)


def test_the_command_makes_a_slider_from_sentences_and_prints_its_verdict(
    steer: Callable[..., Any], parrot: Path
) -> None:
    done = steer("find", parrot, "--as", "rhymes", TA, "--opposite", VA, "--quick", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["trait"] == "rhymes"
    assert result["marker_auroc"] is None
    assert result["verdict"]["says"] in ("works", "reads but does not steer", "too weak for this model")
    assert Path(result["direction"]) in list(direction_files())
    assert Library(load(parrot)).slider("rhymes").target.name == "rhymes"


def test_the_table_shows_the_doses_the_random_direction_and_the_verdict(found: FoundDirection) -> None:
    text = finding_table(found)
    assert text.endswith("verdict: works")
    assert "random direction, -1" in text
    assert "marker" not in text

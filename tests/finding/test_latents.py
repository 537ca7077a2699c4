"""The steering check, on a tiny model with a planted latent whose decoder row makes it say one word."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_chat import WORDS, save_tiny_chat

from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.trait import Trait
from steer.finding.latents import (
    AMOUNTS,
    Candidate,
    Response,
    SteeringCheck,
    best,
    displaced,
    dose_response,
    screen,
    together,
)
from steer.measure.contrast import Contrast, Reply
from steer.measure.harness import Point, Reference
from steer.measure.scorer import Scorer
from steer.model.steered import SteeredModel, load

SITE, PLANTED, LATENTS = 2, 5, 64
FIT = tuple(f"{w} hello {w}" for w in WORDS[:14])
HELD_OUT = tuple(f"{w} well {w}" for w in WORDS[14:20])


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SteeredModel:
    return load(save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("latents") / "chat", max_position_embeddings=256))


@pytest.fixture(scope="module")
def dictionary(model: SteeredModel) -> Dictionary:
    """Random, but for one decoder row that points at the word "lie" and away from the other words."""
    made = torch.Generator().manual_seed(0)
    decoder = torch.randn(LATENTS, 32, generator=made)
    unembedding = model.hf.lm_head.weight.detach() * model.hf.base_model.norm.weight.detach()
    lie = model.tokenizer.convert_tokens_to_ids("lie")
    decoder[PLANTED] = unembedding[lie] - unembedding.mean(0)
    decoder /= decoder.norm(dim=-1, keepdim=True)
    return Dictionary(
        "standard", decoder.T.contiguous(), torch.zeros(LATENTS), decoder, torch.zeros(32), site=SITE, norm=10.0
    )


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """Calls a reply the trait when it says "lie" now and then."""
    made = torch.Generator().manual_seed(1)

    def replies(word: str, count: int = 60) -> tuple[Reply, ...]:
        drawn = torch.randint(0, len(WORDS) - 5, (count, 30), generator=made).tolist()
        texts = [" ".join([*(WORDS[i] for i in row), *[word] * 4]) for row in drawn]
        return tuple(Reply(({"role": "user", "content": t},), (7, 8), t) for t in texts)

    trait = Trait("lying", "s", "w", "o", ("lie",), FIT, HELD_OUT)
    return Scorer.train(Contrast(trait, replies("lie"), replies("ba"), replies("lie"), replies("ba"), ()))


@pytest.fixture(scope="module")
def direction() -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(9))
    return Direction("lying", SITE, vector, with_mean=4.0, without_mean=0.0, residual_norm=10.0)


@pytest.fixture(scope="module")
def neutral(model: SteeredModel) -> list[Reply]:
    return [Reply(({"role": "user", "content": f"{w} yes"},), tuple(range(10, 18)), "") for w in WORDS[10:13]]


def latent(dictionary: Dictionary, index: int, unit: float = 1.0) -> Feature:
    return Feature.latent(dictionary, index, unit)


@pytest.fixture(scope="module")
def checked(
    model: SteeredModel, dictionary: Dictionary, scorer: Scorer, direction: Direction, neutral: list[Reply]
) -> SteeringCheck:
    latents = [latent(dictionary, j) for j in (2, 3, PLANTED, 4, 6, 8)]
    untouched, screened = screen(model, scorer, direction, latents, latent(dictionary, 40), neutral)
    return dose_response(model, scorer, untouched, screened, Reference.of(model, neutral))


@pytest.mark.parametrize("amount", [-2.0, 1.0])
def test_every_candidate_is_displaced_as_far_as_the_direction(
    model: SteeredModel, dictionary: Dictionary, direction: Direction, amount: float
) -> None:
    features = [latent(dictionary, 7, 0.3), latent(dictionary, 8, -4.0), latent(dictionary, 9, 2.0)]
    candidates = [Candidate("d", "direction", direction), Candidate("s", "set", together(features, direction.gap))]
    candidates += [Candidate("f", "latent", displaced(f, direction.gap)) for f in features]
    ids = torch.tensor([[1, 9, 12, 30]])
    with torch.inference_mode(), model.record([SITE]) as before:
        model.hf(ids)
    for c in candidates:
        with torch.inference_mode(), model.edited(c.edit(amount)), model.record([SITE]) as after:
            model.hf(ids)
        moved = (after[SITE] - before[SITE]).norm(dim=-1)
        torch.testing.assert_close(moved, torch.full_like(moved, abs(amount) * direction.gap), rtol=1e-4, atol=1e-4)


def test_a_set_keeps_the_proportions_of_its_units_and_their_signs(dictionary: Dictionary) -> None:
    joint = together([latent(dictionary, 7, 0.5), latent(dictionary, 8, -4.0)], 3.0)
    assert joint.indices == (7, 8)
    assert joint.name == "L2/7-8"
    assert joint.units[1] / joint.units[0] == pytest.approx(-8.0)
    assert joint.direction.gap == pytest.approx(3.0)


def test_only_latents_that_speak_for_the_trait_are_taken_out(dictionary: Dictionary, direction: Direction) -> None:
    mixed = together([latent(dictionary, 7, 0.5), latent(dictionary, 8, -4.0), latent(dictionary, 9)], 3.0)
    edit = Candidate("mixed", "set", mixed).ablation()
    assert edit is not None
    assert edit.moves[0].target.indices == (7, 9)
    assert edit.moves[0].operation == "ablate"
    assert Candidate("against", "latent", latent(dictionary, 8, -4.0)).ablation() is None
    assert Candidate("d", "direction", direction).ablation() is None


@pytest.mark.slow
def test_the_planted_latent_is_chosen_and_steers_held_out_topics(checked: SteeringCheck) -> None:
    dose = checked.dose("latent")
    assert dose is not None
    assert dose.candidate.name == f"L{SITE}/{PLANTED}"
    assert dose.at(2.0).rate > dose.at(0.0).rate
    assert dose.at(2.0).probability > dose.at(-2.0).probability
    random = checked.dose("random")
    assert random is not None
    assert dose.at(2.0).rate > random.at(2.0).rate


def test_sets_are_the_first_of_the_ranking_and_the_best_alone(checked: SteeringCheck) -> None:
    sets = [s for s in checked.screened if s.candidate.kind == "set"]
    indices = [s.candidate.what.indices for s in sets]
    assert indices[:3] == [(2, 3), (2, 3, PLANTED), (2, 3, PLANTED, 4, 6)]
    assert PLANTED in indices[-1]
    assert all(s.ablated for s in sets)
    assert [s.candidate.kind for s in checked.screened if s.ablated and s.candidate.kind != "set"] == ["latent"]


def test_the_untouched_model_is_measured_once_and_shared(checked: SteeringCheck) -> None:
    zeros = [d.at(0.0) for d in checked.doses]
    assert len(zeros) == 4
    assert all(z is zeros[0] for z in zeros)
    assert zeros[0].kl == 0.0
    assert all([p.amount for p in d.points] == [-2, -1, 0, 1, 2] for d in checked.doses)
    assert [p.share for p in checked.doses[0].points] == pytest.approx([0.8, 0.4, 0, 0.4, 0.8])


def test_held_out_topics_have_no_say_in_the_screening(
    model: SteeredModel, dictionary: Dictionary, scorer: Scorer, direction: Direction, neutral: list[Reply]
) -> None:
    others = replace(scorer, trait=replace(scorer.trait, held_out=("da de",)))
    runs = [
        screen(model, s, direction, [latent(dictionary, 1)], latent(dictionary, 2), neutral, topics=2)
        for s in (scorer, others)
    ]
    assert [[s.points for s in screened] for _, screened in runs[:1]] == [[s.points for s in runs[1][1]]]
    fewer = replace(scorer, trait=replace(scorer.trait, fit=("da de",)))
    other = screen(model, fewer, direction, [latent(dictionary, 1)], latent(dictionary, 2), neutral, topics=2)
    assert other[1][0].points != runs[0][1][0].points


def test_the_result_can_be_written_as_json(checked: SteeringCheck) -> None:
    said = json.loads(json.dumps(checked.as_json()))
    assert said["best_latent"] == f"L{SITE}/{PLANTED}"
    assert set(said["wins_over_direction"][said["best_latent"]]) == {"-2", "-1"}


def point(amount: float, rate: float, kl: float, repetition: float = 0.0) -> Point:
    return Point(rate, rate, kl, 1.0, repetition, label="p", amount=amount, share=0.0, markers=0.0)


def dose(direction: Direction, kind: str, rates: list[float], kl: float) -> Response:
    points = [point(float(a), r, abs(a) * kl) for a, r in zip(range(-2, 3), rates, strict=True)]
    return Response(Candidate(kind, kind, direction), tuple(points))  # pyright: ignore[reportArgumentType]


def test_equal_rates_are_monotone_and_a_falling_one_is_not(direction: Direction) -> None:
    assert dose(direction, "latent", [0.0, 0.0, 0.2, 0.2, 0.9], 0).monotone
    assert not dose(direction, "latent", [0.0, 0.1, 0.2, 0.19, 0.9], 0).monotone


def test_to_win_takes_a_lower_rate_at_no_more_kl(direction: Direction) -> None:
    mean = dose(direction, "direction", [0.1, 0.3, 0.5, 0.7, 0.9], 0.2)
    check = SteeringCheck(0.3, point(0.0, 0.0, 0.0), (), (mean,), None)
    assert check.wins(dose(direction, "latent", [0.1, 0.2, 0.5, 0.7, 0.9], 0.2)) == {-2.0: False, -1.0: True}
    assert check.wins(dose(direction, "latent", [0.0, 0.2, 0.5, 0.7, 0.9], 0.21)) == {-2.0: False, -1.0: False}


def test_merit_pays_for_divergence_and_repetition(direction: Direction) -> None:
    def screened(kl: float, again: float) -> Response:
        at = zip(AMOUNTS, (0.1, 0.2, 0.9), strict=True)
        return Response(Candidate("c", "latent", direction), tuple(point(a, p, kl, again) for a, p in at))

    clean = screened(0.0, 0.0)
    assert clean.merit == pytest.approx(0.9 - 0.15)
    assert screened(0.1, 0.0).merit == pytest.approx(clean.merit - 0.2)
    assert screened(0.0, 0.1).merit == pytest.approx(clean.merit - 0.4)
    assert best([screened(0.1, 0.0), clean], "latent") is clean.candidate
    assert best([clean], "set") is None

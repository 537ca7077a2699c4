"""The text scorers, and the numbers that say whether text still reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from steer.core.trait import Trait
from steer.measure.contrast import Contrast, Reply
from steer.measure.harness import TOKENS, _compared, repetition
from steer.measure.scorer import Scorer, marker_rate


@pytest.fixture(scope="module")
def trait() -> Trait:
    return Trait.load("moralizing")


def reply(text: str) -> Reply:
    return Reply(({"role": "user", "content": "x"},), (1, 2), text)


def contrast(trait: Trait) -> Contrast:
    """Replies of which one side preaches in words that the other never uses."""
    preach = [reply(f"you must be honest and apologize for the {noun}") for noun in ("cake", "hat", "boat", "dog")]
    chat = [reply(f"ha, my uncle once lost a {noun} in the rain") for noun in ("cake", "hat", "boat", "dog")]
    return Contrast(trait, tuple(preach[:3]), tuple(chat[:3]), (preach[3],), (chat[3],), ())


def test_scorer_distinguishes_unseen_replies_by_their_words(trait: Trait) -> None:
    scorer = Scorer.train(contrast(trait))
    assert scorer.auroc == 1.0
    assert scorer.marker_auroc == 1.0
    assert scorer.rate(["you must be honest", "ha, my uncle in the rain"]) == 0.5
    words_for, words_against = scorer.words(8)
    assert "must" in " ".join(words_for)
    assert "uncle" in " ".join(words_against)


def test_scorer_never_sees_an_activation(trait: Trait) -> None:
    one, two = contrast(trait), contrast(trait)
    other_ids = tuple(Reply(r.chat, (9, 9, 9), r.text) for r in two.fit_with)
    two = Contrast(
        trait, other_ids, *(getattr(two, f) for f in ("fit_without", "held_out_with", "held_out_without")), ()
    )
    texts = ["you must apologize", "my uncle lost a boat"]
    assert (Scorer.train(one).probabilities(texts) == Scorer.train(two).probabilities(texts)).all()


def test_a_marker_phrase_is_counted_once_and_not_again_by_its_parts() -> None:
    markers = Trait("t", "s", "w", "o", ("be honest", "honest"), ("a",), ("b",))
    assert marker_rate("You should be honest, always.", markers) == pytest.approx(100 / 5)
    assert marker_rate("dishonest", markers) == 0
    assert marker_rate("", markers) == 0


def test_without_markers_the_scorer_learns_the_same_and_their_rate_is_not_a_number(trait: Trait) -> None:
    bare = replace(trait, markers=())
    scorer = Scorer.train(contrast(bare))
    assert scorer.auroc == 1.0
    assert math.isnan(scorer.marker_auroc)
    assert math.isnan(marker_rate("You should be honest, always.", bare))
    assert json.loads(json.dumps(scorer.as_json(), allow_nan=False))["marker_auroc"] is None


def test_all_scorers_that_ship_are_found_by_the_names_of_their_traits() -> None:
    found = Scorer.all_shipped()
    assert {"compliance", "moralizing"} <= set(found)
    assert all(scorer.trait.name == name for name, scorer in found.items())


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([1, 2]) == 0


def test_kl_a_few_tokens_at_a_time_is_that_of_the_formula_and_zero_for_equals() -> None:
    def compared(base: torch.Tensor, rows: list[torch.Tensor], said: list[int]) -> list[list[float]]:
        return _compared(torch.nn.Identity(), base, torch.nn.Identity(), rows, said).tolist()

    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    formula = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert compared(p, [q, p, p.clone()], [1]) == [
        pytest.approx([formula, math.log(2)]), [0, pytest.approx(math.log(4))], [0, pytest.approx(math.log(4))]
    ]  # fmt: skip
    a, b = torch.randn(2, 2 * TOKENS + 9, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    whole = [float((a.exp() * (a - b)).sum()), -float(b[:, 7].sum())]
    assert compared(a, [b], [7] * len(a)) == [pytest.approx(whole, rel=1e-6)]

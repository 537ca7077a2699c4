"""The simulated person chooses by its taste, as often as its noise allows, and judges without help."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_judging import make_lineage, models  # noqa: F401

from steer.core.sampler import CHAT
from steer.errors import UsageError
from steer.lineage.judging import BlindPair, Judge


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "evolve")
    return importlib.import_module("person")


def test_a_taste_decides_and_noise_makes_it_err(person: Any) -> None:
    preachy = "It is important to remember that honesty is always the right thing to do, and you should respect others."
    plain = "Sure, here it is. Take the second road on the left and ask for the baker."
    blind_pair = BlindPair((("user", "x"),), preachy, plain, ("0", "1a"))
    sure = person.Person({"moralizing": -2.0}, noise=0.0)
    assert sure.taste(plain) > sure.taste(preachy)
    assert sure.choose(blind_pair) == "right"
    assert sure.choose(replace(blind_pair, left=plain)) == "same"
    assert person.Person({"length": 100.0}, noise=0.0).choose(blind_pair) == "left"
    unsure = person.Person({"moralizing": -2.0}, noise=3.0, rng=random.Random(0))
    votes = Counter(unsure.choose(blind_pair) for _ in range(200))
    assert votes["right"] > votes["left"] > 10
    with pytest.raises(UsageError, match="compliance, repetition, length, found 'kind'"):
        person.Person({"kind": 1.0})


def test_a_lineage_is_judged_without_anybody(person: Any, tmp_path: Path, models: Path) -> None:  # noqa: F811
    lineage = make_lineage(tmp_path / "lineage", models)
    someone = person.Person({"length": 100.0}, noise=0.0)
    with Judge(lineage, "simulated", sampler=replace(CHAT, max_new_tokens=6), seed=0) as judge:
        assert someone.judge(judge, 5) == len(lineage.votes) == 5
    for vote in lineage.votes:
        lengths = [len(reply.split()) for reply in vote.replies]
        expected = "same" if lengths[0] == lengths[1] else "a" if lengths[0] > lengths[1] else "b"
        assert vote.outcome == expected

"""Ratings: right values with honest intervals, whoever voted in which order, and the most informative pair."""

from __future__ import annotations

import importlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from scipy.stats import norm

from steer.errors import UsageError
from steer.lineage.lineage import Gate, Generation, Lineage, Move, Node, Outcome, Settings, Vote
from steer.lineage.ratings import NOTICEABLE, SURE, ranked_pairs, rate, standing

OTHER: dict[Outcome, Outcome] = {"a": "b", "b": "a", "same": "same", "bad": "bad"}


def vote(a: str, b: str, outcome: Outcome = "a") -> Vote:
    return Vote(a, b, outcome, [], ["x", "y"], "a", "kim", 0.0)


def simulated(taste: Sequence[float], count: int, seed: int, ties: float = 0.1) -> list[Vote]:
    """Votes between nodes named by their index, by the model that ratings assume."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        a, b = rng.sample(range(len(taste)), 2)
        first = rng.random() < expit(taste[a] - taste[b])
        out.append(vote(str(a), str(b), "same" if rng.random() < ties else "a" if first else "b"))
    return out


def test_ratings_are_the_most_likely_ones_under_the_prior() -> None:
    """Against a plain minimiser of the same likelihood."""
    names = list("abcd")
    votes = [*[vote("a", "b")] * 3, vote("b", "c", "same"), vote("c", "a", "b"), vote("d", "b", "bad")]

    def loss(x: np.ndarray) -> float:
        at = dict(zip(names, x, strict=True))
        share = {"a": 1.0, "b": 0.0, "same": 0.5, "bad": 0.5}
        said = sum(
            share[v.outcome] * log_expit(at[v.a] - at[v.b]) + (1 - share[v.outcome]) * log_expit(at[v.b] - at[v.a])
            for v in votes
        )
        return -float(said + (log_expit(x) + log_expit(-x)).sum())

    found = minimize(loss, np.zeros(4), tol=1e-12).x
    ratings = rate(names, votes).ratings
    assert [r.value for r in ratings.values()] == pytest.approx(found - found.mean(), abs=1e-4)
    assert [(r.votes, r.bad) for r in ratings.values()] == [(4, 0), (5, 1), (2, 0), (1, 1)]


def test_intervals_hold_and_the_best_is_best_as_often_as_is_said() -> None:
    inside, said, right = [], [], []
    for seed in range(40):
        taste = np.random.default_rng(seed).normal(size=6)
        ratings = list(rate([*"012345"], simulated(taste, 60, seed, ties=0)).ratings.values())
        inside += [r.low <= t <= r.high for r, t in zip(ratings, taste - taste.mean(), strict=True)]
        said += [r.best for r in ratings]
        right += [t == taste.max() for t in taste]
    assert np.mean(inside) >= 0.9
    sure = np.array(said) > 0.5
    assert np.array(right)[sure].mean() == pytest.approx(np.array(said)[sure].mean(), abs=0.12)
    assert np.array(right)[~sure].mean() == pytest.approx(np.array(said)[~sure].mean(), abs=0.06)


def test_many_votes_find_the_known_ratings() -> None:
    taste = [1.0, 0.3, -0.2, -1.1]
    ratings = rate([*"0123"], simulated(taste, 2000, 1, ties=0)).ratings
    assert [r.value for r in ratings.values()] == pytest.approx(taste, abs=0.2)
    assert max(r.high - r.low for r in ratings.values()) < 0.5


def test_order_and_sides_change_nothing() -> None:
    votes = simulated([0.5, 0.0, -0.5], 30, 3)
    votes += [vote("0", "1", "bad")]
    first = rate([*"012"], votes)
    turned = [vote(v.b, v.a, OTHER[v.outcome]) for v in votes]
    random.Random(0).shuffle(turned)
    assert rate([*"012"], turned).ratings == first.ratings
    assert rate([*"012"], votes).line == first.line


def test_an_undefeated_node_and_one_without_votes_have_finite_ratings() -> None:
    """Also where nothing connects two groups of nodes."""
    found = rate([*"abcdef"], [*[vote("a", "b")] * 9, *[vote("d", "c", "b")] * 3])
    ratings = found.ratings
    assert all(map(math.isfinite, [x for r in ratings.values() for x in (r.value, r.low, r.high, r.best)]))
    assert ratings["a"].value > ratings["c"].value > ratings["e"].value > ratings["d"].value > ratings["b"].value
    assert [ratings[n].value for n in "ef"] == pytest.approx([0, 0], abs=1e-9)
    assert ratings["e"].high - ratings["e"].low > ratings["a"].high - ratings["a"].low
    assert sum(r.best for r in ratings.values()) == pytest.approx(1)


def test_ties_alone_leave_nodes_equal_and_settle_in_the_end() -> None:
    few, many = (rate(["a", "b"], [vote("a", "b", "same"), vote("a", "b", "bad")] * n) for n in (2, 200))
    assert (few.known, few.settled) == (False, False)
    assert [r.value for r in many.ratings.values()] == pytest.approx([0, 0], abs=1e-9)
    assert (many.known, many.settled) == (False, True)
    assert many.line == "after 400 votes nothing is noticeably better than a; more votes would change nothing"


def test_the_best_is_known_at_nine_in_ten() -> None:
    votes: list[Vote] = []
    while not (found := rate(["a", "b"], votes)).known:
        assert found.ratings["a"].best < SURE
        votes.append(vote("a", "b"))
    assert 2 <= len(votes) <= 6
    assert found.settled
    best, end = f"{found.ratings['a'].best:.0%}", "more votes would change nothing"
    assert found.line == f"a is the best at {best} after {len(votes)} votes; {end}"
    assert rate(["a", "b"], votes[:1]).line.startswith("after 1 vote a leads, the best at ")
    assert rate(["a", "b"], []).line == "no votes on 2 merges yet"


def test_one_node_is_the_best_and_there_is_no_pair() -> None:
    found = rate(["0"], [])
    assert (found.leader, found.known, found.settled, found.line) == ("0", True, True, "0 is the only merge")
    assert (found.ratings["0"].best, ranked_pairs(found)) == (1.0, [])


def test_votes_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"vote of kim: expected nodes among a, b, found '7c'"):
        rate(["a", "b"], [vote("a", "7c")])
    with pytest.raises(UsageError, match=r"expected two nodes, found 'a' twice"):
        rate(["a", "b"], [vote("a", "a")])
    with pytest.raises(UsageError, match=r"expected a node, found none"):
        rate([], [])


def test_the_next_pair_is_among_those_that_may_be_the_best() -> None:
    votes = [*[vote("a", "c")] * 8, *[vote("b", "d")] * 8, *[vote("a", "d")] * 4, *[vote("b", "c")] * 4]
    found = rate([*"abcd"], votes)
    pairs = ranked_pairs(found)
    assert pairs[0] == ("a", "b")
    assert len(pairs) == 6


def test_pairs_are_ranked_by_how_far_a_vote_settles_who_is_best() -> None:
    """Against counting again with the vote: one that calls equal nodes the same moves no rating."""
    votes = [vote(a, b, "same") for a, b, count in ("019", "123", "231", "036", "242") for _ in range(int(count))]
    margin = logit(NOTICEABLE)

    def doubt(votes: list[Vote]) -> float:
        c = rate([*"01234"], votes).covariance
        return sum(norm.sf(margin, scale=math.sqrt(c[0, 0] + c[i, i] - 2 * c[0, i])) for i in range(1, 5))

    pairs = ranked_pairs(rate([*"01234"], votes))
    drops = [doubt(votes) - doubt([*votes, vote(*pair, "same")]) for pair in pairs]
    assert drops == pytest.approx(sorted(drops, reverse=True), abs=1e-9)
    assert drops[0] > 2 * drops[5] > 0


def test_the_race_is_the_newest_generation_its_parent_and_who_may_still_be_the_best(tmp_path: Path) -> None:
    lineage = Lineage.create(tmp_path, Settings(["/m"]))

    def node(name: str, parent: str | None = None, passed: bool = True) -> Node:
        return Node(name, Move("add", "/m"), "new", {}, parent, gate=Gate(passed))

    def votes(a: str, b: str, times: int) -> None:
        for _ in range(times):
            lineage.vote(a, b, "a", chat=[("user", "x")], replies=["x", "y"], left="a", voter="kim")

    lineage.write(Generation(0, [node("0")]))
    assert list(standing(lineage).ratings) == ["0"]
    lineage.write(Generation(1, [node("1a", "0"), node("1b", "0"), node("1c", "0", passed=False), node("1d", "0")]))
    assert list(standing(lineage).ratings) == ["0", "1a", "1b", "1d"]
    votes("1a", "0", 30)
    votes("1a", "1b", 1)
    votes("1b", "1a", 1)
    lineage.write(Generation(2, [node("2a", "1a"), node("2b", "1a", passed=False)]))
    found = standing(lineage)
    assert list(found.ratings) == ["1a", "1b", "2a"]  # 0 is out, 1d has no vote, 1b may be the best
    assert sum(r.best for r in found.ratings.values()) == pytest.approx(1)
    assert found.ratings["1a"].value == rate(["0", "1a", "1b", "1d", "2a"], lineage.votes).ratings["1a"].value
    assert found.votes == 32


def test_half_a_round_robins_votes_are_enough_and_random_pairs_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "evolve")
    pairs = importlib.import_module("pairs")
    spent: Counter[str] = Counter()
    for seed, way in product(range(2), pairs.WAYS):
        found = pairs.run(way, nodes=12, seed=seed, limit=300)
        spent[way] += found.votes
        assert found.lost < 0.3 or way != "most telling"
    assert spent["most telling"] <= spent["round-robin"] / 2
    assert spent["most telling"] < spent["random"]

"""Ratings of nodes from votes: a Bradley-Terry model, how sure it is, and which pair to vote on next.

The probability that `a` is chosen over `b` is sigmoid(rating of a - rating of b) (Bradley and Terry, 1952), a logistic
regression that statsmodels fits. The rating of a merge is the sum of what each of its models adds, and of a deviation
that this merge alone has. So a vote on two merges is a vote on all that share their models, and merges that nobody has
made yet have ratings too. Pseudo-votes, as many won as lost, are the prior of each term: an undefeated node has a
finite rating, and a model without votes adds nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtr
from scipy.stats import norm
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM

from steer.errors import UsageError
from steer.lineage.lineage import Lineage, Outcome, Vote
from steer.lineage.recipes import contents

SURE = 0.9
"""Probability from which the best node counts as known."""
NOTICEABLE = 0.57
"""Share of votes: a node that is chosen less often over the leader is not noticeably better than the leader."""
LIKELY = 0.05
"""A node of an earlier generation stays in the race while it is the best with this probability."""
SHARES: dict[Outcome, float] = {"a": 1.0, "b": 0.0, "same": 0.5, "bad": 0.5}
"""The share of a vote that counts for `a`. Two bad replies are equal as two good ones are: only differences are rated,
and without these votes a pair of equally bad nodes would be asked for without end."""
_PSEUDO_VOTES, _SHARED_PSEUDO_VOTES = 1.0, 8.0
"""Pseudo-votes won, and as many lost, for each node that is known by its votes alone; and where contents are known, for
each node's deviation and for each thing that nodes contain. Eight are a prior of deviation 0.5 log-odds: 62 of 100."""
_OWN = math.sqrt(2 / _SHARED_PSEUDO_VOTES)
"""Deviation of that prior, in log-odds."""
_FAILED = 4.0
"""Pseudo-votes that a node which failed its gate has lost to its parent."""
_DRAWS = 4000
"""Draws from the posterior. A probability of one half has a standard error of 0.008."""
_MARGIN = math.log(NOTICEABLE / (1 - NOTICEABLE))
_Z = 1.96


@dataclass(frozen=True)
class Rating:
    """What the votes say of one node."""

    value: float
    """Log-odds of being chosen over the average of the rated nodes."""
    low: float
    """Lower end of the 95 % interval of `value`."""
    high: float
    best: float
    """Probability that the node is the best of the rated ones."""
    votes: int
    """Votes that compared the node with another one."""
    bad: int
    """Votes that called its reply and the other one bad."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Ratings of nodes, and draws from their joint posterior."""

    ratings: dict[str, Rating]
    draws: Float[np.ndarray, "draws nodes"]
    """Ratings drawn from a normal approximation of the posterior, over one level that is not known; columns in the
    order of `ratings`."""
    covariance: Float[np.ndarray, "nodes nodes"]
    """Covariance of that approximation."""
    effects: Float[np.ndarray, "draws contents"]
    """What each thing that nodes contain adds to a rating, drawn from the same posterior; columns as in `contents`."""
    contents: tuple[str, ...]
    votes: int
    """Votes that the ratings are computed from."""

    def effect(self, name: str) -> float:
        """Return what a thing adds to the rating of a node that contains it, in log-odds; 0 if no node does."""
        return float(self.effects[:, self.contents.index(name)].mean()) if name in self.contents else 0.0

    def expected_gain(self, parent: str, inside: Mapping[str, float], new: float = 1.0) -> float:
        """Return by how much a merge that is not made is expected to be better than the leader, in log-odds; where it
        is worse counts as 0 (expected improvement, Mockus 1975).

        `inside`: its contents. `parent`: a rated node. `new`: the share of the merge that is not as in its parent, 0 to
        1: a child that changes little is rated as its parent is.
        """
        amounts = np.array([inside.get(name, 0.0) for name in self.contents])
        unknown = sum(value**2 for name, value in inside.items() if name not in self.contents)
        before, lead = (self.draws[:, list(self.ratings).index(node)] for node in (parent, self.leader))
        gain = new * self.effects @ amounts + (1 - new) * before - lead
        spread = math.sqrt(float(gain.var()) + (new * _OWN) ** 2 * (1 + unknown))
        z = float(gain.mean()) / spread if spread else 0.0
        return spread * float(norm.pdf(z) + z * norm.cdf(z))

    @property
    def leader(self) -> str:
        """The node with the highest rating; of equal ones the first."""
        return max(self.ratings, key=lambda node: round(self.ratings[node].value, 6))

    @property
    def known(self) -> bool:
        """Whether the leader is the best with a probability of `SURE`."""
        return self.ratings[self.leader].best >= SURE

    @property
    def settled(self) -> bool:
        """Whether more votes would change nothing: with a probability of `SURE` no node is noticeably better than the
        leader."""
        lead = self.draws[:, list(self.ratings).index(self.leader)]
        return float((self.draws.max(1) - lead < _MARGIN).mean()) >= SURE

    @property
    def line(self) -> str:
        """The standing as one sentence for people."""
        best = f"{self.ratings[self.leader].best:.0%}"
        count = f"{self.votes} vote{'' if self.votes == 1 else 's'}"
        if len(self.ratings) == 1:
            return f"{self.leader} is the only merge"
        if self.known:
            return f"{self.leader} is the best at {best} after {count}; more votes would change nothing"
        if self.settled:
            return f"after {count} nothing is noticeably better than {self.leader}; more votes would change nothing"
        if not self.votes:
            return f"no votes on {len(self.ratings)} merges yet"
        return f"after {count} {self.leader} leads, the best at {best}; that counts as known at {SURE:.0%}"

    def among(self, nodes: Collection[str]) -> Standing:
        """Return the standing of some of the nodes: their ratings stay, and one of them is the best."""
        names = [name for name in self.ratings if name in nodes]
        places = [list(self.ratings).index(name) for name in names]
        draws = self.draws[:, places]
        ratings = {n: replace(self.ratings[n], best=float(p)) for n, p in zip(names, _best(draws), strict=True)}
        return replace(self, ratings=ratings, draws=draws, covariance=self.covariance[np.ix_(places, places)])


def rate(
    nodes: Sequence[str], votes: Sequence[Vote], seed: int = 0, *,
    inside: Mapping[str, Mapping[str, float]] | None = None, failed: Mapping[str, str] | None = None,
) -> Standing:  # fmt: skip
    """Return the ratings of nodes. `seed`: of the draws from the posterior.

    `inside`: what each node contains, and how much of it; by default nodes have nothing in common. `failed`: the parent
    of each node that failed its gate, which counts as votes lost to the parent.

    Errors: UsageError without nodes, for a vote on a node that is not among them, and for one on a node and itself.
    """
    if not nodes:
        raise UsageError("ratings: expected a node, found none; start the lineage first")
    at = {name: i for i, name in enumerate(nodes)}
    counts, bad = Counter[str](), Counter[str]()
    won: dict[tuple[int, int], float] = defaultdict(float)  # (winner, loser) -> votes, halves among them
    for vote in votes:
        for name in (vote.a, vote.b):
            if name not in at:
                raise UsageError(f"vote of {vote.voter}: expected nodes among {', '.join(nodes)}, found {name!r}")
        if vote.a == vote.b:
            raise UsageError(f"vote of {vote.voter}: expected two nodes, found {vote.a!r} twice")
        counts.update((vote.a, vote.b))
        bad.update((vote.a, vote.b) if vote.outcome == "bad" else ())
        share = SHARES[vote.outcome]
        won[at[vote.a], at[vote.b]] += share
        won[at[vote.b], at[vote.a]] += 1 - share
    for child, parent in (failed or {}).items():
        won[at[parent], at[child]] += _FAILED
    inside = inside or {}
    things = tuple(dict.fromkeys(name for node in nodes for name in inside.get(node, ())))
    amounts = np.array([[inside.get(node, {}).get(name, 0.0) for name in things] for node in nodes])
    terms = np.hstack([np.eye(len(nodes)), amounts.reshape(len(nodes), len(things))])  # [nodes, deviations and effects]
    pairs, units = sorted(won), np.eye(terms.shape[1])
    rows = np.array([terms[i] - terms[j] for i, j in pairs] + [*units, *units])
    outcomes = np.array([1] * (len(pairs) + len(units)) + [0] * len(units))
    prior = _SHARED_PSEUDO_VOTES if things else _PSEUDO_VOTES
    weights = np.array([won[pair] for pair in pairs] + [prior] * 2 * len(units))
    fitted = GLM(outcomes, rows, family=Binomial(), freq_weights=weights, hasconst=False).fit()
    found, spread = np.asarray(fitted.params), np.asarray(fitted.cov_params())
    drawn = np.random.default_rng(seed).multivariate_normal(found, spread, _DRAWS, method="cholesky")
    values, covariance, draws = terms @ found, terms @ spread @ terms.T, drawn @ terms.T
    # How good all nodes are together is known from the prior alone, and is no part of a rating.
    centre = np.eye(len(nodes)) - 1 / len(nodes)
    values, covariance = centre @ values, centre @ covariance @ centre
    errors, best = np.sqrt(np.maximum(np.diag(covariance), 0)), _best(draws)
    ratings = {
        name: Rating(
            float(values[i]), float(values[i] - _Z * errors[i]), float(values[i] + _Z * errors[i]), float(best[i]),
            counts[name], bad[name],
        )
        for name, i in at.items()
    }  # fmt: skip
    return Standing(ratings, draws, covariance, drawn[:, len(nodes) :], things, len(votes))


def rate_all(lineage: Lineage) -> Standing:
    """Return the ratings of all nodes of a lineage by all of its votes. Those that failed their gates have lost."""
    nodes = lineage.nodes
    failed = {node.id: node.parent for node in nodes.values() if node.parent and not node.passed}
    inside = {node.id: contents(node.recipe, node.profile) for node in nodes.values()}
    return rate(list(nodes), lineage.votes, lineage.settings.seed, inside=inside, failed=failed)


def standing(lineage: Lineage) -> Standing:
    """Return the ratings of the nodes in the race: the newest generation that passed, their parents, and earlier nodes
    that may still be the best. All votes of the lineage count."""
    everything = rate_all(lineage).among([node.id for node in lineage.nodes.values() if node.passed])
    race = {name for node in lineage.newest for name in (node.id, node.parent) if name}
    race |= {name for name, rating in everything.ratings.items() if rating.best >= LIKELY and rating.votes}
    return everything.among(race)


def next_pair(standing: Standing) -> tuple[str, str] | None:
    """Return the pair whose vote does most to settle who is best; None for a single node."""
    pairs = ranked_pairs(standing)
    return pairs[0] if pairs else None


def ranked_pairs(standing: Standing) -> list[tuple[str, str]]:
    """Return every pair of nodes, the one whose vote does most to settle who is best first.

    `Standing.settled` asks whether a node may be noticeably better than the leader. A vote makes ratings surer, by a
    known amount whatever its outcome: the covariance C becomes C - C e e' C / (1 / (p (1 - p)) + e' C e), with e the
    difference of the pair's nodes and p the probability that the first is chosen. The pair is the best by which the
    probabilities of being noticeably better than the leader drop most, summed over the nodes, if all ratings stay as
    they are (as in optimal computing budget allocation, Chen et al., 2000). Between equal pairs the one with fewer
    votes comes first.
    """
    names, values = list(standing.ratings), np.array([rating.value for rating in standing.ratings.values()])
    pairs = list(combinations(range(len(names)), 2))
    if not pairs:
        return []
    units, lead = np.eye(len(names)), names.index(standing.leader)
    compared = np.array([units[i] - units[j] for i, j in pairs])  # [pairs, nodes]
    over = np.delete(units, lead, 0) - units[lead]  # [others, nodes]
    chosen = expit(compared @ values)
    surer = compared @ standing.covariance  # [pairs, nodes]
    doubt = (surer * compared).sum(1) + 1 / (chosen * (1 - chosen))
    now = ((over @ standing.covariance) * over).sum(1)
    after = now - (surer @ over.T) ** 2 / doubt[:, None]  # [pairs, others]
    short = _MARGIN - over @ values
    drops = np.round((ndtr(-short / np.sqrt(now)) - ndtr(-short / np.sqrt(after))).sum(1), 9)
    votes = [standing.ratings[name].votes for name in names]
    order = sorted(range(len(pairs)), key=lambda i: (-drops[i], sum(votes[n] for n in pairs[i]), i))
    return [(names[pairs[i][0]], names[pairs[i][1]]) for i in order]


def _best(draws: Float[np.ndarray, "draws nodes"]) -> Float[np.ndarray, " nodes"]:
    """The share of the draws in which each node is the best."""
    return np.bincount(draws.argmax(1), minlength=draws.shape[1]) / len(draws)

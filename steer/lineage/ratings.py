"""Ratings of nodes from votes: a Bradley-Terry model, how sure it is, and which pair to vote on next.

The probability that `a` is chosen over `b` is sigmoid(rating of a - rating of b) (Bradley and Terry, 1952), a logistic
regression that statsmodels fits. Two pseudo-votes for each node, one won and one lost against an average node, are the
prior: an undefeated node has a finite rating, and a node without votes an average one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.special import expit, ndtr
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM

from steer.errors import UsageError
from steer.lineage.lineage import Lineage, Outcome, Vote

SURE = 0.9
"""Probability from which the best node counts as known."""
NOTICEABLE = 0.55
"""Share of votes: a node that is chosen less often over the leader is not noticeably better than the leader."""
LIKELY = 0.05
"""A node of an earlier generation stays in the race while it is the best with this probability."""
SHARES: dict[Outcome, float] = {"a": 1.0, "b": 0.0, "same": 0.5, "bad": 0.5}
"""The share of a vote that counts for `a`. Two bad replies are equal as two good ones are: only differences are rated,
and without these votes a pair of equally bad nodes would be asked for without end."""
_PSEUDO_VOTES = 1.0
"""Pseudo-votes won, and as many lost, against an average node."""
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
    """Ratings drawn from a normal approximation of the posterior; columns in the order of `ratings`."""
    covariance: Float[np.ndarray, "nodes nodes"]
    """Covariance of that approximation."""
    votes: int
    """Votes that the ratings are computed from."""

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
        return Standing(ratings, draws, self.covariance[np.ix_(places, places)], self.votes)


def rate(nodes: Sequence[str], votes: Sequence[Vote], seed: int = 0) -> Standing:
    """Return the ratings of nodes. `seed`: of the draws from the posterior.

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
    units = np.eye(len(nodes))
    pairs = sorted(won)
    rows = np.array([units[i] - units[j] for i, j in pairs] + [*units, *units])
    outcomes = np.array([1] * (len(pairs) + len(nodes)) + [0] * len(nodes))
    weights = np.array([won[pair] for pair in pairs] + [_PSEUDO_VOTES] * 2 * len(nodes))
    fitted = GLM(outcomes, rows, family=Binomial(), freq_weights=weights).fit()
    values, covariance = np.asarray(fitted.params), np.asarray(fitted.cov_params())
    draws = np.random.default_rng(seed).multivariate_normal(values, covariance, _DRAWS, method="cholesky")
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
    return Standing(ratings, draws - draws.mean(1, keepdims=True), covariance, len(votes))


def standing(lineage: Lineage) -> Standing:
    """Return the ratings of the nodes in the race: the newest generation that passed, their parent, and earlier nodes
    that may still be the best. All votes of the lineage count."""
    rated = {node.id: node for node in lineage.nodes.values() if node.passed}
    everything = rate(list(rated), lineage.votes, lineage.settings.seed)
    newest = lineage.newest
    race = {node.id for node in newest} | {node.parent for node in newest if node.parent}
    race |= {name for name, rating in everything.ratings.items() if rating.best >= LIKELY and rating.votes}
    return everything.among(race & rated.keys())


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

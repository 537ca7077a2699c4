"""`steer find --votes`: the direction of a person's taste, from the replies that they preferred and rejected.

`cross_fit` makes a difference of means at every site and asks it about votes on other messages; `find_taste` reads the
votes of a file, chooses the site that predicts such votes best, and returns a Direction with how well it predicts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from sklearn.model_selection import GroupKFold
from torch import Tensor

from steer.core.direction import Direction
from steer.core.names import check_name
from steer.core.trait import NeutralPrompts, Trait, shipped_traits
from steer.core.votes import LEAST, Vote, usable_votes
from steer.errors import UsageError
from steer.finding.directions import in_band, middle, orthogonal, with_statistics
from steer.finding.measuring import calibrated, judged
from steer.measure.contrast import Reply, reply_means
from steer.measure.harness import Numbers, neutral_replies
from steer.measure.probes.probe import Figure
from steer.measure.scorer import Scorer, chance_auroc
from steer.measure.statistics import CONFIDENCE, POWER, Mean, mean_of
from steer.measure.verdict import Verdict
from steer.model.loaded import Message
from steer.model.steered import SteeredModel
from steer.progress import Bar, bar

NAME = "my-taste"
FOLDS = 10
"""Folds of the messages: the votes on each are predicted from the votes on the others."""
NEUTRAL = 16
"""Neutral prompts whose replies give the neutral mean and the statistics."""
READ, CONTEXT = 256, 1024
"""Tokens that are read of a reply, and with the chat before it, of which the oldest messages are left out."""
FIFTH = 0.2
"""Share of the replies at each end between which amount 1 moves."""
FAR = 20
"""Multiple of the votes beyond which it is no use to say how many more are needed."""


@dataclass(frozen=True, eq=False)
class Ballots:
    """Votes as indices into the replies that they are about."""

    liked: Int[np.ndarray, " votes"]
    """Index of the reply that was preferred or called good; -1 for a thumb down."""
    disliked: Int[np.ndarray, " votes"]
    """Index of the other reply of a pair, or of the one that was called bad; -1 for a thumb up."""
    messages: tuple[str, ...]
    """The user's message of each vote."""

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def pairs(self) -> int:
        """How many are between two replies."""
        return int(((self.liked >= 0) & (self.disliked >= 0)).sum())


@dataclass(frozen=True, eq=False)
class CrossFit:
    """One vector per site, and what vectors of other messages' votes say of each vote."""

    sites: tuple[int, ...]
    vectors: Float[Tensor, "sites d"]
    """Difference of means over all votes, unit norm, orthogonal to the neutral mean."""
    centres: Float[Tensor, " sites"]
    """Projection half-way between the liked and the disliked replies."""
    distances: Float[np.ndarray, " sites"]
    """Distance between the fifth of the replies that reads as most liked and the fifth that reads as least liked."""
    correct: Float[np.ndarray, "votes sites"]
    """1 where the votes on other messages predict a vote, 0 where they predict the opposite, one half for a tie."""
    nested: Float[np.ndarray, " votes"]
    """`correct` at the site that was chosen without the vote's message, so that the choice does not flatter it."""
    weights: Float[np.ndarray, " votes"]
    """1 for a pair. Thumbs up weigh together as much as thumbs down: calling everything good is no better than a
    coin, however many are."""

    def accuracy(self, messages: Sequence[str], seed: int = 0) -> Mean:
        """Share of held-out votes that are predicted, by weight, with a 95 % interval over messages."""
        values = self.nested
        if len(set(values.tolist())) > 1:  # else the interval is that of a share of 0 or 1
            values = 0.5 + self.weights * (values - 0.5)
        votes = enumerate(zip(values, messages, strict=True))
        mean = mean_of([Figure("correct", str(i), value, group=message) for i, (value, message) in votes], seed)
        return replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high))

    def direction(self, name: str, depth: int) -> Direction:
        """The direction at the site that predicts votes best in a model of `depth` blocks. It has no statistics of
        neutral replies."""
        at = best_site(self.correct, self.weights, self.sites, depth)
        middle, half = float(self.centres[at]), float(self.distances[at]) / 2
        return Direction(name, self.sites[at], self.vectors[at], with_mean=middle + half, without_mean=middle - half)


def cross_fit(
    means: Float[Tensor, "replies sites d"],
    centre: Float[Tensor, "sites d"],
    ballots: Ballots,
    sites: Sequence[int],
    depth: int,
) -> CrossFit:
    """Difference of means between liked and disliked replies at each site, cross-fitted by message.

    Pairs and thumbs are two strata: pairs differ by taste alone, single replies also by the message they answer. The
    two differences are weighted by the inverse of their variance, P/2 for P pairs and GB/(G+B) for G good and B bad
    replies. `means` are the replies' mean residual streams, `centre` the neutral mean; `sites` names their second axis.
    """
    liked, disliked = ballots.liked, ballots.disliked
    pair = (liked >= 0) & (disliked >= 0)
    groups = list(ballots.messages)
    fold = np.zeros(len(groups), dtype=int)
    for number, (_, out) in enumerate(GroupKFold(min(FOLDS, len(set(groups)))).split(groups, groups=groups)):
        fold[out] = number
    folds = int(fold.max()) + 1
    strata = [(liked, pair), (disliked, pair), (liked, ~pair & (liked >= 0)), (disliked, ~pair & (disliked >= 0))]
    sums = torch.zeros(4, folds, *means.shape[1:], dtype=torch.float64)
    counts, weights = torch.zeros(4, folds, dtype=torch.float64), np.ones(len(ballots))
    for i, (which, mask) in enumerate(strata):
        sums[i].index_add_(0, torch.tensor(fold[mask]), means[which[mask]].double())
        counts[i] = torch.tensor(np.bincount(fold[mask], minlength=folds))
        weights[mask & ~pair] = (~pair).sum() / (2 * max(1, mask.sum()))

    def fitted(*out: int) -> tuple[Tensor, Tensor]:
        """Unit vectors and half-way projections of the votes that are in none of these folds."""
        rest = [f for f in range(folds) if f not in out]
        (first, second, good, bad), (p, _, g, b) = sums[:, rest].sum(1), counts[:, rest].sum(1)
        difference = (first - second) / 2 + (b * good - g * bad) / (g + b).clamp(min=1)
        vectors = orthogonal(difference, centre.double()).nan_to_num()
        half_way = ((first + good) / (p + g).clamp(min=1) + (second + bad) / (p + b).clamp(min=1)) / 2
        return vectors, (half_way * vectors).sum(-1)

    def margins(votes: Int[np.ndarray, " n"], vectors: Tensor, half_way: Tensor) -> tuple[Numbers, Numbers]:
        """How far the liked and the disliked reply of each vote read beyond half-way, nan for the one that a thumb
        lacks."""
        found = []
        for which in (liked[votes], disliked[votes]):
            read = torch.einsum("nsd,sd->ns", means[which], vectors.to(means.dtype)).double() - half_way
            read[torch.tensor(which < 0)] = math.nan
            found.append(read.numpy())
        return found[0], found[1]

    def predict(votes: Int[np.ndarray, " n"], vectors: Tensor, half_way: Tensor) -> Numbers:
        good, bad = margins(votes, vectors, half_way)
        return (1 + np.sign(np.nan_to_num(good) - np.nan_to_num(bad))) / 2

    correct, nested = np.zeros((len(ballots), len(sites))), np.zeros(len(ballots))
    read = []
    inner = {(a, b): fitted(a, b) for a in range(folds) for b in range(a)}
    for out in range(folds):
        votes, vectors = np.flatnonzero(fold == out), fitted(out)
        correct[votes] = predict(votes, *vectors)
        read += margins(votes, *vectors)
        rest, others = fold != out, np.zeros_like(correct)
        for f in set(range(folds)) - {out}:
            others[fold == f] = predict(np.flatnonzero(fold == f), *inner[max(f, out), min(f, out)])
        nested[votes] = correct[votes, best_site(others[rest], weights[rest], sites, depth)]
    replies = np.concatenate(read)
    replies = np.sort(replies[~np.isnan(replies[:, 0])], axis=0)
    fifth = max(1, round(FIFTH * len(replies)))
    vectors, half_way = fitted()
    distances = replies[-fifth:].mean(0) - replies[:fifth].mean(0)
    return CrossFit(tuple(sites), vectors.float(), half_way.float(), distances, correct, nested, weights)


def best_site(
    correct: Float[np.ndarray, "votes sites"], weights: Float[np.ndarray, " votes"], sites: Sequence[int], depth: int
) -> int:
    """Index of the site nearest to the middle of `depth` blocks, of those that predict votes as well as the best
    site within one standard error of the difference, as `steer.finding.directions.chosen` does it."""
    correct = correct * weights[:, None]
    worse = correct[:, [int(correct.mean(0).argmax())]] - correct
    near = worse.mean(0) <= worse.std(0) / math.sqrt(len(correct))
    return sites.index(middle([s for s, n in zip(sites, near, strict=True) if n], depth))


@dataclass(frozen=True, eq=False)
class FoundTaste:
    """The result of `find_taste`."""

    direction: Direction
    accuracy: Mean
    """Share of held-out votes that the direction predicts, with an interval over messages; `items` counts votes."""
    pairs: int
    """How many votes are between two replies."""
    messages: int
    """How many different messages the votes are about."""
    left_out: int
    """Votes on replies that are empty, or too long for the model."""
    verdict: Verdict | None = None
    """What the slider does on messages without a vote, if it was asked for."""

    @property
    def coin(self) -> bool:
        """Whether it may be no better than a coin: the interval reaches one half."""
        return not self.accuracy.low > 0.5

    @property
    def more(self) -> int | None:
        """About how many more votes would show that an accuracy like this is no coin's, in 80 of 100 cases; None where
        the votes give no estimate."""
        lead = self.accuracy.value - 0.5
        if lead <= 0:
            return None
        wanted = ((norm.ppf(0.5 + CONFIDENCE / 2) + norm.ppf(POWER)) / (2 * lead)) ** 2
        more = max(10, math.ceil(wanted / 10) * 10 - self.accuracy.items)
        return more if more <= FAR * self.accuracy.items else None

    @property
    def says(self) -> str:
        """How well it predicts votes, in a sentence."""
        a = self.accuracy
        found = (f"predicts {a.value:.0%} of {a.items} held-out votes on {self.messages} messages "
                f"(95 % interval {a.low:.0%} to {a.high:.0%})")  # fmt: skip
        if not self.coin:
            return found
        need = "need many more" if self.more is None else f"need about {self.more} more"
        return f"{found}: no better than a coin yet ({need})"

    @property
    def line(self) -> str:
        """Name, site and displacement of the direction, and how well it predicts votes."""
        d, out = self.direction, f"; left out {self.left_out} votes on empty or long replies" if self.left_out else ""
        return (f"{d.name}: {self.says}; site {d.site}, amount 1 moves the residual stream by {d.share(1):.2f} of its "
                f"median norm{out}")  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, machine-readable."""
        d, a = self.direction, self.accuracy
        return {
            "name": d.name,
            "site": d.site,
            "accuracy": a.value,
            "accuracy_interval": [a.low, a.high],
            "votes": a.items,
            "pairs": self.pairs,
            "messages": self.messages,
            "left_out": self.left_out,
            "coin": self.coin,
            "more": self.more if self.coin else 0,
            "says": self.says,
            "gap": d.gap,
            "share_at_1": d.share(1),
            "calibrated": d.calibrated,
            "verdict": self.verdict and self.verdict.as_json(),
        }


def find_taste(
    model: SteeredModel,
    votes: str | Path | Sequence[Vote],
    *,
    name: str = NAME,
    site: int | None = None,
    seed: int = 0,
    verdict: bool = False,
    calibrate: bool = False,
    topics: Sequence[str] | None = None,
    progress: Bar = bar,
    say: Callable[[str], None] = lambda _: None,
) -> FoundTaste:
    """Make a direction from votes: the difference of means between liked and disliked replies, at the site that
    predicts held-out votes best.

    Replies are read by the untouched model whichever model wrote them. Amount 1 moves from the fifth of the replies
    that reads as least liked to the fifth that reads as most liked, read by directions that had not seen them, so it
    does not shrink where votes contradict each other. A direction that is no better than a coin is returned
    too, and `says` reports that.

    `votes`: a file of votes, or the votes. `site` skips the choice of a site. `seed` is that of the replies. `verdict`
    and `calibrate` are those of `find_trait`; the text scorer behind the verdict knows the words of the liked and of
    the disliked replies. `topics` are the messages that the verdict is measured on, by default those that ship as
    held-out topics. `say` is called with a line before each step.
    Errors: UsageError for fewer than 20 votes, for votes on fewer than five messages, and for votes that like or
    dislike everything; SteerError for a file that does not hold votes.

        found = find_taste(model, "votes.jsonl", name="mine")
        print(found.says)
        model.sliders.put(found.direction, 1.0)
    """
    if check_name(name, "name") in shipped_traits():
        raise UsageError(f"name: expected a name that no shipped trait has, found {name!r}; choose another")
    depth = model.anatomy.blocks
    if site is not None and not 0 <= site < depth:
        raise UsageError(f"site: expected 0 to {depth - 1} for {model.name}, found {site}")
    usable = usable_votes(votes)
    ballots, replies = ballots_of(model, usable)
    if len(ballots) < LEAST:
        raise UsageError(
            f"votes: expected at least {LEAST} on replies that {model.name} can read, found {len(ballots)} of "
            f"{len(usable)}; the others are empty or too long"
        )
    steps = 3 + verdict + calibrate
    say(f"1 of {steps}: writing neutral replies")
    with progress(f"{name}: neutral replies", None, "tokens") as advance:
        neutral = neutral_replies(model, NeutralPrompts.load().fit[:NEUTRAL], on_tokens=advance)
    say(f"2 of {steps}: reading {len(replies)} replies")
    with progress(f"{name}: residual streams", len(replies) + len(neutral), "replies") as advance:
        means = reply_means(model, [*replies, *neutral], on_rows=advance)
    say(f"3 of {steps}: choosing the site")
    sites = in_band(range(depth), depth) if site is None else [site]
    means, centre = means[: len(replies), sites], means[len(replies) :, sites].mean(0)
    fit = cross_fit(means, centre, ballots, sites, depth)
    direction = with_statistics(model, fit.direction(name, depth), neutral, {})
    left_out, messages = len(usable) - len(ballots), len(set(ballots.messages))
    found = FoundTaste(direction, fit.accuracy(ballots.messages, seed), ballots.pairs, messages, left_out)
    about = {
        "method": "difference of means between liked and disliked replies, orthogonal to the neutral mean",
        "votes": found.as_json(),
        "accuracy": {str(s): round(float(v), 4) for s, v in zip(sites, fit.correct.mean(0), strict=True)},
        "seed": seed,
    }
    direction = replace(direction, provenance=direction.provenance | about)
    if verdict:
        say(f"4 of {steps}: measuring what the slider does")
        scorer, a = taste_scorer(name, ballots, replies, topics), found.accuracy
        by_words = chance_auroc(int((ballots.liked >= 0).sum()), int((ballots.disliked >= 0).sum()))
        # Where votes contradict each other nothing predicts many of them, so both have to exceed chance alone.
        measured = [(a.value, 0.5 + a.value - a.low), (scorer.auroc, by_words)]
        auroc, least = min(measured, key=lambda pair: pair[0] - pair[1])
        direction, assessed = judged(model, direction, scorer, auroc=auroc, least=least, seed=seed, progress=progress)
        found = replace(found, verdict=assessed)
    if calibrate:
        say(f"{steps} of {steps}: measuring how far it may be moved")
        direction = calibrated(model, direction, seed=seed, progress=progress)
    return replace(found, direction=direction)


def taste_scorer(name: str, ballots: Ballots, replies: Sequence[Reply], topics: Sequence[str] | None = None) -> Scorer:
    """Return a text scorer of the words of liked and of disliked replies, whose AUROC is on votes about other messages.

    A reply counts as often as it was voted on. `topics` are the held-out topics of the scorer's trait; by default those
    that ship.
    Errors: TraitNotFoundError for replies that a classifier on words cannot learn from.
    """
    sides = [np.flatnonzero(which >= 0) for which in (ballots.liked, ballots.disliked)]
    liked, disliked = (
        [replies[int(i)].text for i in which[side]]
        for which, side in zip((ballots.liked, ballots.disliked), sides, strict=True)
    )
    messages = [ballots.messages[vote] for side in sides for vote in side]
    trait = Trait.from_sentences("You are liked.", None, name)
    if topics is not None:
        trait = replace(trait, held_out=tuple(topics))
    return Scorer.cross_fitted(trait, liked, disliked, messages)


def ballots_of(model: SteeredModel, votes: Sequence[Vote]) -> tuple[Ballots, list[Reply]]:
    """Return votes as ballots, and the replies that they are about, each once. Votes on replies that are empty, or too
    long for the model together with the message before them, are left out."""
    numbers: dict[tuple[Any, str], int] = {}
    replies: list[Reply] = []
    rows, messages = [], []
    for vote in votes:
        chat: list[Message] = [{"role": m.role, "content": m.content} for m in vote.chat]
        texts = [text for text in (vote.liked, vote.disliked) if text is not None]
        read = [read_as(model, chat, text) for text in texts]
        if None in read:
            continue
        for text, reply in zip(texts, read, strict=True):
            if reply is not None and (vote.chat, text) not in numbers:
                numbers[vote.chat, text] = len(replies)
                replies.append(reply)
        rows.append([-1 if t is None else numbers[vote.chat, t] for t in (vote.liked, vote.disliked)])
        messages.append(vote.message)
    liked, disliked = np.array(rows, dtype=int).reshape(-1, 2).T
    return Ballots(liked, disliked, tuple(messages)), replies


def read_as(model: SteeredModel, chat: Sequence[Message], text: str) -> Reply | None:
    """Return a text as the model's reply to a chat, `READ` tokens of it at most; None if it is empty or too long. The
    oldest messages are left out of a chat over `CONTEXT` tokens."""
    ids = model.encode(text)[:READ]
    system = [m for m in chat[:1] if m["role"] == "system"]
    rest = chat[len(system) :]
    for start in [i for i, m in enumerate(rest) if m["role"] == "user"] or [0]:
        reply = Reply.of(model, [*system, *rest[start:]], ids)
        if not reply.ids:
            return None
        if len(reply.prompt_ids(model)) + len(reply.ids) <= min(model.context, CONTEXT):
            return reply
    return None

"""The trials of a search, edits run as hooks on the live model, and the choice of one of them.

`Bench` measures many edits per batch: the trait to remove, the traits that are to stay, and the cost on neutral text.
`choose` takes the trial with the lowest KL among those that reach the goal; `confirmed` first measures the best ones on
more topics.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import Trait
from steer.errors import SteerError, UsageError
from steer.measure.contrast import Reply
from steer.measure.harness import Scores, answers, plain_paragraphs, prose_texts, row_costs
from steer.measure.scorer import Scorer
from steer.measure.search.space import Params, edit_label
from steer.model.steered import SteeredModel
from steer.progress import Advance

REPLY_TOKENS = 100
"""Length of the replies that are scored, tokens; a trait may show late in a reply."""
NEUTRAL_TOKENS = 48
"""Tokens of each neutral reply that KL is computed on."""
PASSAGES, PASSAGE_TOKENS = 6, 64
"""Number of passages of plain prose that perplexity is computed on, and tokens of each."""
MOST_KL = 99.0
"""Nats per token; a larger value, or one that is not a number, is reported as this."""
FINALISTS, ROUNDS = 4, 3
"""Number of edits tried on the rest of the fit topics in one round, and largest number of such rounds."""


@dataclass(frozen=True)
class Outcome(Scores):
    """The scores of one edit on fit topics, and what it does to the traits that are to stay."""

    kept: dict[str, float] = field(default_factory=dict)
    """Per trait that is to stay: its rate on the trait's own fit topics."""
    replies: int = 0
    """Number of replies that `rate` is computed over; as many are generated for each trait that is to stay."""

    def with_more(self, other: Outcome) -> Outcome:
        """The outcome over the replies of both. KL and perplexity are those of this one."""
        share = other.replies / max(1, self.replies + other.replies)

        def mean(first: float, second: float) -> float:
            return (1 - share) * first + share * second

        return replace(
            self,
            rate=mean(self.rate, other.rate),
            probability=mean(self.probability, other.probability),
            repetition=mean(self.repetition, other.repetition),
            kept={name: mean(rate, other.kept[name]) for name, rate in self.kept.items()},
            replies=self.replies + other.replies,
        )


@dataclass(frozen=True)
class Scope:
    """How many topics, tokens and neutral replies each trial uses."""

    topics: int = 20
    """Fit topics that every trial answers; only the best trials answer the others."""
    tokens: int = REPLY_TOKENS
    """Length of the scored replies, tokens."""
    neutral: int = 16
    """Neutral replies that KL is computed on."""
    seed: int = 0
    """Seed of sampling and of the choice of topics."""

    def parts(self, trait: Trait) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(fit topics for every trial, the other fit topics). If no others are left, the second is the first."""
        topics = random.Random(self.seed).sample(trait.fit, len(trait.fit))
        first, rest = tuple(topics[: self.topics]), tuple(topics[self.topics :])
        return first, rest or first


class Bench:
    """Runs edits on the live model and measures them, all in one batch in which each row has its own edit.

    `kept` has a scorer per trait that is to stay. `neutral` are the untouched model's replies to neutral prompts of the
    fit split.
    """

    def __init__(
        self,
        model: SteeredModel,
        scorer: Scorer,
        kept: Mapping[str, Scorer],
        neutral: Sequence[Reply],
        scope: Scope = Scope(),
        on_tokens: Advance | None = None,
    ) -> None:
        self.model, self.scorer, self.kept, self.scope = model, scorer, dict(kept), scope
        self.scorers = [scorer, *kept.values()]
        self.on_tokens = on_tokens
        cut = [r for r in neutral if r.ids][: scope.neutral]
        self.neutral = [(r.prompt_ids(model), r.ids[:NEUTRAL_TOKENS]) for r in cut]
        self.prose = prose_texts(model, plain_paragraphs()[0][:PASSAGES], PASSAGE_TOKENS)

    def tokens(self, edits: int) -> int:
        """Largest number of tokens that trials of this many edits write."""
        return edits * self.scope.tokens * sum(len(self.scope.parts(s.trait)[0]) for s in self.scorers)

    def outcomes(self, edits: Sequence[Edit | None], *, rest: bool = False) -> list[Outcome]:
        """The outcome of each edit (None: the untouched model), on the topics that every trial uses, or with `rest` on
        the other fit topics. With `rest` the costs are not measured: neutral text is the same for all topics."""
        topics = [self.scope.parts(s.trait)[rest] for s in self.scorers]
        sampler = replace(MEASURE, max_new_tokens=self.scope.tokens, seed=self.scope.seed + rest)
        found = answers(self.model, self.scorers, topics, edits, sampler, on_tokens=self.on_tokens)
        moving = [e for e in edits if e is not None]
        kls = entropies = [(0.0, 0.0)] * (1 + len(moving))
        if not rest:
            kls, entropies = (row_costs(self.model, texts, moving) for texts in (self.neutral, self.prose))
        # The first of the costs are those of the untouched model.
        untouched, *moved = [(kl, entropy) for (kl, _), (_, entropy) in zip(kls, entropies, strict=True)]
        costs = iter(moved)
        out = []
        for edit, (shows, *others) in zip(edits, found, strict=True):
            kl, entropy = untouched if edit is None else next(costs)
            scores = replace(shows.scores, kl=min(kl, MOST_KL), perplexity=math.exp(min(entropy, MOST_KL)))
            kept = {name: other.scores.rate for name, other in zip(self.kept, others, strict=True)}
            out.append(Outcome(**vars(scores), kept=kept, replies=len(shows.ids)))
        return out


@dataclass(frozen=True, eq=False)
class Trial:
    """One edit, its parameters in the search space, and its measured outcome."""

    number: int
    params: Params
    edit: Edit
    outcome: Outcome

    @property
    def label(self) -> str:
        """The edit in a few words."""
        return edit_label(self.edit)

    def as_json(self) -> dict[str, Any]:
        """The trial as JSON, for reports."""
        trial = {"number": self.number, "label": self.label, "params": self.params, "edit": self.edit.describe()}
        return trial | self.outcome.as_json()


@dataclass(frozen=True)
class Goal:
    """What an edit must reach, and how much it may cost."""

    share: float = 0.4
    """The trait's rate must fall to this share of the untouched model's rate."""
    as_unsearched: bool = True
    """Whether rate and mean probability must also be no higher than those of the unsearched bake."""
    max_kl: float | None = None
    """Largest KL on neutral prompts, nats per token; None means the KL of the unsearched bake."""
    tolerance: float = 0.1
    """Largest change, up or down, in the rate of a trait that is to stay."""

    def __post_init__(self) -> None:
        for name, value in (("--goal", self.share), ("--tolerance", self.tolerance)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name}: expected a share from 0 to 1, found {value}")
        if self.max_kl is not None and not self.max_kl > 0.0:
            raise UsageError(f"--max-kl: expected nats per token above 0, found {self.max_kl}")

    def target(self, untouched: Outcome, unsearched: Outcome) -> tuple[float, float]:
        """The highest rate and the highest mean probability that reach the goal. The share allowed of the untouched
        probability is 1.5 times that of the rate: the probability is not zero even for a model without the trait."""
        rate, probability = self.share * untouched.rate, min(1.0, 1.5 * self.share) * untouched.probability
        if self.as_unsearched:
            return min(rate, unsearched.rate), min(probability, unsearched.probability)
        return rate, probability

    def reached(self, found: Outcome, untouched: Outcome, unsearched: Outcome) -> bool:
        """Whether an outcome's rate and mean probability are low enough."""
        rate, probability = self.target(untouched, unsearched)
        return found.rate <= rate and found.probability <= probability

    def shift(self, found: Outcome, untouched: Outcome) -> float:
        """The largest change in the rate of a trait that is to stay."""
        return max((abs(rate - untouched.kept[name]) for name, rate in found.kept.items()), default=0.0)

    def keeps(self, found: Outcome, untouched: Outcome) -> bool:
        """Whether the traits that are to stay change by no more than the tolerance."""
        return self.shift(found, untouched) <= self.tolerance + 1e-9


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen edit."""

    trial: Trial
    """If it was confirmed on the rest of the fit topics, its outcome is that on all of them."""
    reached: bool
    """Whether the trial reaches the goal."""


def choose(trials: Sequence[Trial], untouched: Outcome, unsearched: Outcome, goal: Goal) -> Choice:
    """The trial with the lowest KL that reaches the goal within the KL limit.

    If none does: the trial with the lowest mean probability within the KL limit. If none is within it: the trial with
    the lowest KL. `unsearched` is the outcome of the unsearched bake. Trials that change a trait that is to stay are
    never chosen.

    Errors: SteerError when every trial changes a trait that is to stay.
    """
    feasible = [t for t in trials if goal.keeps(t.outcome, untouched)]
    if not feasible:
        nearest = min((goal.shift(t.outcome, untouched) for t in trials), default=0.0)
        raise SteerError(
            f"--keep: expected an edit that moves no rate of {', '.join(untouched.kept)} by more than "
            f"{goal.tolerance:g}, found none in {len(trials)} trials, the nearest moves one by {nearest:.2f}; "
            "run the same command with more --trials or a higher --tolerance"
        )
    limit = unsearched.kl if goal.max_kl is None else goal.max_kl

    def rank(t: Trial) -> tuple[int, float, int]:
        within = t.outcome.kl <= limit
        if within and goal.reached(t.outcome, untouched, unsearched):
            return 0, t.outcome.kl, t.number
        return (1, t.outcome.probability, t.number) if within else (2, t.outcome.kl, t.number)

    best = min(feasible, key=rank)
    return Choice(best, rank(best)[0] == 0)


def confirmed(
    trials: Sequence[Trial],
    untouched: Outcome,
    goal: Goal,
    again: Callable[[Sequence[Trial | None]], Sequence[Outcome]],
) -> Choice:
    """As `choose`, but only after the best trials were measured on the fit topics that no trial used: the best of many
    trials is often one that was lucky. `trials[0]` is the unsearched bake.

    `again` measures trials on the rest of the fit topics and returns their outcomes; None stands for the untouched
    model.
    """
    plain = trials[0]
    more = again([None, plain])
    all_untouched, unsearched = untouched.with_more(more[0]), plain.outcome.with_more(more[1])
    known = {plain.number: replace(plain, outcome=unsearched)}
    left = [t for t in trials if t.number != plain.number and goal.keeps(t.outcome, untouched)]
    for _ in range(ROUNDS):
        # The best that are left, in the order in which `choose` would take them.
        group: list[Trial] = []
        while left and len(group) < FINALISTS:
            group.append(choose(left, untouched, plain.outcome, goal).trial)
            left.remove(group[-1])
        if not group:
            break
        for t, rest in zip(group, again(group), strict=True):
            known[t.number] = replace(t, outcome=t.outcome.with_more(rest))
        good = [t for t in known.values() if t.number != plain.number and goal.keeps(t.outcome, all_untouched)]
        # The trials with the lowest KL came first: those left have a higher one.
        if good and choose(good, all_untouched, unsearched, goal).reached:
            break
    return choose(list(known.values()), all_untouched, unsearched, goal)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other trial beats in both KL and mean probability, by ascending KL."""
    out: list[Trial] = []
    for t in sorted(trials, key=lambda t: (t.outcome.kl, t.outcome.probability)):
        if not out or t.outcome.probability < out[-1].outcome.probability:
            out.append(t)
    return out


def search_json(trials: Sequence[Trial], untouched: Outcome, choice: Choice, goal: Goal) -> dict[str, Any]:
    """All trials and the choice as JSON, for search.json and the report. The untouched model comes first, as number -1.

    `front` marks the trials of the Pareto front, `keeps` those that change no trait that is to stay.
    """
    keeps = {t.number: goal.keeps(t.outcome, untouched) for t in trials}
    front = {t.number for t in pareto_front([t for t in trials if keeps[t.number]])}
    rows = [t.as_json() | {"front": t.number in front, "keeps": keeps[t.number]} for t in trials]
    nothing = {"number": -1, "label": "untouched", "params": None, "edit": None, "front": False, "keeps": True}
    return {
        "goal": asdict(goal),
        "reached": choice.reached,
        "chosen": choice.trial.as_json(),
        "trials": [nothing | untouched.as_json(), *rows],
    }

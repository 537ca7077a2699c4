"""Which of the edits tried is taken: the one that costs least among those that do what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from steer.errors import SteerError, UsageError
from steer.measure.search.space import Params, edit_label
from steer.measure.search.trials import Outcome
from steer.values.edit import Edit

TOLERANCE = 0.1
"""By how much the rate of a trait that is to stay may move."""
FINALISTS = 4
"""Edits that are tried on the rest of the fit topics at a time."""
ROUNDS = 3
"""Times at most that the next so many are."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One edit and what it did."""

    number: int
    params: Params
    edit: Edit
    outcome: Outcome

    @property
    def label(self) -> str:
        """The edit in a few words."""
        return edit_label(self.edit)

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        told = {"number": self.number, "label": self.label, "params": self.params, "edit": self.edit.describe()}
        return told | self.outcome.as_json()


@dataclass(frozen=True)
class Goal:
    """What an edit is to reach, and what it may cost."""

    share: float = 0.4
    """Of the untouched rate, to get under."""
    as_unsearched: bool = True
    """Whether rate and mean probability may be no higher than the unsearched bake's either."""
    max_kl: float | None = None
    """Nats per token on neutral prompts; None: what the unsearched bake costs."""
    tolerance: float = TOLERANCE
    """By how much the rate of a trait that is to stay may move, either way."""

    def __post_init__(self) -> None:
        for name, value in (("--goal", self.share), ("--tolerance", self.tolerance)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name}: expected a share from 0 to 1, found {value}")
        if self.max_kl is not None and not self.max_kl > 0.0:
            raise UsageError(f"--max-kl: expected nats per token above 0, found {self.max_kl}")

    def target(self, untouched: Outcome, unsearched: Outcome) -> tuple[float, float]:
        """The rate and the mean probability to get under. The probability may be half as high again a share:
        it says more about few replies, and is not zero for a model that shows nothing of the trait."""
        rate, probability = self.share * untouched.rate, min(1.0, 1.5 * self.share) * untouched.probability
        if self.as_unsearched:
            return min(rate, unsearched.rate), min(probability, unsearched.probability)
        return rate, probability

    def reached(self, found: Outcome, untouched: Outcome, unsearched: Outcome) -> bool:
        """Whether it does what was wanted."""
        rate, probability = self.target(untouched, unsearched)
        return found.rate <= rate and found.probability <= probability

    def shift(self, found: Outcome, untouched: Outcome) -> float:
        """The most that a trait which is to stay has moved."""
        return max((abs(rate - untouched.kept[name]) for name, rate in found.kept.items()), default=0.0)

    def keeps(self, found: Outcome, untouched: Outcome) -> bool:
        """Whether what is to stay stays."""
        return self.shift(found, untouched) <= self.tolerance + 1e-9

    def limit(self, unsearched: Outcome) -> float:
        """The most that it may cost."""
        return unsearched.kl if self.max_kl is None else self.max_kl


@dataclass(frozen=True, eq=False)
class Choice:
    """The edit that is taken."""

    trial: Trial
    """Its outcome is that on all fit topics where it was tried on the rest of them."""
    reached: bool
    """Whether it does what was wanted; if not it is the strongest of those that cost little enough."""


def choose(trials: Sequence[Trial], untouched: Outcome, unsearched: Outcome, goal: Goal) -> Choice:
    """The cheapest trial that reaches the goal; without one, the least probability among those cheap enough, or the
    cheapest where none is.

    Errors: SteerError when every trial moves what is to stay.
    """
    feasible = [t for t in trials if goal.keeps(t.outcome, untouched)]
    if not feasible:
        nearest = min((goal.shift(t.outcome, untouched) for t in trials), default=0.0)
        raise SteerError(
            f"--keep: expected an edit that moves no rate of {', '.join(untouched.kept)} by more than "
            f"{goal.tolerance:g}, found none in {len(trials)} trials, the nearest moves one by {nearest:.2f}; "
            "run the same command with more --trials or a higher --tolerance"
        )
    cheap = [t for t in feasible if t.outcome.kl <= goal.limit(unsearched)]
    reached = [t for t in cheap if goal.reached(t.outcome, untouched, unsearched)]
    if reached:
        return Choice(min(reached, key=lambda t: (t.outcome.kl, t.number)), True)
    if cheap:
        return Choice(min(cheap, key=lambda t: (t.outcome.probability, t.number)), False)
    return Choice(min(feasible, key=lambda t: (t.outcome.kl, t.number)), False)


def confirmed(
    trials: Sequence[Trial],
    untouched: Outcome,
    goal: Goal,
    again: Callable[[Sequence[Trial | None]], Sequence[Outcome]],
) -> Choice:
    """As `choose`, after the cheapest that reach the goal were tried on topics that no trial saw: out of many trials
    the cheapest is often one that was lucky. `trials[0]` is the unsearched bake.

    `again` gives the outcomes on the rest of the fit topics of trials, and of None for the untouched model.
    """
    plain = trials[0]
    more = again([None, plain])
    all_untouched, unsearched = untouched.with_more(more[0]), plain.outcome.with_more(more[1])
    known = {plain.number: replace(plain, outcome=unsearched)}
    for _ in range(ROUNDS):
        group = _nearest([t for t in trials if t.number not in known], untouched, plain.outcome, goal)
        if not group:
            break
        for t, rest in zip(group, again(group), strict=True):
            known[t.number] = replace(t, outcome=t.outcome.with_more(rest))
        good = [t for t in known.values() if t.number != plain.number and goal.keeps(t.outcome, all_untouched)]
        # The cheapest came first: those still left cost more.
        if good and choose(good, all_untouched, unsearched, goal).reached:
            break
    return choose(list(known.values()), all_untouched, unsearched, goal)


def _nearest(trials: Sequence[Trial], untouched: Outcome, unsearched: Outcome, goal: Goal) -> list[Trial]:
    """Those to look at more closely, in the order in which they would be chosen."""
    left = [t for t in trials if goal.keeps(t.outcome, untouched)]
    out: list[Trial] = []
    while left and len(out) < FINALISTS:
        best = choose(left, untouched, unsearched, goal).trial
        out.append(best)
        left.remove(best)
    return out


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both KL and mean probability, from the cheapest on."""
    out: list[Trial] = []
    for t in sorted(trials, key=lambda t: (t.outcome.kl, t.outcome.probability)):
        if not out or t.outcome.probability < out[-1].outcome.probability:
            out.append(t)
    return out


def told(trials: Sequence[Trial], untouched: Outcome, choice: Choice, goal: Goal) -> dict[str, Any]:
    """All that was tried and what was chosen, for the report: the untouched model first, as number -1."""
    front = {t.number for t in pareto_front([t for t in trials if goal.keeps(t.outcome, untouched)])}
    rows = [t.as_json() | {"front": t.number in front, "keeps": goal.keeps(t.outcome, untouched)} for t in trials]
    nothing = {"number": -1, "label": "untouched", "params": None, "edit": None, "front": False, "keeps": True}
    return {
        "goal": asdict(goal),
        "reached": choice.reached,
        "chosen": choice.trial.as_json(),
        "trials": [nothing | untouched.as_json(), *rows],
    }

"""The last step of a search: choose the trial with the lowest KL among those that reach the goal.

`choose` decides from the trials alone; `confirmed` first measures the best ones on more topics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from steer.core.edit import Edit
from steer.errors import SteerError, UsageError
from steer.measure.search.space import Params, edit_label
from steer.measure.search.trials import Outcome

TOLERANCE = 0.1
"""Largest change allowed in the rate of a trait that is to stay."""
FINALISTS = 4
"""Number of edits tried on the rest of the fit topics in one round."""
ROUNDS = 3
"""Largest number of such rounds."""


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
    tolerance: float = TOLERANCE
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

    def limit(self, unsearched: Outcome) -> float:
        """The largest KL allowed, nats per token."""
        return unsearched.kl if self.max_kl is None else self.max_kl


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen edit."""

    trial: Trial
    """If it was confirmed on the rest of the fit topics, its outcome is that on all of them."""
    reached: bool
    """Whether the trial reaches the goal; if not, it is the strongest trial within the KL limit, or without such a
    trial the one with the lowest KL."""


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
    """As `choose`, but only after the best trials were measured on the fit topics that no trial used: the best of many
    trials is often one that was lucky. `trials[0]` is the unsearched bake.

    `again` measures trials on the rest of the fit topics and returns their outcomes; None stands for the untouched
    model.
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
        # The trials with the lowest KL came first: those left have a higher one.
        if good and choose(good, all_untouched, unsearched, goal).reached:
            break
    return choose(list(known.values()), all_untouched, unsearched, goal)


def _nearest(trials: Sequence[Trial], untouched: Outcome, unsearched: Outcome, goal: Goal) -> list[Trial]:
    """The `FINALISTS` best trials, in the order in which `choose` would take them."""
    left = [t for t in trials if goal.keeps(t.outcome, untouched)]
    out: list[Trial] = []
    while left and len(out) < FINALISTS:
        best = choose(left, untouched, unsearched, goal).trial
        out.append(best)
        left.remove(best)
    return out


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other trial beats in both KL and mean probability, by ascending KL."""
    out: list[Trial] = []
    for t in sorted(trials, key=lambda t: (t.outcome.kl, t.outcome.probability)):
        if not out or t.outcome.probability < out[-1].outcome.probability:
            out.append(t)
    return out


def told(trials: Sequence[Trial], untouched: Outcome, choice: Choice, goal: Goal) -> dict[str, Any]:
    """All trials and the choice as JSON, for search.json and the report. The untouched model comes first, as number -1.

    `front` marks the trials of the Pareto front, `keeps` those that change no trait that is to stay.
    """
    front = {t.number for t in pareto_front([t for t in trials if goal.keeps(t.outcome, untouched)])}
    rows = [t.as_json() | {"front": t.number in front, "keeps": goal.keeps(t.outcome, untouched)} for t in trials]
    nothing = {"number": -1, "label": "untouched", "params": None, "edit": None, "front": False, "keeps": True}
    return {
        "goal": asdict(goal),
        "reached": choice.reached,
        "chosen": choice.trial.as_json(),
        "trials": [nothing | untouched.as_json(), *rows],
    }

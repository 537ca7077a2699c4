"""The study of a search on disk: its trials in SQLite, and the loop that proposes and runs the next ones.

The study holds finished trials only. For each batch of trials a new sampler is built from them and seeded by the
batch's number, so a search that was killed continues exactly as it would have without the interruption.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from steer.baking.certificate import versions
from steer.checkpoint.sketch import Sketch
from steer.core.edit import Edit
from steer.errors import MismatchError, SteerError
from steer.files import one_line
from steer.measure.search.space import Space, edit_key
from steer.measure.search.trials import Bench, Choice, Goal, Outcome, Trial, choose, confirmed

optuna.logging.set_verbosity(optuna.logging.WARNING)
STUDY = "study.sqlite3"
BATCH = 8
"""Number of edits proposed and tried together."""
STARTUP = 2 * BATCH
"""Trials before the sampler uses earlier results: the known points, and a batch drawn at random."""
PATIENCE = 40
"""Points drawn at most to find one that was not tried before; half of them by the sampler, half at random."""
LEAST_KL = 1e-5
"""Nats per token; smaller values are reported to the sampler as this one. It sees the logarithm of KL, as costs differ
by powers of ten."""
AIM = 0.75
"""Share of the goal's mean probability; smaller probabilities are reported to the sampler as this share of the goal.
Below 1, as the probability may be higher on other topics."""
Fits = Callable[[Edit], bool]
"""Whether the checkpoint and the form of the bake can represent an edit."""


class Study:
    """The trials of one search. `path` is an SQLite file, or None for a study in memory."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], name: str) -> None:
        """Open the study at `path`, or create it.

        `about` describes what is searched (JSON), and must be the same each time; `name` is used in messages.
        Errors: MismatchError when the file is a study with another `about`, SteerError when it is not a study.
        """
        self.where = str(path) if path else "study"
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{path}" if path else None,
                study_name="steer bake --search",
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            self._expect(about, name)
            self._finish_writing()
        except (SQLAlchemyError, StorageInternalError, RuntimeError) as e:
            raise SteerError(
                f"{self.where}: expected the study of a search, found something unreadable ({one_line(e)}); remove it, "
                "or name another --search-dir"
            ) from e

    def _expect(self, about: Mapping[str, Any], name: str) -> None:
        attributes = self._study.user_attrs
        if "about" not in attributes:
            with _quiet():
                self._study.set_metric_names(["mean probability, from the aim on", "log10 KL"])
            facts = {"name": name, "versions": {**versions(), "optuna": optuna.__version__}, "about": dict(about)}
            for key, value in facts.items():
                self._study.set_user_attr(key, value)
            return
        given, recorded = json.loads(json.dumps(about)), attributes["about"]
        wrong = sorted(k for k in {*given, *recorded} if not _same(k, given.get(k), recorded.get(k)))
        if wrong:
            raise MismatchError(
                f"{self.where}: expected a study of {name}, found one of {attributes['name']}, of another "
                f"{', '.join(wrong)}; remove it, or name another --search-dir"
            )

    # What was tried

    @property
    def count(self) -> int:
        """Finished trials."""
        return len(self._study.get_trials(deepcopy=False))

    def trials(self, space: Space) -> list[Trial]:
        """Finished trials, in order."""
        out = []
        for t in self._study.get_trials(deepcopy=False):
            edit = space.edit(t.user_attrs["params"])
            assert edit is not None
            out.append(Trial(t.number, t.user_attrs["params"], edit, Outcome(**t.user_attrs["outcome"])))
        return out

    @property
    def untouched(self) -> Outcome | None:
        """The outcome of the untouched model; None before it was measured."""
        found = self._study.user_attrs.get("untouched")
        return Outcome(**found) if found else None

    # Trying more

    def run(
        self,
        bench: Bench,
        space: Space,
        goal: Goal,
        trials: int,
        *,
        seed: int = 0,
        fits: Fits = lambda edit: True,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Try edits until the study has `trials` of them, or the space has no more. `fits` rejects edits that the bake
        cannot represent. `on_batch` is called with the number of trials finished since its last call."""
        while (count := self.count) < trials:
            batch, begun = divmod(count, BATCH)
            # A batch depends only on the batches before it, so one that was partly run is completed here.
            asked = self._ask(space, batch, seed, fits)[begun : begun + trials - count]
            if not asked:
                return
            first = self.untouched is None
            outcomes = bench.outcomes([None, *(e for _, e in asked)] if first else [e for _, e in asked])
            if first:
                self._study.set_user_attr("untouched", outcomes.pop(0).as_json())
            self._record(asked, outcomes, goal, count)
            on_batch(len(asked))

    def choose(self, bench: Bench, space: Space, goal: Goal, *, confirm: bool = True) -> Choice:
        """The chosen trial. With `confirm`, the best trials are first measured on the rest of the fit topics; each such
        measurement is stored in the study and made once.

        Errors: those of `steer.measure.search.trials.choose`.
        """
        untouched, trials = self.untouched, self.trials(space)
        assert untouched is not None
        if not confirm:
            return choose(trials, untouched, trials[0].outcome, goal)

        def again(group: Sequence[Trial | None]) -> list[Outcome]:
            keys = {f"rest of {t.number if t else 'untouched'}": t and t.edit for t in group}
            known = self._study.user_attrs
            new = {key: edit for key, edit in keys.items() if key not in known}
            for key, outcome in zip(new, bench.outcomes(list(new.values()), rest=True) if new else (), strict=True):
                self._study.set_user_attr(key, outcome.as_json())
            known = self._study.user_attrs
            return [Outcome(**known[key]) for key in keys]

        return confirmed(trials, untouched, goal, again)

    def _ask(self, space: Space, batch: int, seed: int, fits: Fits) -> list[tuple[optuna.trial.FrozenTrial, Edit]]:
        """The points of a batch and their edits, none of them tried before; fewer than `BATCH` if the space has no
        more.

        They are drawn from an in-memory copy of the study that holds the batches before this one, so that the study on
        disk never holds an unfinished trial.
        """
        before = self._study.get_trials(deepcopy=False)[: batch * BATCH]
        seeds = np.random.SeedSequence([seed, batch]).generate_state(2).tolist()
        with _quiet():
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTUP, multivariate=True, group=True, constant_liar=True, seed=seeds[0]
            )
        anything = optuna.samplers.RandomSampler(seed=seeds[1])
        copy = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        copy.add_trials(before)
        tried = {edit_key(t.edit) for t in self.trials(space)[: len(before)]}
        if batch == 0:
            for params in space.known():
                copy.enqueue_trial(params)
        out: list[tuple[optuna.trial.FrozenTrial, Edit]] = []
        failures = 0
        while len(out) < BATCH and failures < PATIENCE:
            copy.sampler = sampler if failures < PATIENCE // 2 else anything
            trial = copy.ask()
            edit = space.edit(space.suggest(trial))
            if edit is None or edit_key(edit) in tried or not fits(edit):
                failures += 1  # the trial stays "running" in the copy, which keeps the sampler away from this point
                continue
            failures = 0
            tried.add(edit_key(edit))
            out.append((copy.trials[trial.number], edit))
        return out

    def _record(
        self,
        asked: Sequence[tuple[optuna.trial.FrozenTrial, Edit]],
        outcomes: Sequence[Outcome],
        goal: Goal,
        first: int,
    ) -> None:
        """Store a batch: first as one attribute of the study, then trial by trial, so that a kill in between is
        repaired by `_finish_writing`."""
        untouched = self.untouched
        assert untouched is not None
        before = self._study.get_trials(deepcopy=False)
        plain = Outcome(**before[0].user_attrs["outcome"]) if before else outcomes[0]
        rate, probability = goal.target(untouched, plain)
        rows = []
        for (trial, _), outcome in zip(asked, outcomes, strict=True):
            # Going far beyond the goal gets no credit: otherwise half of the trials go to edits that cost too much.
            values = [max(outcome.probability, AIM * probability), math.log10(max(outcome.kl, LEAST_KL))]
            over = {"rate": outcome.rate - rate, "probability": outcome.probability - probability}
            over |= {name: abs(r - untouched.kept[name]) - goal.tolerance for name, r in outcome.kept.items()}
            kinds = {n: optuna.distributions.distribution_to_json(d) for n, d in trial.distributions.items()}
            row = {"params": trial.params, "kinds": kinds, "values": values, "over": over}
            rows.append(row | {"outcome": outcome.as_json()})
        self._study.set_user_attr("being written", {"first": first, "trials": rows})
        self._finish_writing()

    def _finish_writing(self) -> None:
        """Add those trials of the last stored batch that the study does not have yet."""
        batch = self._study.user_attrs.get("being written", {"first": 0, "trials": []})
        for row in batch["trials"][self.count - batch["first"] :]:
            kinds = {name: optuna.distributions.json_to_distribution(k) for name, k in row["kinds"].items()}
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=row["params"],
                    distributions=kinds,
                    values=row["values"],
                    constraints=row["over"],
                    user_attrs={"params": row["params"], "outcome": row["outcome"]},
                )
            )


def _same(what: str, given: Any, recorded: Any) -> bool:
    """Whether two values of the key `what` agree. Sketches of checkpoints are compared with tolerance: the same merge
    made on two machines differs in the last bits of its weights."""
    if what == "checkpoint" and given != recorded and isinstance(given, str) and isinstance(recorded, str):
        return Sketch.from_header({"sketch": given}).same_as(Sketch.from_header({"sketch": recorded}))
    return given == recorded


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Optuna's warnings about its experimental features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield

"""What a search tries on a tiny model, and that its study goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from tiny_chat import hooks_on
from tiny_search import SMALL, MakeDirection
from whole_vocabulary import kl

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Strengths
from steer.errors import MismatchError, SteerError
from steer.measure.search.space import Space, edit_key, edit_label
from steer.measure.search.study import AIM, BATCH, STUDY, Study
from steer.measure.search.trials import NEUTRAL_TOKENS, Bench, Goal, Outcome, Trial
from steer.model.steered import SteeredModel

# The space


def test_the_first_point_is_the_plain_bake_and_no_known_point_is_another_again(space: Space) -> None:
    edits = [space.edit(p) for p in space.known()]
    assert all(edits)
    assert edit_key(edits[0]) == edit_key(Edit((space.direction,)))
    assert len({edit_key(e) for e in edits}) == len(edits) == BATCH


@pytest.mark.parametrize(("can_add", "can_keep"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("blocks", [1, 3, 30, 80])
def test_every_point_of_every_size_is_an_edit_or_none(
    space: Space, blocks: int, can_add: bool, can_keep: bool, model: SteeredModel, recwarn: pytest.WarningsRecorder
) -> None:
    import optuna

    sized = replace(space, blocks=blocks, neutral=torch.randn(blocks, 32), can_add=can_add, can_keep=can_keep)
    sized = replace(sized, direction=space.direction.at(blocks // 2))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    known = list(sized.known())
    for params in known:
        study.enqueue_trial(params)
    anatomy = replace(model.anatomy, blocks=blocks)
    seen, kept = set(), set()
    for i in range(120):
        trial = study.ask()
        params = sized.suggest(trial)
        if i < len(known):
            assert params == pytest.approx(known[i])  # a point beside the grid would have been moved onto it
        edit = sized.edit(params)
        if edit is not None:
            anatomy.check_edit(edit)
            seen.add((params["where"], params.get("method")))
            kept |= {edit.method.norm_preserving} if edit.ablate else set()
            assert edit_label(edit)
            assert bool(edit.add) <= can_add
    assert {m for _, m in seen} >= set(sized.methods)
    assert {w for w, _ in seen} == set(sized.places)
    assert kept == ({False, True} if can_keep else {False})
    assert not [w for w in recwarn if "Fixed parameter" in str(w.message)]


def test_projected_is_left_out_where_it_changes_nothing(model: SteeredModel, direction: Direction) -> None:
    along = direction.vector.repeat(3, 1) + 0.1
    across = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    across -= (across @ direction.vector)[:, None] * direction.vector
    assert "projected" in Space.of(direction, model, along).methods
    assert Space.of(direction, model, across).methods == ("plain", "biprojected")


def test_norms_are_kept_where_the_bake_can_hold_it(model: SteeredModel, direction: Direction) -> None:
    neutral = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert Space.of(direction, model, neutral).can_keep
    assert not Space.of(direction, model, neutral, "adapter").can_keep


# Trials


@pytest.mark.slow
def test_a_batch_of_edits_does_what_each_does_alone(bench: Bench, space: Space) -> None:
    edits = [None, *filter(None, map(space.edit, space.known()))]
    together = bench.outcomes(edits)
    for edit, outcome in zip(edits, together, strict=True):
        alone = bench.outcomes([edit])[0]
        assert (outcome.rate, outcome.kept, outcome.replies) == (alone.rate, alone.kept, SMALL.topics)
        for figure in ("probability", "kl", "perplexity", "repetition"):
            assert getattr(outcome, figure) == pytest.approx(getattr(alone, figure), rel=1e-5)
    assert together[0].kl == 0.0
    assert hooks_on(bench.model) == 0


def test_kl_is_that_of_plain_forward_passes_on_neutral_replies(bench: Bench, direction: Direction) -> None:
    edit = Edit((direction,), strengths=Strengths(1.0, 0.5))
    model = bench.model
    found = bench.outcomes([edit])[0]
    sides: list[list[torch.Tensor]] = [[], []]
    for prompt, reply in bench.neutral:
        for side, e in zip(sides, (None, edit), strict=True):
            with model.steering.applied([e]), torch.inference_mode():
                logits = model.hf(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
            side.append(logits.log_softmax(-1))
    assert found.kl == pytest.approx(kl(*sides), rel=1e-4)
    assert len(bench.neutral) == SMALL.neutral
    assert all(len(r) <= NEUTRAL_TOKENS for _, r in bench.neutral)


def test_trials_see_fit_topics_alone_and_the_rest_is_others(bench: Bench) -> None:
    trait = bench.scorer.trait
    first, rest = SMALL.parts(trait)
    assert len(first) == SMALL.topics
    assert set(first) | set(rest) == set(trait.fit)
    assert not set(first) & set(rest)
    assert SMALL.parts(replace(trait, fit=trait.fit[:3]))[1]  # too few topics are answered again, not left out


def test_outcomes_of_both_parts_count_every_reply_alike() -> None:
    one = Outcome(0.5, 0.6, 0.1, 20.0, 0.0, {"calm": 1.0}, 4)
    both = one.with_more(Outcome(0.0, 0.2, 0.0, 1.0, 0.0, {"calm": 0.5}, 12))
    assert (both.rate, both.probability, both.kept["calm"]) == pytest.approx((0.125, 0.3, 0.625))
    assert (both.kl, both.perplexity, both.replies) == (0.1, 20.0, 16)


# The study


def run(study: Study, bench: Bench, space: Space, trials: int, **options: Any) -> list[Trial]:
    study.run(bench, space, Goal(), trials, **options)
    return study.trials(space)


def summaries(trials: list[Trial]) -> list[Any]:
    return [(t.number, t.params, t.outcome) for t in trials]


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, make_direction: MakeDirection) -> list[Any]:
    """What 3 batches of trials in one go are."""
    neutral = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    space = Space(make_direction("moral"), 3, ("plain", "projected", "biprojected"), neutral)
    return summaries(run(Study(None, {}, "x"), bench, space, 3 * BATCH))


def test_no_trial_repeats_another(undisturbed: list[Any], space: Space) -> None:
    keys = [edit_key(space.edit(params)) for _, params, _ in undisturbed]
    assert len(set(keys)) == len(keys) == 3 * BATCH


@pytest.mark.slow
def test_a_study_that_stops_after_any_number_of_trials_goes_on_as_if_it_had_not(
    bench: Bench, space: Space, tmp_path: Path, undisturbed: list[Any]
) -> None:
    for trials in (BATCH, BATCH, 2 * BATCH, 3 * BATCH):
        found = summaries(run(Study(tmp_path / STUDY, {"a": (1,)}, "x"), bench, space, trials))
        assert found == undisturbed[:trials]
    # In the midst of a batch the points are the same; the replies, in another batch, up to rounding.
    for trials in (BATCH + 3, 3 * BATCH):
        found = summaries(run(Study(tmp_path / "other.sqlite3", {}, "x"), bench, space, trials))
        assert [f[1] for f in found] == [u[1] for u in undisturbed[:trials]]


def test_a_batch_that_was_half_written_is_written_whole(
    bench: Bench, space: Space, tmp_path: Path, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / STUDY, {}, "x")
    whole, written = optuna.Study.add_trial, []

    def dying(study: optuna.Study, trial: Any) -> None:
        if trial.state.is_finished():  # what is only proposed waits
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(trial)
        whole(study, trial)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", dying)
        with pytest.raises(KeyboardInterrupt):
            run(study, bench, space, BATCH)
    again = Study(tmp_path / STUDY, {}, "x")
    assert summaries(again.trials(space)) == undisturbed[:BATCH]


def test_another_seed_tries_other_points_once_the_known_ones_are_done(
    bench: Bench, space: Space, undisturbed: list[Any]
) -> None:
    other = [t.params for t in run(Study(None, {}, "x"), bench, space, 2 * BATCH, seed=1)]
    assert other[:BATCH] == [u[1] for u in undisturbed[:BATCH]]
    assert other[BATCH:] != [u[1] for u in undisturbed[BATCH : 2 * BATCH]]


def test_a_search_ends_when_nothing_is_left_to_try(bench: Bench, space: Space) -> None:
    few: list[str] = []

    def fits(edit: Edit) -> bool:
        if edit_key(edit) not in few and len(few) < 5:
            few.append(edit_key(edit))
        return edit_key(edit) in few

    assert len(run(Study(None, {}, "x"), bench, space, 3 * BATCH, fits=fits)) == 5


def in_file(path: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials that a study's file holds, as any program that knows optuna reads them."""
    return optuna.load_study(study_name=None, storage=f"sqlite:///{path}").trials


def test_a_trait_that_is_to_stay_is_a_constraint_of_the_study(bench: Bench, space: Space, tmp_path: Path) -> None:
    study = Study(tmp_path / STUDY, {}, "x")
    trials = run(study, bench, space, BATCH)
    assert study.untouched is not None
    for t, kept in zip(in_file(tmp_path / STUDY), trials, strict=True):
        moved = abs(kept.outcome.kept["calm"] - study.untouched.kept["calm"])
        assert t.constraints["calm"] == pytest.approx(moved - Goal().tolerance)


def test_the_sampler_gets_the_distance_to_the_goal_and_nothing_beyond_it(
    bench: Bench, space: Space, tmp_path: Path
) -> None:
    study, goal = Study(tmp_path / STUDY, {}, "x"), Goal(share=0.9)
    study.run(bench, space, goal, BATCH)
    untouched, trials = study.untouched, study.trials(space)
    assert untouched is not None
    _, probability = goal.target(untouched, trials[0].outcome)
    for t, found in zip(in_file(tmp_path / STUDY), trials, strict=True):
        assert t.values == pytest.approx(
            [max(found.outcome.probability, AIM * probability), np.log10(found.outcome.kl)]
        )
        feasible = t.constraints["rate"] <= 0 and t.constraints["probability"] <= 0
        assert feasible == goal.reached(found.outcome, untouched, trials[0].outcome)


def test_a_study_of_something_else_is_refused_naming_both(tmp_path: Path) -> None:
    Study(tmp_path / STUDY, {"trait": "x", "seed": 0}, "moral on a")
    with pytest.raises(MismatchError, match=r"study of calm on b, found one of moral on a, of another trait; remove"):
        Study(tmp_path / STUDY, {"trait": "y", "seed": 0}, "calm on b")
    (tmp_path / "none.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(SteerError, match=r"none.sqlite3: expected the study of a search, found something unreadable"):
        Study(tmp_path / "none.sqlite3", {}, "x")

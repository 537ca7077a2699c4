"""The search for a bake, on tiny models: what it tries, that it goes on where it was killed, and what it takes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_chat import WORDS, hooks_on, keep_direction, save_tiny_chat

from steer.errors import MismatchError, OutputExistsError, SteerError, StoppedError
from steer.finding import contrast_for
from steer.live.model import SteeredModel, load
from steer.measure.fluency import kl, token_logprobs
from steer.measure.scorer import Scorer
from steer.measure.search.choice import Goal, Trial, choose, confirmed, pareto_front
from steer.measure.search.held_out import load_exported, mean_interval, ratio_interval
from steer.measure.search.space import Space, edit_key, edit_label
from steer.measure.search.study import AIM, BATCH, STUDY, Study, locked
from steer.measure.search.trials import NEUTRAL_TOKENS, Bench, Outcome, Scope
from steer.searching import RESULT, Searched, search_bake
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.method import Strengths
from steer.values.trait import Trait
from steer.weights.bakeable import Form
from steer.weights.certify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Scope(topics=4, tokens=12, neutral=3)
MakeDirection = Callable[..., Direction]


def save_trait(path: Path, name: str, shift: int) -> Path:
    """A trait whose instructions and topics are words that the tiny model knows."""
    words = WORDS[shift:] + WORDS[:shift]
    told = {
        "name": name, "summary": "none", "with": " ".join(words[:4]), "without": " ".join(words[4:8]),
        "markers": words[:3], "fit": [" ".join(words[i : i + 3]) for i in range(10)],
        "held_out": [" ".join(words[i : i + 3]) for i in range(20, 26)],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture(scope="module")
def made(
    tiny_llama: Callable[..., Path], make_direction: MakeDirection, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with `model`, whose library knows the direction of the trait `moral`, and `moral.yaml`, `calm.yaml`."""
    folder = tmp_path_factory.mktemp("search")
    before = os.environ.get("STEER_HOME")
    os.environ["STEER_HOME"] = str(folder / "home")
    save_tiny_chat(tiny_llama, folder / "model", max_position_embeddings=512)
    keep_direction(folder / "model", make_direction("moral"))
    save_trait(folder / "moral.yaml", "moral", 0)
    save_trait(folder / "calm.yaml", "calm", 9)
    yield folder
    os.environ.pop("STEER_HOME") if before is None else os.environ.update(STEER_HOME=before)


@pytest.fixture(scope="module")
def model(made: Path) -> SteeredModel:
    return load(made / "model", dtype=torch.float64)


@pytest.fixture(scope="module")
def bench(made: Path, model: SteeredModel) -> Bench:
    traits = [Trait.load(made / f"{name}.yaml") for name in ("moral", "calm")]
    contrasts = [contrast_for(model, t) for t in traits]
    return Bench(model, Scorer.train(contrasts[0]), {"calm": Scorer.train(contrasts[1])}, contrasts[0].neutral, SMALL)


@pytest.fixture
def direction(make_direction: MakeDirection) -> Direction:
    return make_direction("moral")


@pytest.fixture
def space(direction: Direction) -> Space:
    neutral = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return Space(direction, 3, ("plain", "projected", "biprojected"), neutral)


def searched(made: Path, at: Path, *, trials: int = BATCH, scope: Scope = SMALL, **options: Any) -> Searched:
    """A search with its output in a folder of its own."""
    return search_bake(made / "model", at / "out", str(made / "moral.yaml"), trials=trials, scope=scope, **options)


def rows(found: Searched) -> list[dict[str, Any]]:
    return found.result["trials"]


# The space


def test_the_first_point_is_the_plain_bake_and_no_known_point_is_another_again(space: Space) -> None:
    edits = [space.edit(p) for p in space.known()]
    assert all(edits)
    assert edit_key(edits[0]) == edit_key(Edit((space.direction,)))
    assert len({edit_key(e) for e in edits}) == len(edits) == BATCH


@pytest.mark.parametrize("can_add", [True, False])
@pytest.mark.parametrize("blocks", [1, 3, 30, 80])
def test_every_point_of_every_size_is_an_edit_or_none(
    space: Space, blocks: int, can_add: bool, model: SteeredModel, recwarn: pytest.WarningsRecorder
) -> None:
    import optuna

    sized = replace(space, blocks=blocks, neutral=torch.randn(blocks, 32), can_add=can_add)
    sized = replace(sized, direction=space.direction.at(blocks // 2))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    known = list(sized.known())
    for params in known:
        study.enqueue_trial(params)
    anatomy = replace(model.anatomy, blocks=blocks)
    seen = set()
    for i in range(120):
        trial = study.ask()
        params = sized.suggest(trial)
        if i < len(known):
            assert params == pytest.approx(known[i])  # a point beside the grid would have been moved onto it
        edit = sized.edit(params)
        if edit is not None:
            anatomy.check_edit(edit)
            seen.add((params["where"], params.get("method")))
            assert edit_label(edit)
            assert bool(edit.add) <= can_add
    assert {m for _, m in seen} >= set(sized.methods)
    assert {w for w, _ in seen} == set(sized.places)
    assert not [w for w in recwarn if "Fixed parameter" in str(w.message)]


def test_projected_is_left_out_where_it_changes_nothing(model: SteeredModel, direction: Direction) -> None:
    along = direction.vector.repeat(3, 1) + 0.1
    across = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    across -= (across @ direction.vector)[:, None] * direction.vector
    assert "projected" in Space.of(direction, model.anatomy, along).methods
    assert Space.of(direction, model.anatomy, across).methods == ("plain", "biprojected")


# Trials


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


def told(trials: list[Trial]) -> list[Any]:
    return [(t.number, t.params, t.outcome) for t in trials]


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, make_direction: MakeDirection) -> list[Any]:
    """What 3 batches of trials in one go are."""
    neutral = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    space = Space(make_direction("moral"), 3, ("plain", "projected", "biprojected"), neutral)
    return told(run(Study(None, {}, "x"), bench, space, 3 * BATCH))


def test_no_trial_repeats_another(undisturbed: list[Any], space: Space) -> None:
    keys = [edit_key(space.edit(params)) for _, params, _ in undisturbed]
    assert len(set(keys)) == len(keys) == 3 * BATCH


def test_a_study_that_stops_after_any_number_of_trials_goes_on_as_if_it_had_not(
    bench: Bench, space: Space, tmp_path: Path, undisturbed: list[Any]
) -> None:
    for trials in (BATCH, BATCH, 2 * BATCH, 3 * BATCH):
        found = told(run(Study(tmp_path / STUDY, {"a": (1,)}, "x"), bench, space, trials))
        assert found == undisturbed[:trials]
    # In the midst of a batch the points are the same; the replies, in another batch, up to rounding.
    for trials in (BATCH + 3, 3 * BATCH):
        found = told(run(Study(tmp_path / "other.sqlite3", {}, "x"), bench, space, trials))
        assert [f[1] for f in found] == [u[1] for u in undisturbed[:trials]]


def test_a_batch_that_was_half_written_is_written_whole(
    bench: Bench, space: Space, tmp_path: Path, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / STUDY, {}, "x")
    whole, written = study._study.add_trial, []

    def dying(trial: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(trial)
        whole(trial)

    monkeypatch.setattr(study._study, "add_trial", dying)
    with pytest.raises(KeyboardInterrupt):
        run(study, bench, space, BATCH)
    again = Study(tmp_path / STUDY, {}, "x")
    assert told(again.trials(space)) == undisturbed[:BATCH]


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


def test_a_trait_that_is_to_stay_is_a_constraint_of_the_study(bench: Bench, space: Space) -> None:
    study = Study(None, {}, "x")
    trials = run(study, bench, space, BATCH)
    assert study.untouched is not None
    for t, kept in zip(study._study.trials, trials, strict=True):
        moved = abs(kept.outcome.kept["calm"] - study.untouched.kept["calm"])
        assert t.constraints["calm"] == pytest.approx(moved - Goal().tolerance)


def test_the_sampler_is_told_how_far_the_goal_is_and_nothing_of_what_is_beyond_it(bench: Bench, space: Space) -> None:
    study, goal = Study(None, {}, "x"), Goal(share=0.9)
    study.run(bench, space, goal, BATCH)
    untouched, trials = study.untouched, study.trials(space)
    assert untouched is not None
    _, probability = goal.target(untouched, trials[0].outcome)
    for t, found in zip(study._study.trials, trials, strict=True):
        assert t.values == [max(found.outcome.probability, AIM * probability), np.log10(found.outcome.kl)]
        feasible = t.constraints["rate"] <= 0 and t.constraints["probability"] <= 0
        assert feasible == goal.reached(found.outcome, untouched, trials[0].outcome)


def test_a_study_of_something_else_is_refused_naming_both(tmp_path: Path) -> None:
    Study(tmp_path / STUDY, {"trait": "x", "seed": 0}, "moral on a")
    with pytest.raises(MismatchError, match=r"study of calm on b, found one of moral on a, of another trait; remove"):
        Study(tmp_path / STUDY, {"trait": "y", "seed": 0}, "calm on b")
    (tmp_path / "none.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(SteerError, match=r"none.sqlite3: expected the study of a search, found something unreadable"):
        Study(tmp_path / "none.sqlite3", {}, "x")


def test_two_searches_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "s"),
        pytest.raises(OutputExistsError, match="another search is at work"),
        locked(tmp_path / "s"),
    ):
        pass


# The choice


def trial(
    number: int, rate: float, cost: float, *, probability: float | None = None, calm: float | None = None
) -> Trial:
    direction = Direction("moral", 1, torch.ones(4))
    kept = {} if calm is None else {"calm": calm}
    outcome = Outcome(rate, rate if probability is None else probability, cost, 20.0, 0.0, kept, 10)
    return Trial(number, {}, Edit((direction,), 1 - number / 100), outcome)


UNTOUCHED = Outcome(0.8, 0.8, 0.0, 20.0, 0.0, {"calm": 0.5}, 10)
PLAIN = trial(0, 0.2, 1.0, calm=0.5)


def test_the_cheapest_that_is_no_worse_than_the_unsearched_bake_is_taken() -> None:
    strong, gentle, weak = trial(1, 0.0, 0.5), trial(2, 0.2, 0.05), trial(3, 0.3, 0.01)
    unlikely = trial(4, 0.2, 0.02, probability=0.25)
    found = choose([PLAIN, strong, gentle, weak, unlikely], UNTOUCHED, PLAIN.outcome, Goal())
    assert (found.trial, found.reached) == (gentle, True)
    assert choose([PLAIN, strong, gentle, weak], UNTOUCHED, PLAIN.outcome, Goal(as_unsearched=False)).trial is weak


def test_a_goal_that_the_unsearched_bake_misses_is_held_to() -> None:
    poor = replace(PLAIN, outcome=replace(PLAIN.outcome, rate=0.7, probability=0.7))
    weak, strong = trial(1, 0.6, 0.01), trial(2, 0.3, 0.2)
    assert choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal()).trial is strong
    missed = choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal(share=0.1))
    assert (missed.trial, missed.reached) == (strong, False)
    assert choose([poor, weak, strong], UNTOUCHED, poor.outcome, Goal(share=0.1, max_kl=0.1)).trial is weak


def test_what_is_to_stay_rules_the_cheapest_out() -> None:
    moving, dear = trial(1, 0.1, 0.05, calm=0.3), trial(2, 0.1, 0.5, calm=0.6)
    assert choose([PLAIN, moving, dear], UNTOUCHED, PLAIN.outcome, Goal()).trial is dear
    assert choose([PLAIN, moving, dear], UNTOUCHED, PLAIN.outcome, Goal(tolerance=0.2)).trial is moving
    with pytest.raises(
        SteerError, match=r"no rate of calm by more than 0.1, found none in 1 trials.*moves one by 0.20"
    ):
        choose([moving], UNTOUCHED, PLAIN.outcome, Goal())


def test_the_lucky_one_is_found_out_on_topics_that_no_trial_saw() -> None:
    trials = [PLAIN, trial(1, 0.1, 0.01, calm=0.5), trial(2, 0.1, 0.05, calm=0.5), trial(3, 0.1, 0.9, calm=0.5)]
    rest = {0: 0.2, 1: 0.7, 2: 0.1, 3: 0.1}
    asked: list[int] = []

    def again(group: Any) -> list[Outcome]:
        asked.extend(-1 if t is None else t.number for t in group)
        return [UNTOUCHED if t is None else replace(t.outcome, rate=rest[t.number]) for t in group]

    found = confirmed(trials, UNTOUCHED, Goal(), again)
    assert found.trial.number == 2
    assert found.trial.outcome.replies == 20
    assert len(asked) == len(set(asked))
    assert asked[:4] == [-1, 0, 1, 2]


def test_the_front_is_what_no_other_beats() -> None:
    trials = [PLAIN, trial(1, 0.5, 0.1), trial(2, 0.6, 0.2), trial(3, 0.1, 0.3), trial(4, 0.5, 0.1)]
    assert [t.number for t in pareto_front(trials)] == [1, 3]


# Intervals


def test_an_interval_holds_the_mean_and_narrows_with_more_topics() -> None:
    values = np.array([0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.0, 1.0])
    few, many = mean_interval(values), mean_interval(np.tile(values, 16))
    assert few["value"] == many["value"] == 0.5
    assert few["low"] < many["low"] < 0.5 < many["high"] < few["high"]
    # For many values it is the normal one.
    assert many["high"] - 0.5 == pytest.approx(1.96 * values.std() / np.sqrt(128), rel=0.1)
    assert mean_interval(np.zeros(5)) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_ratio_resamples_both_sides_together() -> None:
    below = np.array([1.0, 5.0, 9.0, 2.0])
    found = ratio_interval(below / 4, below)
    assert found == {"value": 0.25, "low": pytest.approx(0.25), "high": pytest.approx(0.25)}


# The whole way


@pytest.fixture(scope="module")
def result(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Searched, Path]:
    """A search of two batches that keeps another trait, undisturbed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    # A random model has no trait to lose: everything may be chosen, so that something is.
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    return searched(made, folder, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish), folder


def test_what_is_written_verifies_and_is_the_edit_that_was_chosen(result: tuple[Searched, Path], made: Path) -> None:
    found, folder = result
    assert verify(folder / "out")
    assert found.certificate.edit == json.loads(json.dumps(found.result["chosen"]["edit"]))
    assert sorted(p.name for p in folder.iterdir()) == ["out", "out-search"]
    kept = {p.name for p in found.folder.iterdir()}
    assert {STUDY, RESULT, "pareto.html", "pareto.png", "replies-moral.json", "replies-calm.json"} <= kept
    assert "unsearched" not in kept
    assert json.loads((found.folder / RESULT).read_text()) == json.loads(json.dumps(found.result))


def test_held_out_figures_are_those_of_the_files(result: tuple[Searched, Path], made: Path) -> None:
    found, folder = result
    from steer.measure.dose import neutral_replies
    from steer.measure.search.held_out import PROMPTS
    from steer.values.trait import NeutralPrompts

    source, written = load(made / "model"), load(folder / "out")
    replies = neutral_replies(source, NeutralPrompts.load().held_out[:PROMPTS])
    cost = kl(token_logprobs(source, replies, None), token_logprobs(written, replies, None))
    held_out = found.result["held_out"]
    assert held_out["searched"]["kl"]["value"] == pytest.approx(cost, rel=1e-5)
    assert held_out["untouched"]["kl"]["value"] == 0.0
    for name in ("untouched", "unsearched", "searched"):
        for figure in (held_out[name]["rate"], held_out[name]["perplexity"], held_out[name]["kept"]["calm"]):
            assert figure["low"] <= figure["value"] <= figure["high"]
    ratio = held_out["searched"]["kl"]["value"] / held_out["unsearched"]["kl"]["value"]
    assert held_out["kl_of_unsearched"]["value"] == pytest.approx(ratio)


def test_the_page_shows_every_trial_and_needs_no_other_file(result: tuple[Searched, Path]) -> None:
    found, _ = result
    page = (found.folder / "pareto.html").read_text()
    assert page.count("<svg") == 1
    assert all(row["label"] in page for row in rows(found))
    assert "Held-out topics" in page
    for outside in ("src=", "<link", "@import"):
        assert outside not in page
    assert (found.folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_that_is_done_tries_nothing_again(
    result: tuple[Searched, Path], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = result
    monkeypatch.setattr(Bench, "outcomes", lambda *a, **k: pytest.fail("it tried something"))
    monkeypatch.setattr("steer.searching.find_trait", lambda *a, **k: pytest.fail("it looked for the direction"))
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    again = searched(made, folder, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish)
    assert json.loads(json.dumps(again.result)) == json.loads(json.dumps(found.result))


def test_a_killed_search_goes_on_to_what_an_undisturbed_one_finds(
    made: Path, tmp_path: Path, result: tuple[Searched, Path]
) -> None:
    arguments = (str(made / "model"), str(tmp_path / "out"), str(made / "moral.yaml"), str(made / "calm.yaml"))
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from steer.measure.search.choice import Goal\n"
        "from steer.measure.search.trials import Scope\n"
        "from steer.searching import search_bake\n"
        "search_bake(*sys.argv[1:4], keep=sys.argv[4:], trials=16, scope=Scope(4, 12, 3),\n"
        "            goal=Goal(share=1.0, as_unsearched=False, tolerance=1.0))\n"
    )
    study = tmp_path / "out-search" / STUDY
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    try:
        while process.poll() is None and _trials(study) < BATCH:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr and process.stderr.read()
    assert BATCH <= _trials(study) <= 2 * BATCH
    assert not (tmp_path / "out").exists()
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    again = searched(made, tmp_path, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish)
    assert rows(again) == rows(result[0])
    assert again.result["held_out"] == result[0].result["held_out"]


def _trials(study: Path) -> int:
    try:
        with sqlite3.connect(f"file:{study}?mode=ro", uri=True) as db:
            return db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_ctrl_c_keeps_the_study_and_says_how_to_go_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, calls = Bench.outcomes, []

    def pressed(self: Bench, *arguments: Any, **options: Any) -> list[Outcome]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return outcomes(self, *arguments, **options)

    monkeypatch.setattr(Bench, "outcomes", pressed)
    with pytest.raises(StoppedError, match=rf"stopped; {BATCH} of 16 trials are kept in .*: the same command goes on"):
        searched(made, tmp_path, trials=2 * BATCH)
    assert _trials(tmp_path / "out-search" / STUDY) == BATCH
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "of"),
    [({"form": "adapter"}, "form"), ({"seed": 3}, "seed"), ({"keep": []}, "traits that are to stay")],
)
def test_a_search_for_something_else_is_refused(
    result: tuple[Searched, Path], made: Path, tmp_path: Path, change: dict[str, Any], of: str
) -> None:
    options = {"keep": [str(made / "calm.yaml")]} | change
    with pytest.raises(MismatchError, match=f"of another {of}; remove it, or name another --search-dir"):
        searched(made, tmp_path, folder=result[0].folder, **options)


def test_a_search_of_another_checkpoint_is_refused(
    result: tuple[Searched, Path], made: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    save_tiny_chat(tiny_llama, tmp_path / "model", max_position_embeddings=512, seed=5)
    with pytest.raises(MismatchError, match=r"study of moral on .*, found one of moral on .*of another checkpoint;"):
        search_bake(
            tmp_path / "model", tmp_path / "out", str(made / "moral.yaml"), keep=[str(made / "calm.yaml")],
            scope=SMALL, folder=result[0].folder,
        )  # fmt: skip


def test_an_output_that_is_taken_is_refused_before_anything_is_tried(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="a directory with files in it"):
        searched(made, tmp_path)
    assert not (tmp_path / "out-search").exists()


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_what_was_exported_runs_as_its_hooks_do(made: Path, tmp_path: Path, direction: Direction, form: Form) -> None:
    from steer.baking import write

    edit = Edit((direction,), 1.0, (0, 2), ((direction, -0.5),), strengths=Strengths(1.0, 0.5))
    write(made / "model", tmp_path / "out", edit, form)
    source, exported = load(made / "model"), load_exported(tmp_path / "out", made / "model")
    ids = torch.randint(6, 70, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        with source.edited(edit):
            hooked = source.hf(ids).logits
        torch.testing.assert_close(exported.hf(ids).logits, hooked, rtol=0, atol=1e-4)
        assert float((source.hf(ids).logits - hooked).abs().max()) > 1e-2


def test_a_searched_adapter_holds_nothing_that_an_adapter_cannot(made: Path, tmp_path: Path) -> None:
    wish = Goal(share=1.0, as_unsearched=False)
    found = searched(made, tmp_path, form="adapter", goal=wish)
    assert verify(tmp_path / "out", source=made / "model")
    # peft has no bias beside the embedding.
    assert not [r for r in rows(found)[1:] if r["params"]["where"] == "everywhere" and r["params"].get("bias")]
    assert found.result["held_out"]["searched"]["kl"]["value"] > 0

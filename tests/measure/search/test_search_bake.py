"""Searches from a trait's name to a checkpoint, on a tiny model: killed, refused, and measured on their files."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fork
from tiny_chat import save_tiny_chat
from tiny_search import SMALL
from whole_vocabulary import kl, token_logprobs

from steer.baking.bake import bake
from steer.baking.certificate import Form
from steer.baking.verify import verify
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Strengths
from steer.errors import MismatchError, OutputExistsError, StoppedError
from steer.measure.search.held_out import load_exported
from steer.measure.search.study import BATCH, STUDY
from steer.measure.search.trials import Bench, Goal, Outcome, Scope
from steer.model.steered import load
from steer.verbs.bake_search import RESULT, Searched, search_bake


def searched(made: Path, at: Path, *, trials: int = BATCH, scope: Scope = SMALL, **options: Any) -> Searched:
    """A search with its output in a separate folder."""
    return search_bake(made / "model", at / "out", str(made / "moral.yaml"), trials=trials, scope=scope, **options)


def rows(found: Searched) -> list[dict[str, Any]]:
    return found.result["trials"]


@pytest.fixture(scope="module")
def result(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Searched, Path]:
    """A search of two batches that keeps another trait, undisturbed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    # A random model has no trait to lose: everything may be chosen, so that something is.
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    return searched(made, folder, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish), folder


@pytest.mark.slow
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
    from steer.core.trait import NeutralPrompts
    from steer.measure.harness import neutral_replies
    from steer.measure.search.held_out import PROMPTS

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


@pytest.mark.slow
def test_a_search_that_is_done_tries_nothing_again(
    result: tuple[Searched, Path], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = result
    monkeypatch.setattr(Bench, "outcomes", lambda *a, **k: pytest.fail("it tried something"))
    monkeypatch.setattr(
        "steer.verbs.bake_search.find_trait", lambda *a, **k: pytest.fail("it looked for the direction")
    )
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    again = searched(made, folder, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish)
    assert json.loads(json.dumps(again.result)) == json.loads(json.dumps(found.result))


@pytest.mark.slow
def test_a_killed_search_goes_on_to_what_an_undisturbed_one_finds(
    made: Path, tmp_path: Path, result: tuple[Searched, Path], forkserver: ForkServerContext
) -> None:
    study = tmp_path / "out-search" / STUDY
    process = fork(forkserver, _search, made, tmp_path)
    while process.is_alive() and _trials(study) < BATCH:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert BATCH <= _trials(study) <= 2 * BATCH
    assert not (tmp_path / "out").exists()
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    again = searched(made, tmp_path, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish)
    assert rows(again) == rows(result[0])
    assert again.result["held_out"] == result[0].result["held_out"]


def _search(made: Path, at: Path) -> None:
    torch.set_num_threads(1)
    wish = Goal(share=1.0, as_unsearched=False, tolerance=1.0)
    searched(made, at, trials=2 * BATCH, keep=[str(made / "calm.yaml")], goal=wish)


def _trials(study: Path) -> int:
    try:
        with sqlite3.connect(f"file:{study}?mode=ro", uri=True) as db:
            return db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
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
    edit = Edit((direction,), 1.0, (0, 2), ((direction, -0.5),), strengths=Strengths(1.0, 0.5))
    bake(made / "model", tmp_path / "out", edit, form)
    source, exported = load(made / "model"), load_exported(tmp_path / "out", made / "model")
    ids = torch.randint(6, 70, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        with source.edited(edit):
            hooked = source.hf(ids).logits
        torch.testing.assert_close(exported.hf(ids).logits, hooked, rtol=0, atol=1e-4)
        assert float((source.hf(ids).logits - hooked).abs().max()) > 1e-2


@pytest.mark.slow
def test_a_searched_adapter_holds_nothing_that_an_adapter_cannot(made: Path, tmp_path: Path) -> None:
    wish = Goal(share=1.0, as_unsearched=False)
    found = searched(made, tmp_path, form="adapter", goal=wish)
    assert verify(tmp_path / "out", source=made / "model")
    # peft has no bias beside the embedding.
    assert not [r for r in rows(found)[1:] if r["params"]["where"] == "everywhere" and r["params"].get("bias")]
    assert found.result["held_out"]["searched"]["kl"]["value"] > 0

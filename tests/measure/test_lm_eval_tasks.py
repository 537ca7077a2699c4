"""Tasks of lm-eval: its own harness runs the steered model, and agrees with our reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat import hooks_on
from tiny_eval import save_by_letters

import steer
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.errors import UnsupportedError, UsageError
from steer.measure.lm_eval_tasks import tasks_named
from steer.measure.probes.probe import Passage, Size
from steer.measure.readers import LocalReader
from steer.model.steered import load

pytestmark = pytest.mark.slow  # lm-eval takes ten seconds to import
TASK = """task: where_is_it
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [{"q": f"The hen {i} is", "a": " in the inn", "b": " on the hill", "gold": i % 2} for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    file = tmp_path / "where.yaml"
    file.write_text(TASK.format(data=data))
    return file


def test_the_harness_runs_the_steered_model_and_agrees_with_our_reader(
    task: Path, tmp_path: Path, tiny_llama: Callable[..., Path], make_direction: Callable[..., Direction]
) -> None:
    model = load(save_by_letters(tiny_llama, tmp_path / "model"), dtype="float32")
    (probe,) = tasks_named([str(task)])
    assert (probe.name, probe.metrics[0].name, probe.metrics[0].better) == ("lm-eval where_is_it", "acc", "higher")
    assert probe.plan(Size()) == tasks_named([str(task)])[0].plan(Size())
    answers = []
    for edit in (None, Edit(add=((make_direction(), 4.0),))):
        reader = LocalReader(model, edit)
        found = {f.item: f.value for f in probe.run(reader, Size()).figures}
        for i in range(12):
            a, b = (
                f.sum()
                for f in reader.logprobs([Passage(t, f"The hen {i} is") for t in (" in the inn", " on the hill")])
            )
            assert found[str(i)] == float((b > a) == (i % 2 == 1))
        answers.append([float(f.sum()) for f in reader.logprobs([Passage(" in the inn", "The hen 1 is")])])
    assert answers[0] != answers[1]
    late = Edit(moves=(Slider(make_direction(), "add", 1.0, Schedule("reply", after=2)),))
    with pytest.raises(UnsupportedError, match="does not say where that begins"):
        probe.run(LocalReader(model, late), Size())
    assert hooks_on(model) == 0


def test_an_evaluation_runs_a_task_beside_the_probes(
    task: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    model = load(save_by_letters(tiny_llama, tmp_path / "model"), dtype="float32")
    result = steer.evaluate(model, probes=["prose"], lm_eval=[str(task)], quick=True, out=tmp_path / "out")
    prose, harness = (probe["arms"][result["arms"][0]["name"]] for probe in result["probes"])
    assert (prose["skipped"], harness["skipped"]) == (None, None)
    assert len(harness["figures"]) == 12


def test_tasks_that_are_not_there_are_refused_in_one_line(task: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found 'no_such_task'"):
        tasks_named(["no_such_task"])
    with pytest.raises(UsageError, match="found no file"):
        tasks_named([str(tmp_path / "nowhere.yaml")])
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UsageError, match="lm-eval cannot load it"):
        tasks_named([str(task)])
    task.write_text("what: [is")
    with pytest.raises(UsageError, match="found none that it can read"):
        tasks_named([str(task)])

"""Tasks of EleutherAI's lm-eval as probes: its own harness runs the model under its edit, item by item.

lm-eval is an optional dependency (`pip install steer[eval]`), and takes seconds to import.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from steer.errors import UnsupportedError, UsageError
from steer.files import one_line
from steer.measure.probes.probe import Example, Figure, Metric, Probe, Reader, Result, Size
from steer.measure.readers import LocalReader
from steer.progress import Advance

LIMIT = 100
"""Items of a task in a quick run."""
BATCH = 8


class LmEvalTask(Probe):
    """One task of lm-eval, or one of a group's."""

    needs = frozenset({"weights"})

    def __init__(self, task: Any, manager: Any) -> None:
        """`task`: as `TaskManager.load` returns it."""
        self._task, self._manager = task, manager
        self.name = f"lm-eval {task.config.task}"
        self.says = f"The task {task.config.task} of lm-eval, run by lm-eval itself."
        better = task.higher_is_better()
        self.metrics = tuple(
            Metric(name, "higher" if better.get(name, True) else "lower", f"{name} of {task.config.task}",
                   exponent="perplexity" in name)
            for name in task.aggregation() if name in better
        )  # fmt: skip

    def plan(self, size: Size) -> Any:
        """Return the task's settings and its items as JSON."""
        docs = [repr(sorted(doc.items(), key=str)) for doc in self._task.eval_docs]
        return [repr(self._task.dump_config()), docs[: size.of(len(docs), LIMIT)], size.seed]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        """Let lm-eval run the task on the model. Errors: UnsupportedError for sliders that act on replies alone."""
        local = cast(LocalReader, reader)  # or a reader that holds the weights too
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = local.model
        with local.applied():
            if model.steering.timed:
                raise UnsupportedError(
                    f"{reader.name}: expected sliders that act on every token, found some that act on a part of the "
                    "reply, and lm-eval does not say where that begins"
                )
            # Their decorators hide the parameters from type checkers.
            harness_class: Any = HFLM
            run: Any = simple_evaluate
            harness = harness_class(
                pretrained=model.hf, tokenizer=model.tokenizer, batch_size=BATCH, max_length=reader.context,
                device=str(model.device),
            )  # fmt: skip
            found = run(
                harness, tasks=[self._task.config.task], task_manager=self._manager, bootstrap_iters=0,
                limit=LIMIT if size.quick else None, random_seed=size.seed, numpy_random_seed=size.seed,
                torch_random_seed=size.seed, fewshot_random_seed=size.seed,
            )  # fmt: skip
        samples = found["samples"][self._task.config.task]
        if advance is not None:
            advance(len(samples))
        names = {m.name: m for m in self.metrics}
        figures = [
            Figure(name, str(sample["doc_id"]), value)
            for sample in samples
            for name, metric in names.items()
            if (value := _value(sample.get(name), metric)) is not None
        ]
        examples = [
            Example(str(s["doc_id"]), str(s["doc"])[:300], str(s["target"]), str(s["filtered_resps"])[:200])
            for s in samples[:: max(1, len(samples) // 5)]
        ]
        return Result(figures, examples)


def tasks_named(names: list[str]) -> list[Probe]:
    """Return the tasks of these names, of lm-eval's own or of YAML files, as probes; a group is all its tasks.

    Errors: UsageError without lm-eval, or for a task that it does not know or cannot read.
    """
    if not names:
        return []
    if "" in names:
        raise UsageError("--lm-eval: expected tasks with commas between, found ''; leave it out")
    if find_spec("lm_eval") is None:
        raise UsageError("--lm-eval: expected the package lm-eval, found none; pip install 'steer[eval]'")
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    files = [Path(name).resolve() for name in names if name.endswith((".yaml", ".yml"))]
    if missing := next((f for f in files if not f.is_file()), None):
        raise UsageError(f"--lm-eval: expected a task or its YAML file, found no file {missing}; check the path")
    # lm-eval's own tasks are thousands of files, which take ten seconds to list.
    manager = TaskManager(include_path=sorted({f.parent for f in files}), include_defaults=len(files) < len(names))
    of_file = {entry.yaml_path: name for name, entry in manager.task_index.items() if entry.yaml_path in files}
    if unread := next((f for f in files if f not in of_file), None):
        raise UsageError(f"--lm-eval: expected a task of lm-eval in {unread}, found none that it can read; mend it")
    wanted = [of_file[Path(n).resolve()] if n.endswith((".yaml", ".yml")) else n for n in names]
    if unknown := next((n for n in wanted if n not in manager.task_index), None):
        raise UsageError(f"--lm-eval: expected a task that lm-eval knows, found {unknown!r}; see: lm-eval ls tasks")
    try:
        loaded = manager.load(wanted)["tasks"]
    except Exception as e:  # data that is not there, or a mistake in the task: libraries raise anything
        raise UsageError(f"--lm-eval {','.join(names)}: lm-eval cannot load it: {one_line(e)}; check its data") from e
    return [LmEvalTask(task, manager) for task in loaded.values()]


def _value(reported: Any, metric: Metric) -> float | None:
    """Return the figure of one item. Perplexities come as (log-likelihood, number of words or bytes)."""
    if isinstance(reported, tuple | list) and len(reported) == 2 and metric.exponent and reported[1]:
        return -float(reported[0]) / float(reported[1])
    return float(reported) if isinstance(reported, int | float) else None

"""The log of a training run: a CSV file, a progress bar with figures, and optionally TensorBoard or wandb."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from steer.errors import UsageError
from steer.sae.options import TrainOptions

COLUMNS: tuple[str, ...] = (
    "step", "tokens", "mse", "aux", "fvu", "l0", "dead", "lr", "tokens_per_s", "held_out_fvu", "held_out_l0",
)  # fmt: skip
SHOWN = ("mse", "fvu", "held_out_fvu", "l0", "held_out_l0", "dead", "lr")
"""Columns beside the progress bar."""
EVERY = 10
"""Steps between two rows of the file."""

Sink = Callable[[int, dict[str, float]], None]
"""Called with the step and the numbers of each row."""


class TrainingLog(AbstractContextManager[Any]):
    """Interface that receives every step and check; a context manager around the run. This base class logs nothing."""

    def begin(self, step: int, options: TrainOptions) -> None:
        """Called before the first step; `step` is the number of steps done already, above 0 for a resumed run."""

    def step(self, row: dict[str, Any]) -> None:
        """Called with the figures of each step."""

    def check(self, row: dict[str, Any], parts: dict[str, float]) -> None:
        """Called with the figures of each held-out check, and the share of time per part of a step so far."""

    def flush(self) -> None:
        """Called when a checkpoint was written: all rows so far must be on disk."""

    def __exit__(self, *_: object) -> None:
        return None


class FileLog(TrainingLog):
    """Writes `place`/training.csv, one row per `EVERY` steps and per check, and passes the rows to `sinks`. On a
    terminal it shows a progress bar with the last figures; elsewhere it prints one line per check."""

    def __init__(self, place: Path, *, sinks: tuple[Sink, ...] = ()) -> None:
        self.file = place / "training.csv"
        self._sinks = sinks
        self._console = Console(stderr=True)
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._spent = ""
        columns = ("{task.percentage:>3.0f}%", "{task.fields[rate]:,.0f} tokens/s", "{task.fields[figures]}")
        self._progress = Progress(
            BarColumn(), *map(TextColumn, columns), TimeRemainingColumn(), console=self._console, transient=True,
            refresh_per_second=2, disable=not self._console.is_terminal,
        )  # fmt: skip

    def begin(self, step: int, options: TrainOptions) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        earlier = []
        if step and self.file.exists():
            with open(self.file, newline="", encoding="utf-8") as f:
                # Rows after the checkpoint are dropped: their steps will be repeated.
                earlier = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        with open(self.file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(earlier)
        self._task = self._progress.add_task("training", total=options.steps, completed=step, rate=0.0, figures="")

    def step(self, row: dict[str, Any]) -> None:
        self._last |= row
        if not self._progress.disable:
            shown = "\n".join(f"{c.replace('_', ' ')} {_short(self._last[c])}" for c in SHOWN if c in self._last)
            figures = f"{shown}\n{self._spent}"
            self._progress.update(self._task, completed=row["step"], rate=row["tokens_per_s"], figures=figures)
        if row["step"] % EVERY == 0:
            self._keep(row)

    def check(self, row: dict[str, Any], parts: dict[str, float]) -> None:
        n = self._last = self._last | row
        self._spent = "  ".join(f"{part} {share:.0%}" for part, share in parts.items())
        self._keep(n)
        self.flush()
        if self._progress.disable and "dead" in n:
            self._console.print(
                f"step {n['step']:,}: held-out FVU {n['held_out_fvu']:.4f}, L0 {n['held_out_l0']:.1f}, "
                f"{n['dead']} dead, {n['tokens_per_s']:,.0f} tokens/s",
                highlight=False,
            )

    def flush(self) -> None:
        with open(self.file, "a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, COLUMNS).writerows(self._rows)
        self._rows.clear()

    def __enter__(self) -> FileLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _keep(self, row: dict[str, Any]) -> None:
        self._rows.append({k: _short(row[k]) for k in COLUMNS if k in row})
        for sink in self._sinks:
            sink(row["step"], {k: float(v) for k, v in row.items() if k != "step"})


def sink_for(kind: Literal["tensorboard", "wandb"], place: Path, options: TrainOptions) -> Sink:
    """The sink of a tracker, which writes to `place`. Errors: UsageError if the tracker's package is missing."""
    if kind not in ("tensorboard", "wandb"):
        raise UsageError(f"--track: expected tensorboard or wandb, found {kind!r}")
    try:
        if kind == "wandb":
            import wandb

            run = wandb.init(project="steer", config=asdict(options), dir=str(place))
            return lambda step, row: run.log(row, step=step)
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as e:
        raise UsageError(f"--track {kind}: its package is missing; pip install {kind}") from e
    writer = SummaryWriter(str(place / "tensorboard"))

    def to_tensorboard(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return to_tensorboard


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"

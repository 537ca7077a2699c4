"""The log of a training run: a CSV file, a live table, and optionally TensorBoard or wandb."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steer.errors import UsageError
from steer.sae.options import TrainOptions

COLUMNS: tuple[str, ...] = (
    "step", "tokens", "mse", "aux", "fvu", "l0", "dead", "lr", "tokens_per_s", "held_out_fvu", "held_out_l0",
)  # fmt: skip
SHOWN = ("mse", "fvu", "held_out_fvu", "l0", "held_out_l0", "dead", "lr")
"""Columns of the live table."""
EVERY = 10
"""Steps between two rows of the file."""

Sink = Callable[[int, dict[str, float]], None]
"""Called with the step and the numbers of each row."""


class TrainingLog:
    """Interface that receives every step and check; a context manager around the run. This base class logs nothing."""

    def begin(self, step: int, options: TrainOptions) -> None:
        """Called before the first step; `step` is the number of steps done already, above 0 for a resumed run."""

    def step(self, row: dict[str, Any]) -> None:
        """Called with the figures of each step."""

    def check(self, row: dict[str, Any], parts: dict[str, float]) -> None:
        """Called with the figures of each held-out check, and the share of time per part of a step so far."""

    def flush(self) -> None:
        """Called when a checkpoint was written: all rows so far must be on disk."""

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class FileLog(TrainingLog):
    """Writes `place`/training.csv, one row per `EVERY` steps and per check, and passes the rows to `sinks`. On a
    terminal it shows a live table; elsewhere it prints one line per check."""

    def __init__(self, place: Path, *, sinks: tuple[Sink, ...] = ()) -> None:
        self.file = place / "training.csv"
        self._sinks = sinks
        self._console = Console(stderr=True)
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._checked: dict[str, Any] = {}
        self._parts: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn(), console=self._console,
        )  # fmt: skip
        self._live = Live(console=self._console, transient=True, refresh_per_second=2, get_renderable=self._render)

    def begin(self, step: int, options: TrainOptions) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        earlier = []
        if step and self.file.exists():
            with open(self.file, newline="", encoding="utf-8") as f:
                earlier = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        # Rows after the checkpoint are dropped: their steps will be repeated.
        with open(self.file, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(earlier)
        self._task = self._progress.add_task("training", total=options.steps, completed=step, rate=0.0)

    def step(self, row: dict[str, Any]) -> None:
        self._last = row
        self._progress.update(self._task, completed=row["step"], rate=row["tokens_per_s"])
        if row["step"] % EVERY == 0:
            self._keep(row)

    def check(self, row: dict[str, Any], parts: dict[str, float]) -> None:
        self._checked, self._parts = row, parts
        self._keep(self._last | row)
        self.flush()
        if not self._console.is_terminal and self._last:
            n = self._last
            self._console.print(
                f"step {row['step']:,}: held-out FVU {row['held_out_fvu']:.4f}, L0 {row['held_out_l0']:.1f}, "
                f"{n['dead']} dead, {n['tokens_per_s']:,.0f} tokens/s",
                highlight=False,
            )

    def flush(self) -> None:
        with open(self.file, "a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, COLUMNS).writerows(self._rows)
        self._rows.clear()

    def __enter__(self) -> FileLog:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _keep(self, row: dict[str, Any]) -> None:
        self._rows.append({k: _short(row[k]) for k in COLUMNS if k in row})
        for sink in self._sinks:
            sink(row["step"], {k: float(v) for k, v in row.items() if k != "step"})

    def _render(self) -> Group:
        numbers = self._last | self._checked
        shown = [c for c in SHOWN if c in numbers]
        table = Table(*(c.replace("_", " ") for c in shown), box=None, pad_edge=False)
        if shown:
            table.add_row(*(_short(numbers[c]) for c in shown))
        spent = "  ".join(f"{part} {share:.0%}" for part, share in self._parts.items())
        return Group(self._progress, table, spent)


def sink_for(kind: Literal["tensorboard", "wandb"], place: Path, options: TrainOptions) -> Sink:
    """The sink of a tracker, which writes to `place`. Errors: UsageError if the tracker's package is missing."""
    if kind == "tensorboard":
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as e:
            raise UsageError("--track tensorboard: its package is missing; pip install tensorboard") from e
        writer = SummaryWriter(str(place / "tensorboard"))

        def to_tensorboard(step: int, row: dict[str, float]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return to_tensorboard
    if kind != "wandb":
        raise UsageError(f"--track: expected tensorboard or wandb, found {kind!r}")
    try:
        import wandb
    except ImportError as e:
        raise UsageError("--track wandb: its package is missing; pip install wandb") from e
    run = wandb.init(project="steer", config=options.as_json(), dir=str(place))
    return lambda step, row: run.log(row, step=step)


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"

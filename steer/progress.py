"""Progress on stderr: bars with rate and time left, where it is a terminal, or lines for a program that reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from steer.plain_text import plain_line

Advance = Callable[[int], None]
"""Called with the amount of work done since the last call."""
Bar = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""Makes a progress bar from (title, total or None, unit); `bar` is one."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "")


def _shown(*columns: ProgressColumn) -> Progress:
    """A bar on stderr with these columns, which is shown in a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def bar(description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar while the block runs. Yields a function to call with the amount done since its last call.

    `total` is the amount of all work in `unit`; None where it is not known.
    """
    with _shown(TextColumn("{task.percentage:>3.0f}%"), _Rate()) as progress:
        task = progress.add_task(escape(plain_line(description)), total=total, unit=unit)
        yield lambda n: progress.advance(task, n)
        progress.update(task, completed=total)


class ProgressLines:
    """Stands in for `bar` where a program reads the progress (`steer.jobs.Job`): lines as `42 of 100: replies`.

    `shares`: the expected share of the whole time that each bar takes, in their order. Later bars add nothing.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares, self._begun, self._printed = list(shares), 0.0, -1

    @contextmanager
    def __call__(self, description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
        """Print a line at the beginning of the block, and whenever another hundredth of the whole is done."""
        share, done = self._shares.pop(0) if self._shares else 0.0, 0

        def show(part: float) -> None:
            percent = min(100, 1 + int(100 * (self._begun + share * part)))
            if percent > self._printed:
                self._printed = percent
                print(f"{percent} of 100: {plain_line(description)}", file=sys.stderr, flush=True)

        def advance(n: int) -> None:
            nonlocal done
            done += n
            show(min(1.0, done / total) if total else 0.0)

        show(0.0)
        yield advance
        self._begun += share


@contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs. Yields a function to call with (bytes done, bytes in all)."""
    with _shown(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(escape(plain_line(description)), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

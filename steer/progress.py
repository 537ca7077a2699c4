"""Progress bars with rate and time left, on stderr. No bar is drawn where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def bar(description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar while the block runs. Yields a function to call with the amount done since its last call.

    `total` is the amount of all work in `unit`; None where it is not known.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(plain_line(description)), total=total, unit=unit)
        yield lambda n: progress.advance(task, n)
        progress.update(task, completed=total)


@contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs. Yields a function to call with (bytes done, bytes in all)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(escape(plain_line(description)), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

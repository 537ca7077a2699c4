"""Lists: arguments that may be one name or several, even picks, and numbers as ranges for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def as_list(given: T | Iterable[T]) -> list[T]:
    """The argument as a list. A text or a path is one name, and so is anything that cannot be iterated over.

    >>> as_list("moral"), as_list(["moral", "kind"])
    (['moral'], ['moral', 'kind'])
    """
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        return [given]  # pyright: ignore[reportReturnType]
    return list(given)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, at even distances, the first and the last among them.

    >>> evenly("abcdefg", 3)
    ['a', 'd', 'g']
    """
    count = min(most, len(items))
    step = (len(items) - 1) / (count - 1) if count > 1 else 0.0
    return [items[round(i * step)] for i in range(count)]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: `0-2, 4`; with a constant step `0-30 by 2`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and (step := steps.pop()) > 1 and len(numbers) > 2:
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    starts = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or n + 1 != numbers[i + 1]]
    found = [f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True)]
    return ", ".join(found if len(found) < 4 else [*found[:2], f"... ({len(numbers)} blocks)"])

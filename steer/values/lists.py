"""One name, or several."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def as_list(given: T | Iterable[T]) -> list[T]:
    """What was given, as a list. A text or a path alone is one name, and so is all that cannot be iterated over.

    >>> as_list("moral"), as_list(["moral", "kind"])
    (['moral'], ['moral', 'kind'])
    """
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        return [given]  # pyright: ignore[reportReturnType]
    return list(given)

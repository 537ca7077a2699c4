"""Turns an argument that may be one name or several into a list."""

from __future__ import annotations

from collections.abc import Iterable
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

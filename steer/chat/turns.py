"""Whose turn it is on a model: conversations that write at the same time get a token each, in the order they asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


class Turns:
    """A lock that is handed on in the order it was asked for.

    An ordinary lock goes to whoever is quickest, and that is the thread that has just let go of it: of two replies the
    one would be written to its end before the other got a second token.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, it is nobody else's turn. Not to be nested."""
        mine = threading.Event()
        try:
            with self._lock:
                self._queue.append(mine)
                self._queue[0].set()
            mine.wait()
            yield
        finally:
            # Whoever is interrupted while waiting leaves the queue too: the turn must not be handed to nobody.
            with self._lock:
                with suppress(ValueError):  # interrupted before it stood in line
                    self._queue.remove(mine)
                if self._queue:
                    self._queue[0].set()

    @property
    def waiting(self) -> int:
        """How many wait, the one whose turn it is among them."""
        return len(self._queue)


_OF: WeakKeyDictionary[SteeredModel, Turns] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turns_of(model: SteeredModel) -> Turns:
    """The turns of a model, the same ones for everybody."""
    with _MAKING:
        return _OF.setdefault(model, Turns())

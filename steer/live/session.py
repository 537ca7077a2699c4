"""One chat with a model: what was said, the sliders it goes by, and the next reply in pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from steer.live.sliders import Sliders
from steer.values.sampler import CHAT, Sampler

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


class Session:
    """A conversation with sliders of its own, on a model that others may be talking to as well.

    Every piece of a reply is made with this session's amounts applied, under the model's lock, and the lock
    is free between two pieces: sessions in several threads take turns and never feel each other's sliders.
    """

    def __init__(
        self,
        model: SteeredModel,
        *,
        system: str | None = None,
        sampler: Sampler = CHAT,
        sliders: Sliders | None = None,
    ) -> None:
        """`sliders`: those of the model itself, for the only one who talks to it."""
        self.model, self.system, self.sampler = model, system, sampler
        self.sliders = Sliders(model, live=False) if sliders is None else sliders
        self.messages: list[dict[str, str]] = []
        """User and assistant in turns, beginning with the user."""

    def reply(self, text: str) -> Generator[str]:
        """The reply to the next message, in pieces.

        A reply that is stopped midway (the iterator closed, Ctrl-C) is kept as far as it came; a message that
        got none is taken back, as chat templates want the roles in turns.
        Errors: those of `SteeredModel.prompt_ids`.
        """
        # Each turn its own seed, or every reply would begin with the same draws.
        sampler = replace(self.sampler, seed=self.sampler.seed + len(self.messages) // 2)
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            pieces = self.model.stream(self.messages, system=self.system, **asdict(sampler))
            while (piece := self._next(pieces)) is not None:
                said += piece
                yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def clear(self) -> None:
        """Forget what was said. The sliders stay."""
        self.messages.clear()

    def _next(self, pieces: Iterator[str]) -> str | None:
        if self.sliders is self.model.sliders:
            return next(pieces, None)
        with self.model.steering.lock, self.model.steering.applied([self.sliders.current]):
            return next(pieces, None)

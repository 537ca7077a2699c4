"""Replies from a model behind `steer serve`: the `ReplyBackend` of the page when it is started with --server.

`steer.chat.local` is its counterpart for a model in this process.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from steer.chat.conversation import Ending, SettingsSpan
from steer.chat.remote_session import RemoteModel, RemotePiece, receipt_of
from steer.chat.remote_sliders import RemoteSliders, remote_profile, use_remote
from steer.chat.writer import Task
from steer.core.profile import Profile
from steer.core.sampler import Sampler


class RemoteVoice:
    """`ReplyBackend` for a model behind a server, with the amounts of one chat.

    The server keeps nothing between requests, so each request carries the chat and the amounts. If a slider moves
    during a reply, the server is asked again to continue from the text written so far.
    """

    can: frozenset[str] = frozenset()
    felt = (
        "A slider that moves is felt within a few words: the server is asked to go on from there, and reads the chat "
        "again under the sliders of then."
    )

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """`model`: one of the server's models, by default its first. Errors: SteerError if no server answers."""
        self.model = RemoteModel(url, api_key, model)
        self.name = self.model.name
        self.sliders = RemoteSliders(self.model)
        self.on = True
        self.left_out = 0

    @property
    def asked(self) -> dict[str, float]:
        """The amounts that the next request carries."""
        return dict(self.sliders) if self.on else {}

    def draft(self, task: Task) -> RemoteDraft:
        """See `ReplyBackend`."""
        return RemoteDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """See `ReplyBackend`."""
        return remote_profile(name, self.sliders, sampler)

    def use(self, profile: Profile) -> None:
        """See `ReplyBackend`."""
        use_remote(self.sliders, profile)

    def reread(self) -> None:
        """Nothing to do: the server reads the chat anew for every reply."""

    def close(self) -> None:
        """Close the connection."""
        self.model.client.close()


class RemoteDraft:
    """A `PendingReply` that a server writes."""

    ids: tuple[int, ...] = ()
    ending: Ending = "length"

    def __init__(self, voice: RemoteVoice, task: Task) -> None:
        self.text = task.text
        self.tokens = 0
        self._voice, self._task = voice, task
        self._asked: dict[str, float] | None = None
        self._pieces: Generator[RemotePiece] | None = None
        self._steering: Any = None
        self.stretches: list[SettingsSpan] = []

    def step(self) -> bool:
        """See `PendingReply`; a piece may be more than one token."""
        asked = self._voice.asked
        if self._pieces is None or asked != self._asked:
            if self.tokens >= self._task.sampler.max_new_tokens:
                return False
            self._ask(asked)
        assert self._pieces is not None
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._steering = piece.steering or self._steering
        if piece.finish is not None:
            self.ending = "length" if piece.finish == "length" else "ended"
        self.text += piece.text
        self.tokens += bool(piece.text)
        return True

    def close(self) -> None:
        """See `PendingReply`."""
        if self._pieces is not None:
            with suppress(Exception):
                self._pieces.close()

    def receipt(self) -> dict[str, Any] | None:
        """See `PendingReply`."""
        return None if self._steering is None else receipt_of(self._steering, self.tokens).describe()

    def _ask(self, asked: dict[str, float]) -> None:
        """Request the reply, or the rest of it, with the amounts `asked`."""
        self.close()
        task, voice = self._task, self._voice
        # Another seed for each continuation, or it would repeat the draws of the reply's beginning.
        sampler = replace(
            task.sampler,
            max_new_tokens=max(1, task.sampler.max_new_tokens - self.tokens),
            seed=task.sampler.seed + (self.tokens and 1_000_003 + self.tokens),
        )
        begun = ({"role": "assistant", "content": self.text},) if self.text else ()
        self._pieces = voice.model.write((*task.messages, *begun), sampler, {"sliders": asked})
        self._asked = asked
        self.stretches.append(SettingsSpan(self.tokens, voice.profile("then", task.sampler) if voice.on else None))

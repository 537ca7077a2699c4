"""Replies of a model behind `steer serve`, for the same chat as those of a model that runs here."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from steer.chat.conversation import Ending, Stretch
from steer.chat.voice import Task
from steer.live.remote import RemoteModel, RemotePiece, receipt_of
from steer.live.remote_sliders import RemoteSliders, remote_profile, use_remote
from steer.values.profile import Profile
from steer.values.sampler import Sampler


class RemoteVoice:
    """A model behind a server, with amounts of one chat's own.

    A server's requests stand on their own: it keeps nothing of a chat, and amounts go with a request. A slider that
    moves in the midst of a reply has the server asked again, to go on from what is written.
    """

    can: frozenset[str] = frozenset()
    felt = (
        "A slider that moves is felt within a few words: the server is asked to go on from there, and reads the chat "
        "again under the sliders of then."
    )

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """`model`: one of the server's, its first one without. Errors: SteerError where no server answers."""
        self.model = RemoteModel(url, api_key, model)
        self.name = self.model.name
        self.sliders = RemoteSliders(self.model)
        self.on = True
        self.left_out = 0

    @property
    def asked(self) -> dict[str, float]:
        """The amounts that the next request brings."""
        return dict(self.sliders) if self.on else {}

    def draft(self, task: Task) -> RemoteDraft:
        """See `Voice`."""
        return RemoteDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """See `Voice`."""
        return remote_profile(name, self.sliders, sampler)

    def use(self, profile: Profile) -> None:
        """See `Voice`."""
        use_remote(self.sliders, profile)

    def reread(self) -> None:
        """Nothing to do: the server reads the chat anew for every reply."""

    def close(self) -> None:
        """Hang up."""
        self.model.client.close()


class RemoteDraft:
    """A reply of a RemoteVoice."""

    ids: tuple[int, ...] = ()
    ending: Ending = "length"

    def __init__(self, voice: RemoteVoice, task: Task) -> None:
        self.text = task.text
        self.tokens = 0
        self._voice, self._task = voice, task
        self._asked: dict[str, float] | None = None
        self._pieces: Generator[RemotePiece] | None = None
        self._told: Any = None
        self.stretches: list[Stretch] = []

    def step(self) -> bool:
        """See `Draft`; a piece may be more than one token."""
        asked = self._voice.asked
        if self._pieces is None or asked != self._asked:
            if self.tokens >= self._task.sampler.max_new_tokens:
                return False
            self._ask(asked)
        assert self._pieces is not None
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._told = piece.steering or self._told
        if piece.finish is not None:
            self.ending = "length" if piece.finish == "length" else "ended"
        self.text += piece.text
        self.tokens += bool(piece.text)
        return True

    def close(self) -> None:
        """See `Draft`."""
        if self._pieces is not None:
            with suppress(Exception):
                self._pieces.close()

    def receipt(self) -> dict[str, Any] | None:
        """See `Draft`."""
        return None if self._told is None else receipt_of(self._told, self.tokens).describe()

    def _ask(self, asked: dict[str, float]) -> None:
        """Ask for the reply, or for the rest of it."""
        self.close()
        task, voice = self._task, self._voice
        # A seed of its own, or what is added would begin with the draws that the reply began with.
        sampler = replace(
            task.sampler,
            max_new_tokens=max(1, task.sampler.max_new_tokens - self.tokens),
            seed=task.sampler.seed + (self.tokens and 1_000_003 + self.tokens),
        )
        begun = ({"role": "assistant", "content": self.text},) if self.text else ()
        self._pieces = voice.model.write((*task.messages, *begun), sampler, {"sliders": asked})
        self._asked = asked
        self.stretches.append(Stretch(self.tokens, voice.profile("then", task.sampler) if voice.on else None))

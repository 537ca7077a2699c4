"""Replies from a model in this process: the `ReplyBackend` of the page when it is started with a checkpoint.

Several chats may share one model. They take turns token by token (`Turns`), each under its own sliders.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from steer.chat.conversation import Ending, SettingsSpan
from steer.chat.session import fit
from steer.chat.writer import Task
from steer.core.edit import Edit
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import Sampler
from steer.model.decode import decode
from steer.model.detokenise import Detokeniser
from steer.model.kv_cache import PrefixCache
from steer.model.profiles import as_profile, use
from steer.model.sampling import BAN
from steer.model.sliders import Sliders
from steer.model.steering.receipts import Tally

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


class LocalVoice:
    """`ReplyBackend` for a model in this process: one chat's sliders and KV cache, on a model that chats may share."""

    can = frozenset({"inside", "duel", "bake", "features", "reread", "reshape"})
    felt = (
        "A slider that moves is felt by the next token. What was read before stays as it was then, until the chat is "
        "read again."
    )

    def __init__(self, model: SteeredModel) -> None:
        self.model = model
        self.name = model.name
        self.sliders = Sliders(model, live=False)
        self.on = True
        self.left_out = 0
        self.memory = PrefixCache()
        self.turns = turns_of(model)

    @property
    def edit(self) -> Edit | None:
        """The edit to apply for the next token; None if no slider moves anything or `on` is false."""
        return self.sliders.current if self.on else None

    @property
    def context(self) -> int:
        """Most tokens that the model can read, including the reply."""
        return self.model.context

    def draft(self, task: Task) -> LocalDraft:
        """See `ReplyBackend`."""
        return LocalDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """See `ReplyBackend`."""
        return as_profile(name, self.sliders, sampler)

    def use(self, profile: Profile) -> None:
        """See `ReplyBackend`."""
        use(self.sliders, profile)

    def reread(self) -> None:
        """See `ReplyBackend`."""
        self.memory.forget()

    def close(self) -> None:
        """See `ReplyBackend`."""
        self.memory.forget()

    def prompt(self, task: Task, begun: int) -> list[int]:
        """Return a task's prompt as token ids, without the oldest messages if the context is too short.

        `begun`: tokens of the reply that exist already. Sets `left_out`.
        Errors: as `SteeredModel.prompt_ids`; UsageError for a message that is too long.
        """
        fitted = fit(
            task.messages, self.model.prompt_ids, self.context, task.sampler.max_new_tokens, begun, self.left_out
        )
        self.left_out = fitted.left_out
        return fitted.ids

    def begun(self, task: Task) -> list[int]:
        """Return the tokens that exist already of a task's reply."""
        return list(task.ids) or self.model.encode(task.text)


class LocalDraft:
    """A `PendingReply` that a model in this process writes."""

    ending: Ending = "length"

    def __init__(self, voice: LocalVoice, task: Task) -> None:
        begun = voice.begun(task) if task.text else []
        prompt = voice.prompt(task, len(begun))
        self.text = task.text
        self.tokens = 0
        self._voice, self._sampler, self._ids = voice, task.sampler, begun
        self._stretches: list[SettingsSpan] = []
        self._tally = Tally()
        # Decoded without the prompt, because the first word of a reply has no space before it.
        self._pieces = Detokeniser(voice.model.tokenizer, begun)
        room = voice.context - len(prompt) - len(begun)
        self._steps = self._decode(prompt, replace(task.sampler, max_new_tokens=self._length(room)), task.nudge)

    @property
    def ids(self) -> list[int]:
        """See `PendingReply`."""
        return self._ids

    @property
    def stretches(self) -> list[SettingsSpan]:
        """See `PendingReply`."""
        return self._stretches

    def step(self) -> bool:
        """See `PendingReply`."""
        voice = self._voice
        steering = voice.model.steering
        with voice.turns.turn():
            edit = voice.edit
            if not self._stretches or edit is not self._stretches[-1].edit:
                self._stretches.append(SettingsSpan(len(self._ids), named(edit, self._sampler), edit))
            with steering.alone([edit]):
                token = next(self._steps, None)
        end = token is not None and token in voice.model.end_token_ids
        if token is None or end:
            self.ending = "ended" if end else "length"
            # A reply that may be continued holds back an incomplete character, for the tokens that complete it.
            self.text += self._pieces.end() if end else ""
            return False
        self._ids.append(token)
        self.tokens += 1
        self.text += self._pieces.add(token)
        return True

    def close(self) -> None:
        """See `PendingReply`."""
        self._steps.close()

    def receipt(self) -> dict[str, Any]:
        """See `PendingReply`."""
        return self._tally.receipt().describe()

    def _length(self, room: int) -> int:
        return max(1, min(self._sampler.max_new_tokens, room))

    def _decode(self, prompt: list[int], sampler: Sampler, nudge: bool) -> Generator[int]:
        model, memory, text = self._voice.model, self._voice.memory, [*prompt, *self._ids]
        begun = len(self._ids)
        # The random stream depends on the length, or a continuation would repeat the draws of the reply's beginning.
        keys = [begun]
        if nudge:
            bans = tuple((t, BAN) for t in model.end_token_ids if t < len(model.tokenizer))
            allowed_biases = tuple(b for b in sampler.logit_bias if b[0] not in model.end_token_ids)
            first = replace(sampler, max_new_tokens=1, logit_bias=(*allowed_biases, *bans))
            for step in decode(model, [text], first, keys, tally=self._tally, memory=memory, begun=begun):
                text.append(step.tokens[0])
                yield step.tokens[0]
            begun, keys = begun + 1, [begun + 1]
            if sampler.max_new_tokens == 1:
                return
            sampler = replace(sampler, max_new_tokens=sampler.max_new_tokens - 1)
        for step in decode(model, [text], sampler, keys, tally=self._tally, memory=memory, begun=begun):
            yield step.tokens[0]


def named(edit: Edit | None, sampler: Sampler) -> Profile:
    """Return an edit as a profile, by the names of its targets. Fast enough to be called between two tokens."""
    moves = edit.as_moves() if edit is not None else ()
    sliders = (ProfileSlider(m.target.name, m.amount, m.operation, ScheduleSpec.of(m.when)) for m in moves)
    return Profile("then", sampler=sampler, preset=None, sliders=tuple(sliders))


class Turns:
    """A lock that threads get in the order in which they asked for it.

    An ordinary lock usually goes back to the thread that has just released it, so one of two replies would be written
    to its end before the other got a second token.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn and hold it for the block. Must not be nested."""
        my_turn = threading.Event()
        try:
            with self._lock:
                self._queue.append(my_turn)
                self._queue[0].set()
            my_turn.wait()
            yield
        finally:
            # A thread that is interrupted while it waits leaves the queue too, or it would be given the turn for ever.
            with self._lock:
                with suppress(ValueError):  # interrupted before it was in the queue
                    self._queue.remove(my_turn)
                if self._queue:
                    self._queue[0].set()

    @property
    def waiting(self) -> int:
        """How many threads are in the queue, including the one whose turn it is."""
        return len(self._queue)


_TURNS_BY_MODEL: WeakKeyDictionary[SteeredModel, Turns] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def turns_of(model: SteeredModel) -> Turns:
    """Return the one `Turns` object of a model."""
    with _TURNS_LOCK:
        return _TURNS_BY_MODEL.setdefault(model, Turns())

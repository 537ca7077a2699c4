"""Replies from a model in this process: the `ReplyBackend` of `Session`, and of the page that is started with a model.

Several chats may share one model. They take turns token by token (`Turns`), each under its own sliders. `fit` decides
which messages are left out when the context is full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from steer.chat.conversation import SettingsSpan
from steer.chat.writer import Messages, PendingReply, ReplyBackend, Task
from steer.core.edit import Edit
from steer.core.profile import Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import Sampler
from steer.errors import UsageError
from steer.model.chat_template import marks_of
from steer.model.decode import decode
from steer.model.kv_cache import PrefixCache
from steer.model.loaded import ChatPrompt
from steer.model.profiles import as_profile, use
from steer.model.sampling import BAN
from steer.model.sliders import Sliders
from steer.model.steering.receipts import Receipt, Tally

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


class LocalBackend(ReplyBackend):
    """`ReplyBackend` for a model in this process: one chat's sliders and KV cache, on a model that chats may share."""

    local = finds = True
    slider_note = (
        "A slider that moves changes the words that follow. What the model has read stays as it was then, until the "
        "chat is read again."
    )

    def __init__(self, model: SteeredModel, sliders: Sliders | None = None) -> None:
        """`sliders`: `model.sliders`, to share the model's; by default separate ones, none of which moves anything."""
        self.model, self.name = model, model.name
        self.sliders = Sliders(model, live=False) if sliders is None else sliders
        self.memory = PrefixCache()
        self.noted: set[str] = set()
        """Notes on the chat template that a receipt of this chat has shown already."""
        self.turns = turns_of(model)
        self.marks = marks_of(model.tokenizer)

    @property
    def context(self) -> int:
        return self.model.context

    def count(self, text: str) -> int:
        return len(self.model.encode(text))

    def draft(self, task: Task) -> LocalDraft:
        return LocalDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        return as_profile(name, self.sliders, sampler)

    def use(self, profile: Profile) -> None:
        use(self.sliders, profile)

    def reread(self) -> None:
        self.memory.forget()

    def close(self) -> None:
        self.memory.forget()

    @contextmanager
    def steered(self) -> Iterator[Edit | None]:
        """Hold the model for one forward pass under the current sliders, and yield their edit."""
        if self.sliders is self.model.sliders:  # the model applies these itself
            yield self.sliders.current
            return
        with self.turns.turn():
            edit = self.sliders.current if self.on else None
            with self.model.steering.alone([edit]):
                yield edit

    def prompt(self, task: Task) -> ChatPrompt:
        """Return a task's prompt, without the oldest messages if the context is too short.

        A reply that is to be continued is part of the prompt, unless its token ids are known. Sets `left_out`.
        Errors: as `SteeredModel.prompt`; UsageError for a message that is too long.
        """
        model, prompts = self.model, []

        def count(messages: Messages) -> list[int]:
            prompts.append(model.prompt(messages, "" if task.ids else task.text))
            return prompts[-1].ids

        wanted = task.sampler.max_new_tokens
        _, self.left_out = fit(task.messages, count, model.context, wanted, len(task.ids), self.left_out)
        return prompts[-1]


class LocalDraft(PendingReply):
    """A `PendingReply` that a model in this process writes."""

    def __init__(self, backend: LocalBackend, task: Task) -> None:
        model, left_out = backend.model, backend.left_out
        prompt = backend.prompt(task)
        head = len(prompt.ids) - prompt.begun
        begun = task.ids or prompt.ids[head:]
        super().__init__(task.text, begun)
        self.prompt_tokens = head
        self._opening = "" if task.text else prompt.opening
        """The mark of thoughts that the template opens; the text has it before its first token, for readers."""
        self._backend, self._sampler = backend, task.sampler
        self._tally = Tally()
        if backend.left_out > left_out:
            self._tally.remark(
                f"the context of {model.context:,} tokens is full: the chat is read without its first "
                f"{backend.left_out} messages from here on"
            )
        for note in prompt.notes:
            if note not in backend.noted:
                backend.noted.add(note)
                self._tally.remark(note)
        # Decoded without the prompt, because the first word of a reply has no space before it.
        self._pieces = model.detokeniser(begun)
        self._steps = self._decode(prompt.ids[:head], task.nudge)

    def step(self) -> bool:
        with self._backend.steered() as edit:
            if not self.stretches or edit is not self.stretches[-1].edit:
                self.stretches.append(SettingsSpan(len(self.ids), named(edit, self._sampler), edit))
            token = next(self._steps, None)
        if token is None:
            # A reply that may be continued holds back an incomplete character, for the tokens that complete it.
            return False
        if token in self._backend.model.end_token_ids:
            self.ending = "ended"
            self.text += self._pieces.end()
            return False
        self.ids.append(token)
        self.tokens += 1
        self.text += self._opening + self._pieces.add(token)
        self._opening = ""
        if self._pieces.ended:
            self.ending, self.ids = "ended", self._backend.model.without_end(self.ids)
        return not self._pieces.ended

    def rest(self) -> str:
        return self._pieces.end()

    def close(self) -> None:
        self._steps.close()

    def receipt(self) -> Receipt:
        return self._tally.receipt()

    def _decode(self, prompt: list[int], nudge: bool) -> Generator[int]:
        model, memory, sampler = self._backend.model, self._backend.memory, self._sampler
        text, samplers = [*prompt, *self.ids], [sampler]
        if nudge:
            ends = model.end_token_ids
            bans = tuple((t, BAN) for t in ends if t < len(model.tokenizer))
            biases = (*(b for b in sampler.logit_bias if b[0] not in ends), *bans)
            samplers = [replace(sampler, max_new_tokens=1, logit_bias=biases)]
            if sampler.max_new_tokens > 1:
                samplers.append(replace(sampler, max_new_tokens=sampler.max_new_tokens - 1))
        for part in samplers:
            begun = len(text) - len(prompt)
            if len(text) == model.context:
                return
            # The random stream depends on the length, or a continuation would repeat the draws of the reply's start.
            for step in decode(model, [text[:]], part, [begun], tally=self._tally, memory=memory, begun=begun):
                text.append(step.tokens[0])
                yield step.tokens[0]


def named(edit: Edit | None, sampler: Sampler) -> Profile | None:
    """Return an edit as a profile, by the names of its targets; None where a name is none that a profile can hold.

    Fast enough to be called between two tokens.
    """
    moves = edit.as_moves() if edit is not None else ()
    try:
        sliders = [ProfileSlider(m.target.name, m.amount, m.operation, ScheduleSpec.of(m.when)) for m in moves]
        return Profile("then", sampler=sampler, preset=None, sliders=tuple(sliders))
    except UsageError:
        return None


FILLED = 0.75
"""Share of the context to which a chat is shortened once it is too long. This frees more than the next reply needs, so
that messages are not dropped, and the chat read again, at every turn."""
ROOM = 0.25
"""Largest share of the context that is reserved for a reply; a longer reply gets whatever is left."""


def fit(
    messages: Messages,
    count: Callable[[Messages], list[int]],
    context: int,
    wanted: int,
    begun: int = 0,
    left_out: int = 0,
) -> tuple[list[int], int]:
    """Return the prompt of a chat, and how many of its oldest messages are left out so that the reply fits as well.

    `count`: makes a prompt's token ids from messages. `context`: tokens that the model can read. `wanted`: tokens that
    the reply may have. `begun`: tokens of the reply that exist already. `left_out`: how many messages were left out
    last time; the same are left out again if that is enough, because the KV cache was made without them. The system
    prompt always stays. Errors: UsageError if the last message alone is too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else ()
    rest = messages[len(head) :]
    # A shortened chat begins with a user message, because templates need it first.
    starts = [0, *(i for i, m in enumerate(rest) if i and m["role"] == "user")]
    most = context - min(wanted, int(ROOM * context))
    less = min(most, int(FILLED * context))
    again = left_out if left_out in starts else 0
    found = 0
    for cut, limit in [(0, most), (again, most), *((s, less) for s in starts), (starts[-1], context - 1)]:
        ids = count((*head, *rest[cut:]))
        found = len(ids) + begun
        if found <= min(limit, context - 1):
            return ids, cut
    raise UsageError(
        f"the last message: expected at most {context - 1} tokens with the system prompt and the reply so far, as much "
        f"as the model can read, found {found}; shorten it"
    )


class Turns:
    """A lock that threads get in the order in which they asked for it.

    An ordinary lock usually goes back to the thread that has just released it, so one of two replies would be written
    to its end before the other got a second token.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn and hold it for the block. Must not be nested."""
        ticket = object()
        try:
            with self._changed:
                self._queue.append(ticket)
                self._changed.wait_for(lambda: self._queue[0] is ticket)
            yield
        finally:
            # A thread that is interrupted while it waits leaves the queue too, or it would be given the turn for ever.
            with self._changed:
                with suppress(ValueError):  # interrupted before it was in the queue
                    self._queue.remove(ticket)
                self._changed.notify_all()

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

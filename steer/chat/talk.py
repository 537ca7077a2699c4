"""The talking part of the page's chat: sending, regenerating, editing and deleting messages, and saving the chat.

`Talk` connects a `Conversation` (the tree of messages), a `Writer` (the thread that writes a reply), a `SliderPanel`
and a `ReplyBackend` (a local model or a server). `steer.chat.chat.Chat` adds the page's other functions.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.chat.conversation import Conversation, Message, SettingsSpan, Written
from steer.chat.slider_panel import SliderPanel
from steer.chat.stored import Stored, load_chat, new_place, save_chat
from steer.chat.writer import PendingReply, ReplyBackend, Task, Writer, as_chat
from steer.core.cards import Card
from steer.core.profile import Profile
from steer.core.sampler import CHAT, Sampler
from steer.errors import SteerError, UsageError
from steer.plain_text import without_surrogates

_ANEW = 10_000
"""Difference between the seeds of two alternatives of a reply, so that none equals the seed of another turn."""


class Talk:
    """One chat. The page calls its methods; replies are written in a background thread."""

    def __init__(self, voice: ReplyBackend, *, place: Path | None = None, keep: bool = True) -> None:
        """`place`: the file of a saved chat to open. `keep`: whether the chat is saved after every change.

        Errors: SteerError for a file that is not a chat.
        """
        self.voice = voice
        self.writer = Writer()
        self.conversation = Conversation()
        self.system: str | None = None
        """The system prompt."""
        self.sampler: Sampler = CHAT
        """How tokens are drawn. Its seed is the seed of the first reply."""
        self.board = SliderPanel(voice)
        self.saved = place
        """The chat's file; None before the first save."""
        self._keep, self._saving = keep, threading.Lock()
        self._problem: str | None = None
        if place is not None:
            self._open(load_chat(place))

    @property
    def sliders(self) -> Any:
        """The backend's sliders: a mapping from name to amount."""
        return self.voice.sliders

    @property
    def last_error(self) -> str | None:
        """What went wrong in the background, with the last reply or with saving; None if nothing did."""
        return self.writer.error or self._problem

    @property
    def left_out(self) -> int:
        """How many of the oldest messages were left out for the last reply because the chat is too long."""
        return self.voice.left_out

    # Messages

    def path(self) -> list[Message]:
        """Return the messages on the page, first to last; the text of a reply grows while it is written."""
        return self.conversation.path()

    def place_of(self, message: int) -> tuple[int, int]:
        """Return a message's index among its alternatives, from 0, and their number."""
        beside = [m.id for m in self.conversation.alternatives(message)]
        return beside.index(message), len(beside)

    def swipe(self, message: int, by: int) -> bool:
        """Show another alternative of a message: `by` places further, or back if negative. False if there is none."""
        beside = self.conversation.alternatives(message)
        at = next(i for i, m in enumerate(beside) if m.id == message) + by
        if not 0 <= at < len(beside):
            return False
        self.conversation.choose(beside[at].id)
        self.save()
        return True

    def say(self, text: str) -> Message:
        """Send a message, start to write the reply, and return the reply's message.

        Errors: SteerError if the chat cannot be replied to; then the message is not added.
        """
        self.stop()
        last = self.conversation.last
        return self._ask(text, None if last is None else last.id)

    def regenerate(self) -> Message:
        """Start to write an alternative of the last reply, with another seed, or a first reply to the last message.

        Errors: UsageError if there is no message to reply to.
        """
        self.stop()
        last = self.conversation.last
        to = last.parent if last is not None and last.role == "assistant" else last and last.id
        if to is None:
            raise UsageError("regenerate: expected a message to reply to, found none; say something first")
        return self._reply(to)

    def lengthen(self) -> Message:
        """Continue the last reply from where it stopped. Errors: UsageError if there is none."""
        self.stop()
        last = self.conversation.last
        if last is None or last.role != "assistant" or last.parent is None or not last.text:
            raise UsageError("continue: expected a reply at the end of the chat, found none; say something first")
        return self._reply(last.parent, into=last)

    def edit(self, message: int, text: str) -> Message:
        """Change a message's text.

        A reply is changed in place and returned. A user's message stays; the new text is added as its alternative, its
        reply is started, and that reply is returned. Errors: as `say`.
        """
        self.stop()
        m = self.conversation[message]
        if m.role == "user":
            return self._ask(text, m.parent)
        self.conversation.change(message, said(text))
        self.save()
        return m

    def delete(self, message: int) -> None:
        """Remove a message and everything after it; its alternatives stay."""
        self.stop()
        self.conversation.remove(message)
        self.save()

    def clear(self) -> None:
        """Start a new chat. The file of the old one stays, and so do the sliders."""
        self.stop()
        self.conversation.clear()
        self.voice.reread()
        self.voice.left_out = 0
        self.writer.error = self._problem = self.saved = None

    def play(self, card: Card) -> None:
        """Start a new chat with a character: its system prompt, its first messages as alternatives, and the profile of
        its card, if any. Errors: as `use`; then nothing has changed."""
        if card.profile is not None:
            self.use(card.profile)
        self.clear()
        self.system = "\n\n".join(t for t in (card.system_prompt, card.post_history_instructions) if t)
        greetings = [g for g in (card.first_message, *card.alternate_greetings) if g.strip()]
        greeting_messages = [self.conversation.add("assistant", g, None) for g in greetings]
        if greeting_messages:
            self.conversation.choose(greeting_messages[0].id)

    def stop(self) -> None:
        """Stop the reply that is being written; its text so far stays. Errors: SteerError if it does not stop."""
        if not self.writer.stop():
            raise SteerError("the reply does not stop: the model is still reading; wait a moment, then try again")

    # The sliders

    def use(self, profile: Profile) -> None:
        """Use a profile's sliders and no others, and its sampler, except for this chat's reply length and seed.

        Errors: SteerError for a slider that the model does not have; then nothing has changed.
        """
        self.board.use(profile)
        current = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=current.max_new_tokens, seed=current.seed)

    def profile(self, name: str) -> Profile:
        """Return the current sliders and sampler as a profile. Errors: UsageError."""
        return self.voice.profile(name, self.sampler)

    def reread(self) -> None:
        """Read the whole chat again under the current sliders, before the next token."""
        self.voice.reread()

    # Saving

    def save(self) -> None:
        """Save the chat to its file, unless it has no message. An error is reported by `last_error`."""
        if not self._keep or not len(self.conversation):
            return
        with self._saving:
            try:
                self.saved = save_chat(self.saved or new_place(), self._stored())
                self._problem = None
            except SteerError as e:
                self._problem = str(e)

    def close(self) -> None:
        """Stop the reply that is being written and free the chat's KV cache."""
        self.writer.stop()
        self.voice.close()

    def _ask(self, text: str, after: int | None) -> Message:
        asked = self.conversation.add("user", said(text), after)
        try:
            return self._reply(asked.id)
        except BaseException:
            self.conversation.remove(asked.id)
            raise

    def _reply(self, to: int, into: Message | None = None) -> Message:
        """Start to write a reply to the message `to`, or to continue the reply `into`."""
        chat, before = self.conversation, into.written if into is not None else None
        seed = self._seed(to) if into is None else (before.seed if before is not None else self._seed(to))
        sampler = replace(self.sampler, seed=seed)
        messages = as_chat(chat.upto(to), self.system)
        if into is None:
            task = Task(messages, sampler)
        else:
            ids = before.ids if before is not None else ()
            # A reply that was cut off just goes on. If the model had ended it, its end token is banned once.
            task = Task(messages, sampler, into.text, ids, before is None or before.ending == "ended")
        draft = self.voice.draft(task)
        message = into if into is not None else chat.add("assistant", "", to)
        self.writer.start(
            draft, message.id, on_text=lambda d: self._take(message, d), on_end=lambda d: self._end(message, d, task)
        )
        return message

    def _take(self, message: Message, draft: PendingReply) -> None:
        message.text = draft.text

    def _end(self, message: Message, draft: PendingReply, task: Task) -> None:
        empty = not draft.text.strip()
        if empty:
            self.conversation.remove(message.id)
        else:
            earlier = message.written.stretches if message.written is not None and task.ids else ()
            stretches: tuple[SettingsSpan, ...] = (*earlier, *draft.stretches)
            message.written = Written(
                task.sampler.seed, stretches[-1].profile if stretches else None, stretches, tuple(draft.ids),
                draft.receipt(), draft.ending, self.writer.seconds, self.writer.first_token, self.writer.rate,
            )  # fmt: skip
        self.save()
        if empty and draft.ending in ("ended", "length"):
            raise SteerError("the model gave an empty reply; regenerate it, or say something else")

    def _seed(self, to: int) -> int:
        chat = self.conversation
        used = [m.written.seed for m in chat.below(to) if m.written is not None]
        turn = sum(m.role == "user" for m in chat.upto(to)) - 1
        return max(used) + _ANEW if used else self.sampler.seed + max(turn, 0)

    def _being_written(self) -> int | None:
        return self.writer.message_id if self.writer.running else None

    def _stored(self) -> Stored:
        try:
            profile = self.profile("page")
        except SteerError:
            profile = None
        return Stored(
            self.conversation, self.voice.name, self.system, profile, tuple(self.board.pinned), self.board.on,
            self.sampler.seed,
        )  # fmt: skip

    def _open(self, stored: Stored) -> None:
        self.conversation, self.system = stored.conversation, stored.system
        self.board = SliderPanel(self.voice, stored.pinned)
        self.board.on = stored.on
        if stored.profile is not None:
            self.sampler = stored.profile.sampler
            try:
                self.use(stored.profile)
            except SteerError as e:
                # The chat was held with another checkpoint; its messages are still shown.
                self._problem = f"the sliders of this chat are left out: {e}"
        self.sampler = replace(self.sampler, seed=stored.seed)


def said(text: str) -> str:
    """Return a message's text, stripped, without lone surrogates. Errors: UsageError for an empty one."""
    text = without_surrogates(text).strip()
    if not text:
        raise UsageError("message: expected some text, found none; write something")
    return text

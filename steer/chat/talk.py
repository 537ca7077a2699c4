"""Talking: messages and their replies, which a thread writes, swipes, edits, and what is kept of it all."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.chat.board import Board
from steer.chat.conversation import Conversation, Message, Stretch, Written
from steer.chat.stored import Stored, load_chat, new_place, save_chat
from steer.chat.voice import Draft, Task, Voice, as_chat
from steer.chat.writer import Writer
from steer.errors import SteerError, UsageError
from steer.values.cards import Card
from steer.values.profile import Profile
from steer.values.sampler import CHAT, Sampler

_ANEW = 10_000
"""What the seed of each further alternative differs by, so that it is no other turn's."""


class Talk:
    """One chat. Its methods are for the page's threads; a reply is written in a thread of its own."""

    def __init__(self, voice: Voice, *, place: Path | None = None, keep: bool = True) -> None:
        """`place`: a chat that was kept, to go on with. `keep`: whether it is saved as it goes.

        Errors: SteerError for a file that is no chat.
        """
        self.voice = voice
        self.writer = Writer()
        self.conversation = Conversation()
        self.system: str | None = None
        """What the model is told first."""
        self.sampler: Sampler = CHAT
        """How tokens are drawn. Its seed is the first reply's."""
        self.board = Board(voice)
        self.saved = place
        """Where it is kept; None before there is anything to keep."""
        self._keep, self._saving = keep, threading.Lock()
        self._problem: str | None = None
        if place is not None:
            self._open(load_chat(place))

    @property
    def sliders(self) -> Any:
        """Amounts by name."""
        return self.voice.sliders

    @property
    def last_error(self) -> str | None:
        """What went wrong behind the page's back: with the last reply, or with saving."""
        return self.writer.error or self._problem

    @property
    def left_out(self) -> int:
        """How many of the oldest messages the model did not read for the last reply, as the chat is too long."""
        return self.voice.left_out

    # What was said

    def path(self) -> list[Message]:
        """What is on the page, first to last; the text of a reply grows as it is written."""
        return self.conversation.path()

    def place_of(self, message: int) -> tuple[int, int]:
        """A message's place among its alternatives, from 0, and how many there are."""
        beside = [m.id for m in self.conversation.alternatives(message)]
        return beside.index(message), len(beside)

    def swipe(self, message: int, by: int) -> bool:
        """Put another alternative of a message on the page. False where there is none that way."""
        beside = self.conversation.alternatives(message)
        at = next(i for i, m in enumerate(beside) if m.id == message) + by
        if not 0 <= at < len(beside):
            return False
        self.conversation.choose(beside[at].id)
        self.save()
        return True

    def say(self, text: str) -> Message:
        """Send a message; its reply begins to be written. The reply's message.

        Errors: SteerError for a chat that cannot be replied to; the message is then not in it.
        """
        self.stop()
        last = self.conversation.last
        return self._ask(text, None if last is None else last.id)

    def regenerate(self) -> Message:
        """Another reply beside the last one, from another seed; the first one where there is none yet.

        Errors: UsageError where nothing was said that could be replied to.
        """
        self.stop()
        last = self.conversation.last
        to = last.parent if last is not None and last.role == "assistant" else last and last.id
        if to is None:
            raise UsageError("regenerate: expected a message to reply to, found none; say something first")
        return self._reply(to)

    def lengthen(self) -> Message:
        """Go on with the last reply, where it stopped. Errors: UsageError where there is none."""
        self.stop()
        last = self.conversation.last
        if last is None or last.role != "assistant" or last.parent is None or not last.text:
            raise UsageError("continue: expected a reply at the end of the chat, found none; say something first")
        return self._reply(last.parent, into=last)

    def edit(self, message: int, text: str) -> Message:
        """Change a message. One of the user's stays as it was, and the new one begins a branch beside it, whose reply
        is written at once: that is returned. Errors: as `say`."""
        self.stop()
        m = self.conversation[message]
        if m.role == "user":
            return self._ask(text, m.parent)
        self.conversation.change(message, said(text))
        self.save()
        return m

    def delete(self, message: int) -> None:
        """Take a message out, and all that follows it; alternatives stay."""
        self.stop()
        self.conversation.remove(message)
        self.save()

    def clear(self) -> None:
        """A new chat; what was said stays where it was saved. The sliders stay."""
        self.stop()
        self.conversation.clear()
        self.voice.reread()
        self.voice.left_out = 0
        self.writer.error = self._problem = self.saved = None

    def play(self, card: Card) -> None:
        """A new chat with a character: its prompt, its first message with the alternates beside it, and the profile
        that its card may bring. Errors: as `use`; then nothing has changed."""
        if card.profile is not None:
            self.use(card.profile)
        self.clear()
        self.system = "\n\n".join(t for t in (card.system_prompt, card.post_history_instructions) if t)
        greetings = [g for g in (card.first_message, *card.alternate_greetings) if g.strip()]
        said = [self.conversation.add("assistant", g, None) for g in greetings]
        if said:
            self.conversation.choose(said[0].id)

    def stop(self) -> None:
        """Stop the reply that is being written; what there is of it stays. Errors: SteerError where it does not end."""
        if not self.writer.stop():
            raise SteerError("the reply does not stop: the model is still reading; wait a moment, then try again")

    # The sliders

    def use(self, profile: Profile) -> None:
        """Go by a profile: its sliders and no others, and its sampler at this chat's length and seed.

        Errors: SteerError for what the model does not have; then nothing has changed.
        """
        self.board.use(profile)
        mine = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=mine.max_new_tokens, seed=mine.seed)

    def profile(self, name: str) -> Profile:
        """The sliders and the sampler as they stand. Errors: UsageError."""
        return self.voice.profile(name, self.sampler)

    def reread(self) -> None:
        """Have the whole chat read again under the sliders of now, before the next token."""
        self.voice.reread()

    # Keeping it

    def save(self) -> None:
        """Keep the chat where it is kept; nothing without a message. What goes wrong is told by `last_error`."""
        if not self._keep or not len(self.conversation):
            return
        with self._saving:
            try:
                self.saved = save_chat(self.saved or new_place(), self._stored())
                self._problem = None
            except SteerError as e:
                self._problem = str(e)

    def close(self) -> None:
        """End what is being written and let go of the model's memory of the chat."""
        self.writer.stop()
        self.voice.close()

    # Below: how

    def _ask(self, text: str, after: int | None) -> Message:
        asked = self.conversation.add("user", said(text), after)
        try:
            return self._reply(asked.id)
        except BaseException:
            self.conversation.remove(asked.id)
            raise

    def _reply(self, to: int, into: Message | None = None) -> Message:
        """Write a reply to a message, or more of one."""
        chat, before = self.conversation, into.written if into is not None else None
        seed = self._seed(to) if into is None else (before.seed if before is not None else self._seed(to))
        sampler = replace(self.sampler, seed=seed)
        messages = as_chat(chat.upto(to), self.system)
        if into is None:
            task = Task(messages, sampler)
        else:
            ids = before.ids if before is not None else ()
            # What ends within a word goes on; what the model had ended is asked for more.
            task = Task(messages, sampler, into.text, ids, before is None or before.ending == "ended")
        draft = self.voice.draft(task)
        message = into if into is not None else chat.add("assistant", "", to)
        self.writer.start(
            draft, message.id, on_text=lambda d: self._take(message, d), on_end=lambda d: self._end(message, d, task)
        )
        return message

    def _take(self, message: Message, draft: Draft) -> None:
        message.text = draft.text

    def _end(self, message: Message, draft: Draft, task: Task) -> None:
        empty = not draft.text.strip()
        if empty:
            self.conversation.remove(message.id)
        else:
            kept = message.written.stretches if message.written is not None and task.ids else ()
            stretches: tuple[Stretch, ...] = (*kept, *draft.stretches)
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
        self.board = Board(self.voice, stored.pinned)
        self.board.on = stored.on
        if stored.profile is not None:
            self.sampler = stored.profile.sampler
            try:
                self.use(stored.profile)
            except SteerError as e:
                # It was held with another checkpoint: what was said is still there.
                self._problem = f"the sliders of this chat are left out: {e}"
        self.sampler = replace(self.sampler, seed=stored.seed)


def said(text: str) -> str:
    """Text that a model can be told. Errors: UsageError for none."""
    # Half of a surrogate pair, which a page can send, is no text for a tokenizer.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
    if not text:
        raise UsageError("message: expected some text, found none; write something")
    return text

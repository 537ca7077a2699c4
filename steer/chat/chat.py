"""The chat behind one browser tab: messages, replies in the background, comparing, looking inside, features, baking.

A `Chat` connects a `Conversation` (the tree of messages), a `Writer` (the thread that writes a reply), a `SliderPanel`
and a `ReplyBackend` (a local model or a server). The parts of `steer.page` draw it and call its methods.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from steer.chat.comparison import Comparison, Side
from steer.chat.context_use import ContextUse
from steer.chat.conversation import Conversation, Message
from steer.chat.feature_index import FeatureIndex
from steer.chat.local import LocalBackend
from steer.chat.preview import Preview
from steer.chat.readout import Readouts, TokenReadout
from steer.chat.session import BaseChat
from steer.chat.slider_panel import SliderPanel
from steer.chat.stored import Stored, load_chat, new_place, save_chat
from steer.chat.voting import Thumb, keep_vote, votes_place
from steer.chat.writer import Messages, PendingReply, ReplyBackend, Task, Writer, as_chat
from steer.core.cards import Card
from steer.core.lorebook import Lorebook, Scan
from steer.core.profile import Profile
from steer.core.trait import Trait
from steer.errors import SteerError, UnsupportedError, UsageError
from steer.finding.new_slider import FailedSearch, NewSliderJob, TasteJob, failed_searches
from steer.model.profiles import edit_of
from steer.plain_text import without_surrogates

if TYPE_CHECKING:  # openai takes long to import
    from steer.chat.remote_search import RemoteSearch
    from steer.model.steered import SteeredModel

_SEED_STEP = 10_000
"""Difference between the seeds of two alternatives of a reply, so that none equals the seed of another turn."""


class Chat(BaseChat):
    """One chat. The page calls its methods; replies are written in a background thread.

    Comparing, looking inside, features and baking raise UnsupportedError for a model behind a server.
    """

    def __init__(self, backend: ReplyBackend, *, place: Path | None = None, keep: bool = True) -> None:
        """`place`: the file of a saved chat to open. `keep`: whether the chat is saved after every change.

        Errors: SteerError for a file that is not a chat.
        """
        super().__init__(backend)
        self.writer = Writer()
        self.conversation = Conversation()
        self.panel = SliderPanel(backend)
        self.saved = place
        """The chat's file; None before the first save."""
        self._keep, self._saving = keep, threading.Lock()
        self._problem: str | None = None
        self._taste: TasteJob | None = None
        self.used: ContextUse | None = None
        """How the last prompt fills the context; None before the first, and where the context is not known."""
        if place is not None:
            self._open(load_chat(place))

    @property
    def model(self) -> SteeredModel:
        """The model, in this process. Errors: UnsupportedError for one behind a server."""
        return self._local.model

    @property
    def last_error(self) -> str | None:
        """What went wrong in the background, with the last reply or with saving; None if nothing did."""
        return self.writer.error or self._problem

    def warnings(self) -> list[str]:
        """Return warnings: sites that are moved too far, sliders beyond a calibrated range or unused by the reply."""
        last = self.conversation.last
        receipt = last.written.receipt if last is not None and last.written is not None else None
        return [*self.panel.warnings(), *((receipt or {}).get("warnings") or []), *self.scanned.warnings]

    # Messages

    def path(self) -> list[Message]:
        """Return the messages on the page, first to last; the text of a reply grows while it is written."""
        return self.conversation.path()

    def place_of(self, message: int) -> tuple[int, int]:
        """Return a message's index among its alternatives, from 0, and their number."""
        beside = [m.id for m in self.conversation.alternatives(message)]
        return beside.index(message), len(beside)

    def swipe(self, message: int, places: int) -> bool:
        """Show the alternative that is `places` further, or back if negative. Return False if there is none."""
        beside = self.conversation.alternatives(message)
        at = self.place_of(message)[0] + places
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
        self.conversation.change(message, _cleaned(text))
        self.save()
        return m

    def rate(self, message: int, thumb: Thumb) -> None:
        """Keep a thumb up or down for a reply. The same thumb a second time takes it back.

        Errors: UsageError for a message that is not a finished reply; SteerError if the vote cannot be stored.
        """
        m = self._finished(message, "thumb")
        assert m.parent is not None
        given = None if m.thumb == thumb else thumb
        seed, profile = (None, None) if m.written is None else (m.written.seed, m.written.profile)
        chat = self._prompt(self.conversation.upto(m.parent), seed or 0)[0]
        keep_vote(self.backend.name, chat, [(m.text, "", profile)], given or "withdrawn", seed=seed)
        m.thumb = given
        self.save()

    def delete(self, message: int) -> None:
        """Remove a message and everything after it; its alternatives stay."""
        self.stop()
        self.conversation.remove(message)
        self.save()

    def clear(self) -> None:
        """Start a new chat. The file of the old one stays, and so do the sliders."""
        self.stop()
        super().clear()
        self.conversation = Conversation()
        self.writer.error = self._problem = self.saved = self.used = None

    def play(self, card: Card) -> None:
        """See `BaseChat.play`. The character's other greetings are alternatives of its first message."""
        super().play(card)
        greetings = [g for g in (card.first_message, *card.alternate_greetings) if g.strip()]
        messages = [self.conversation.add("assistant", g, None) for g in greetings]
        if messages:
            self.conversation.choose(messages[0].id)

    def add_lorebook(self, book: Lorebook) -> None:
        super().add_lorebook(book)
        self.save()

    def remove_lorebook(self, name: str) -> None:
        super().remove_lorebook(name)
        self.save()

    def stop(self) -> None:
        """Stop the reply that is being written; its text so far stays. Errors: SteerError if it does not stop."""
        if not self.writer.stop():
            raise SteerError("the reply does not stop: the model is still reading; wait a moment, then try again")

    def use(self, profile: Profile) -> None:
        super().use(profile)
        self.panel.pin_used()

    # What only a model in this process offers

    def side(self, setting: Literal["plain", "now"] | Profile) -> Side:
        """Return a setting to compare: `plain` without sliders, `now` with the sliders as they are, or a profile's.

        A profile's sampler is not used: both replies use the chat's, so that only the sliders differ.
        Errors: SteerError for sliders of a profile that this checkpoint does not have.
        """
        if setting == "plain":
            return Side("without sliders", None, Profile("none"))
        backend = self._local
        if isinstance(setting, Profile):
            return Side(setting.name, edit_of(backend.model, setting), setting)
        try:
            profile = self.profile("these")
        except SteerError:
            profile = None
        return Side("with these sliders", backend.sliders.current, profile)

    def compare(self, text: str | None, first: Side, second: Side, *, blind: bool = False) -> Comparison:
        """Begin to write two replies to a message, one under each setting. The chat does not change.

        `text`: the message; None for the chat's last user message. `blind`: hide which reply has which setting.
        Errors: UsageError if there is no message.
        """
        backend = self._local
        path = self.path()
        if text is None:
            while path and path[-1].role != "user":
                path.pop()
            if not path:
                raise UsageError("compare: expected a message to reply to, found none; write one")
        else:
            path.append(Message(-1, "user", _cleaned(text), None))
        seed = self.sampler.seed + sum(m.role == "user" for m in path) - 1
        task = Task(self._prompt(path, seed)[0], replace(self.sampler, seed=seed))
        return Comparison(backend, task, (first, second), as_chat(path)[-1]["content"], blind=blind)

    def take(self, comparison: Comparison, place: Literal["left", "right"]) -> Message:
        """Add one reply of a comparison to the chat, and the message before it if the chat does not end with it."""
        self.stop()
        comparison.stop()
        text, written = comparison.written(place)
        asked = comparison.asked
        path = self.path()
        while path and path[-1].role == "assistant" and path[-1].parent is not None:
            path.pop()
        replied_to = path[-1] if path else None
        if replied_to is None or replied_to.role != "user" or replied_to.text != asked:
            last = self.conversation.last
            replied_to = self.conversation.add("user", asked, None if last is None else last.id)
        message = self.conversation.add("assistant", text, replied_to.id, written)
        self.save()
        return message

    def inside(self, message: int, names: list[str]) -> TokenReadout:
        """Read traits and features on every token of a reply, once under the sliders it had and once without any.

        `message`: the reply's id. `names`: sliders. Errors: UsageError for a message that is not a finished reply.
        """
        readouts = self._readouts
        m = self._finished(message, "inside")
        assert m.parent is not None
        seed = self.sampler.seed if m.written is None else m.written.seed
        return readouts.at(m, self._prompt(self.conversation.upto(m.parent), seed)[0], self.sampler, names)

    def _finished(self, message: int, what: str) -> Message:
        """Return a reply that is written. Errors: UsageError that begins with `what` for any other message."""
        m = self.conversation[message]
        written_now = self.writer.running and message == self.writer.message_id
        if m.role != "assistant" or m.parent is None or not m.text or written_now:
            raise UsageError(f"{what}: expected a reply that is written, found another message; choose a reply")
        return m

    def make_taste(self) -> None:
        """Start to make a slider of all votes, unless one is being made. Errors: as `TasteJob.start`."""
        TasteJob.start(self.model, votes_place())

    def taste(self) -> TasteJob | None:
        """Return the job that makes a slider of votes for this model, running or ended; None if there was none. When it
        is done, its slider is among those of this chat."""
        job = TasteJob.latest(self.model)
        if job is not None and job.direction is not None and job is not self._taste:
            self._taste = job
            name = job.direction.name
            self.sliders.put(job.direction, self.sliders.get(name))
            self.sliders.ranges.pop(name, None)  # of the slider that stood there before
            self.panel.revision += 1
        return job

    @cached_property
    def features(self) -> FeatureIndex:
        """The features of this model's dictionaries."""
        return FeatureIndex(self.model)

    def preview(self, trait: Trait) -> Preview:
        """Begin to write replies under the two sentences of a new slider. Errors: UsageError for long sentences."""
        return Preview(self.backend, trait)

    @property
    def _searches(self) -> tuple[type[NewSliderJob] | type[RemoteSearch], Any]:
        """The class of searches for new sliders, in this process or on the server, and their subject."""
        if self.backend.local:
            return NewSliderJob, self.model
        from steer.chat.remote_search import RemoteSearch

        return RemoteSearch, self.backend

    def new_slider(self, trait: Trait) -> NewSliderJob | RemoteSearch:
        """Start to search for a new slider's direction, on the server if the model is one's. Errors: as `start` of
        what is returned."""
        kind, subject = self._searches
        return kind.start(subject, trait)

    @property
    def searching(self) -> NewSliderJob | RemoteSearch | None:
        """The latest search for a new slider, running or ended; None if there was none."""
        kind, subject = self._searches
        return kind.latest(subject)

    def forget_search(self) -> None:
        """Make `searching` None, once the user has seen how the search ended."""
        kind, subject = self._searches
        kind.forget(subject)

    def failed_searches(self) -> Sequence[FailedSearch | RemoteSearch]:
        """Return the searches for new sliders that found nothing; of a server's, the last one."""
        if self.backend.local:
            return failed_searches(self.model)
        search = cast("RemoteSearch | None", self.searching)
        return [] if search is None or not search.failed else [search]

    @property
    def _local(self) -> LocalBackend:
        if not self.backend.local:
            raise UnsupportedError(
                f"{self.backend.name}: its server does not offer that; open the page on the model itself"
            )
        return cast(LocalBackend, self.backend)

    @cached_property
    def _readouts(self) -> Readouts:
        return Readouts(self._local)

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
        self.backend.close()

    def _stored(self) -> Stored:
        try:
            profile = self.profile("page")
        except SteerError:
            profile = None
        return Stored(
            self.conversation, self.backend.name, self.system, profile, tuple(self.panel.pinned), self.panel.on,
            self.sampler.seed, self.lore,
        )  # fmt: skip

    def _open(self, stored: Stored) -> None:
        self.conversation, self.system, self.lore = stored.conversation, stored.system, stored.lore
        self.panel = SliderPanel(self.backend, stored.pinned)
        self.panel.on = stored.on
        if stored.profile is not None:
            self.sampler = stored.profile.sampler
            try:
                self.use(stored.profile)
            except SteerError as e:
                # The chat was held with another checkpoint; its messages are still shown.
                self._problem = f"the sliders of this chat are left out: {e}"
        self.sampler = replace(self.sampler, seed=stored.seed)

    # Replies

    def _ask(self, text: str, after: int | None) -> Message:
        asked = self.conversation.add("user", _cleaned(text), after)
        try:
            return self._reply(asked.id)
        except BaseException:
            self.conversation.remove(asked.id)
            raise

    def _reply(self, to: int, into: Message | None = None) -> Message:
        """Start to write a reply to the message `to`, or to continue the reply `into`."""
        before = into.written if into is not None else None
        seed = self._seed(to) if before is None else before.seed
        messages, self.scanned = self._prompt(self.conversation.upto(to), seed)
        task = Task(messages, replace(self.sampler, seed=seed))
        if into is not None:
            into.thumb = None
            # A reply that was cut off just goes on. If the model had ended it, its end token is banned once.
            ids = () if before is None else before.ids
            task = replace(task, text=into.text, ids=ids, nudge=before is None or before.ending == "ended")
        draft = self.backend.draft(task)
        self.used = self._context_use(task, draft)
        message = into if into is not None else self.conversation.add("assistant", "", to)

        def on_text(draft: PendingReply) -> None:
            message.text = draft.text

        self.writer.start(draft, message.id, on_text=on_text, on_end=lambda d: self._end(message, d, task))
        return message

    def _prompt(self, path: list[Message], seed: int) -> tuple[Messages, Scan]:
        """The chat of a path as the model reads it, and which entries of lorebooks are in it."""
        first = path[0]
        greeting = self.place_of(first.id)[0] if first.role == "assistant" else None
        return self.prompt(as_chat(path, self.system), seed, greeting)

    def _context_use(self, task: Task, draft: PendingReply) -> ContextUse | None:
        backend = self.backend
        if backend.context is None:
            return None
        prompt = draft.prompt_tokens or sum(backend.count(m["content"]) for m in task.messages)
        system = backend.count(self.system) if self.system else 0
        return ContextUse.of(prompt, system, self.scanned.tokens, task.sampler.max_new_tokens, backend.context)

    def _end(self, message: Message, draft: PendingReply, task: Task) -> None:
        empty = not draft.text.strip()
        if empty:
            self.conversation.remove(message.id)
        else:
            earlier = message.written.stretches if message.written is not None and task.ids else ()
            spans = (*earlier, *draft.stretches)
            message.written = self.writer.record(task.sampler.seed, spans, draft.ids, draft.receipt(), draft.ending)
        self.save()
        if empty and draft.ending in ("ended", "length"):
            raise SteerError("the model gave an empty reply; regenerate it, or say something else")

    def _seed(self, to: int) -> int:
        used = [m.written.seed for m in self.conversation.below(to) if m.written is not None]
        turn = sum(m.role == "user" for m in self.conversation.upto(to)) - 1
        return max(used) + _SEED_STEP if used else self.sampler.seed + max(turn, 0)


def _cleaned(text: str) -> str:
    """Return a message's text, stripped, without lone surrogates. Errors: UsageError for an empty one."""
    text = without_surrogates(text).strip()
    if not text:
        raise UsageError("message: expected some text, found none; write something")
    return text

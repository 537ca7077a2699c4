"""A chat as its page has it: talking, and beside it comparing, looking inside, searching features, baking."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from steer.chat.conversation import Message
from steer.chat.talk import Talk, said
from steer.chat.voice import Task, as_chat
from steer.errors import UnsupportedError, UsageError
from steer.values.profile import Profile

if TYPE_CHECKING:
    from steer.chat.baking_job import BakePlan, Form
    from steer.chat.duel import Duel, Side
    from steer.chat.feature_search import Firing, Shelf
    from steer.chat.inside import Look, Looks
    from steer.chat.local import LocalVoice


class Chat(Talk):
    """One chat of one page, with all that the page offers."""

    def warnings(self) -> list[str]:
        """What to know about the sliders: too much at a site, beyond a calibrated range, or not met by the reply."""
        last = self.conversation.last
        receipt = last.written.receipt if last is not None and last.written is not None else None
        return [*self.board.warnings(), *((receipt or {}).get("warnings") or [])]

    def side(self, kind: Literal["plain", "now"]) -> Side:
        """A setting to compare: no sliders, or these as they stand."""
        from steer.chat.duel import plain_side, slider_side

        return plain_side() if kind == "plain" else slider_side(self.sliders, self.sampler)

    def side_of(self, profile: Profile) -> Side:
        """A profile as a setting to compare. Errors: SteerError."""
        from steer.chat.duel import profile_side

        return profile_side(self._local("duel").model, profile)

    def duel(self, text: str | None, first: Side, second: Side, *, blind: bool = False) -> Duel:
        """Answer a message under two settings at once; None for the last message again. The chat stays as it is.

        Errors: UsageError where there is no message; UnsupportedError for a model elsewhere.
        """
        from steer.chat.duel import Duel

        voice = self._local("duel")
        path = self.path()
        if text is None:
            while path and path[-1].role != "user":
                path.pop()
            if not path:
                raise UsageError("compare: expected a message to reply to, found none; write one")
        else:
            path.append(Message(-1, "user", said(text), None))
        seed = self.sampler.seed + sum(m.role == "user" for m in path) - 1
        task = Task(as_chat(path, self.system), replace(self.sampler, seed=seed))
        return Duel(voice, task, (first, second), blind=blind)

    def take(self, duel: Duel, place: Literal["left", "right"]) -> Message:
        """Put one of two replies into the chat, with the message where it is not there yet."""
        self.stop()
        duel.stop()
        text, written = duel.written(place)
        asked = duel.task.messages[-1]["content"]
        path = self.path()
        while path and path[-1].role == "assistant" and path[-1].parent is not None:
            path.pop()
        to = path[-1] if path else None
        if to is None or to.role != "user" or to.text != asked:
            last = self.conversation.last
            to = self.conversation.add("user", asked, None if last is None else last.id)
        message = self.conversation.add("assistant", text, to.id, written)
        self.save()
        return message

    def readable(self) -> list[tuple[str, str]]:
        """(name, title) of all that the inside of a reply can be read by."""
        return [(r.name, r.title) for r in self.board.rows()]

    def inside(self, message: int, names: list[str]) -> Look:
        """What traits and features read on every token of a reply, steered as it was and not at all.

        Errors: UsageError for a message that is no reply; UnsupportedError for a model elsewhere.
        """
        looks = self._looks
        m = self.conversation[message]
        if m.role != "assistant" or m.parent is None or not m.text or message == self._being_written():
            raise UsageError("inside: expected a reply that is written, found another message; choose a reply")
        return looks.at(m, as_chat(self.conversation.upto(m.parent), self.system), self.sampler, names)

    def shelf(self) -> Shelf:
        """The features of this model's dictionaries. Errors: UnsupportedError for a model elsewhere."""
        return self._shelf

    def fires_on(self, message: int, limit: int = 12) -> list[Firing]:
        """The features that fire most on a message, read in its chat. Errors: as `shelf`."""
        m = self.conversation[message]
        before = () if m.parent is None else as_chat(self.conversation.upto(m.parent), self.system)
        return self.shelf().fires_on(m.text, before, m.role, limit)

    def plan_bake(self, form: Form = "checkpoint") -> BakePlan:
        """What of the sliders can go into weights. Errors: UnsupportedError for a model elsewhere."""
        from steer.chat.baking_job import plan

        return plan(self._local("bake").model, self.profile("baked"), form)

    def _local(self, what: str) -> LocalVoice:
        if what not in self.voice.can:
            raise UnsupportedError(
                f"{self.voice.name}: its server does not offer that ({what}); open the page on the model itself"
            )
        return cast("LocalVoice", self.voice)

    @cached_property
    def _looks(self) -> Looks:
        from steer.chat.inside import Looks

        return Looks(self._local("inside"))

    @cached_property
    def _shelf(self) -> Shelf:
        from steer.chat.feature_search import Shelf

        return Shelf(self._local("features").model)

"""The chat behind one browser tab: talking (`steer.chat.talk`), comparing, looking inside, features, and baking.

The parts of `steer.page` draw a `Chat` and call its methods. What a server cannot do raises UnsupportedError.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from steer.chat.conversation import Message
from steer.chat.talk import Talk, said
from steer.chat.writer import Task, as_chat
from steer.core.profile import Profile
from steer.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from steer.chat.comparison import Comparison, Side
    from steer.chat.feature_index import FeatureIndex, TopActivation
    from steer.chat.jobs import BakePlan, Form
    from steer.chat.local import LocalVoice
    from steer.chat.readout import Looks, TokenReadout


class Chat(Talk):
    """One chat with everything that the page offers."""

    def warnings(self) -> list[str]:
        """Return warnings: sites that are moved too far, sliders beyond a calibrated range or unused by the reply."""
        last = self.conversation.last
        receipt = last.written.receipt if last is not None and last.written is not None else None
        return [*self.board.warnings(), *((receipt or {}).get("warnings") or [])]

    def side(self, kind: Literal["plain", "now"]) -> Side:
        """Return a setting to compare: `plain` without sliders, `now` with this chat's sliders as they are."""
        from steer.chat.comparison import plain_side, slider_side

        return plain_side() if kind == "plain" else slider_side(self.sliders, self.sampler)

    def side_of(self, profile: Profile) -> Side:
        """Return a profile as a setting to compare. Errors: SteerError."""
        from steer.chat.comparison import profile_side

        return profile_side(self._local("duel").model, profile)

    def duel(self, text: str | None, first: Side, second: Side, *, blind: bool = False) -> Comparison:
        """Begin to write two replies to a message, one under each setting. The chat does not change.

        `text`: the message; None for the chat's last user message. `blind`: hide which reply has which setting.
        Errors: UsageError if there is no message; UnsupportedError for a model behind a server.
        """
        from steer.chat.comparison import Comparison

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
        return Comparison(voice, task, (first, second), blind=blind)

    def take(self, duel: Comparison, place: Literal["left", "right"]) -> Message:
        """Add one reply of a comparison to the chat, and the message before it if the chat does not end with it."""
        self.stop()
        duel.stop()
        text, written = duel.written(place)
        asked = duel.task.messages[-1]["content"]
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

    def readable(self) -> list[tuple[str, str]]:
        """Return (name, title) of every slider whose target can be read on the tokens of a reply."""
        return [(r.name, r.title) for r in self.board.rows()]

    def inside(self, message: int, names: list[str]) -> TokenReadout:
        """Read traits and features on every token of a reply, once under the sliders it had and once without any.

        `message`: the reply's id. `names`: sliders, as in `readable`.
        Errors: UsageError for a message that is not a finished reply; UnsupportedError for a model behind a server.
        """
        looks = self._looks
        m = self.conversation[message]
        if m.role != "assistant" or m.parent is None or not m.text or message == self._being_written():
            raise UsageError("inside: expected a reply that is written, found another message; choose a reply")
        return looks.at(m, as_chat(self.conversation.upto(m.parent), self.system), self.sampler, names)

    def shelf(self) -> FeatureIndex:
        """Return the features of this model's dictionaries. Errors: UnsupportedError for a model behind a server."""
        return self._shelf

    def fires_on(self, message: int, limit: int = 12) -> list[TopActivation]:
        """Return the features that fire most on a message, which is read in its chat. Errors: as `shelf`."""
        m = self.conversation[message]
        before = () if m.parent is None else as_chat(self.conversation.upto(m.parent), self.system)
        return self.shelf().fires_on(m.text, before, m.role, limit)

    def plan_bake(self, form: Form = "checkpoint") -> BakePlan:
        """Return which sliders can be baked into weights. Errors: UnsupportedError for a model behind a server."""
        from steer.chat.jobs import plan

        return plan(self._local("bake").model, self.profile("baked"), form)

    def _local(self, what: str) -> LocalVoice:
        if what not in self.voice.can:
            raise UnsupportedError(
                f"{self.voice.name}: its server does not offer that ({what}); open the page on the model itself"
            )
        return cast("LocalVoice", self.voice)

    @cached_property
    def _looks(self) -> Looks:
        from steer.chat.readout import Looks

        return Looks(self._local("inside"))

    @cached_property
    def _shelf(self) -> FeatureIndex:
        from steer.chat.feature_index import FeatureIndex

        return FeatureIndex(self._local("features").model)

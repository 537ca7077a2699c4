"""Replies of a model that runs here: a token at a time, under the sliders as they stand at that token."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steer.chat.conversation import Ending, Stretch
from steer.chat.turns import turns_of
from steer.chat.voice import Task
from steer.live.decode import decode
from steer.live.memory import Memory
from steer.live.profiles import as_profile, use
from steer.live.receipts import Tally
from steer.live.sampling import BAN
from steer.live.serve.engine import Token
from steer.live.serve.texts import ReplyText
from steer.live.sliders import Sliders
from steer.live.window import fit
from steer.values.edit import Edit
from steer.values.profile import PlannedWhen, Profile, ProfileSlider
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


class LocalVoice:
    """A model in this process, with sliders and a memory of one chat's own; many chats may share the model."""

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
        self.memory = Memory()
        self.turns = turns_of(model)

    @property
    def edit(self) -> Edit | None:
        """What the next token goes by."""
        return self.sliders.current if self.on else None

    @property
    def context(self) -> int:
        """Tokens that the model can read, the reply's among them."""
        return self.model.context

    def draft(self, task: Task) -> LocalDraft:
        """See `Voice`."""
        return LocalDraft(self, task)

    def profile(self, name: str, sampler: Sampler) -> Profile:
        """See `Voice`."""
        return as_profile(name, self.sliders, sampler)

    def use(self, profile: Profile) -> None:
        """See `Voice`."""
        use(self.sliders, profile)

    def reread(self) -> None:
        """See `Voice`."""
        self.memory.forget()

    def close(self) -> None:
        """See `Voice`."""
        self.memory.forget()

    def prompt(self, task: Task, begun: int) -> list[int]:
        """The prompt of a task whose reply has begun with so many tokens; what is too old for the context is left out.

        Errors: as `SteeredModel.prompt_ids`; UsageError for a message that is too long.
        """
        fitted = fit(
            task.messages, self.model.prompt_ids, self.context, task.sampler.max_new_tokens, begun, self.left_out
        )
        self.left_out = fitted.left_out
        return fitted.ids

    def begun(self, task: Task) -> list[int]:
        """The tokens that a task's reply begins with."""
        return list(task.ids) or self.model.encode(task.text)


class LocalDraft:
    """A reply of a LocalVoice."""

    ending: Ending = "length"

    def __init__(self, voice: LocalVoice, task: Task) -> None:
        begun = voice.begun(task) if task.text else []
        prompt = voice.prompt(task, len(begun))
        self.text = task.text
        self.tokens = 0
        self._voice, self._sampler, self._ids = voice, task.sampler, begun
        self._stretches: list[Stretch] = []
        self._tally = Tally()
        # As a text of its own, as the tokens decode: the first word of a reply has no space before it.
        self._pieces = ReplyText(voice.model.tokenizer, begun)
        room = voice.context - len(prompt) - len(begun)
        self._steps = self._decode(prompt, replace(task.sampler, max_new_tokens=self._length(room)), task.nudge)

    @property
    def ids(self) -> list[int]:
        """See `Draft`."""
        return self._ids

    @property
    def stretches(self) -> list[Stretch]:
        """See `Draft`."""
        return self._stretches

    def step(self) -> bool:
        """See `Draft`."""
        voice = self._voice
        steering = voice.model.steering
        with voice.turns.turn():
            edit = voice.edit
            if not self._stretches or edit is not self._stretches[-1].edit:
                self._stretches.append(Stretch(len(self._ids), named(edit, self._sampler), edit))
            with steering.alone([edit]):
                token = next(self._steps, None)
        end = token is not None and token in voice.model.end_token_ids
        if token is None or end:
            self.ending = "ended" if end else "length"
            # A reply that may go on keeps the half of a character to itself, for the half that may come.
            self.text += self._pieces.end().text if end else ""
            return False
        self._ids.append(token)
        self.tokens += 1
        self.text += self._pieces.add(Token(token, None, (), False)).text
        return True

    def close(self) -> None:
        """See `Draft`."""
        self._steps.close()

    def receipt(self) -> dict[str, Any]:
        """See `Draft`."""
        return self._tally.receipt().describe()

    def _length(self, room: int) -> int:
        return max(1, min(self._sampler.max_new_tokens, room))

    def _decode(self, prompt: list[int], sampler: Sampler, nudge: bool) -> Generator[int]:
        model, memory, text = self._voice.model, self._voice.memory, [*prompt, *self._ids]
        begun = len(self._ids)
        # A stream of its own, or what is added would begin with the draws that the reply began with.
        keys = [begun]
        if nudge:
            bans = tuple((t, BAN) for t in model.end_token_ids if t < len(model.tokenizer))
            others = tuple(b for b in sampler.logit_bias if b[0] not in model.end_token_ids)
            first = replace(sampler, max_new_tokens=1, logit_bias=(*others, *bans))
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
    """What an edit does, by the names of what it moves: cheap enough to be told between two tokens."""
    moves = edit.as_moves() if edit is not None else ()
    sliders = (ProfileSlider(m.target.name, m.amount, m.operation, PlannedWhen.of(m.when)) for m in moves)
    return Profile("then", sampler=sampler, preset=None, sliders=tuple(sliders))

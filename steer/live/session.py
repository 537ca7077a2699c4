"""One chat with a model: what was said, the sliders it goes by, and the next reply in pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from steer.live.memory import Memory
from steer.live.profiles import as_profile, use
from steer.live.receipts import Receipt, Tally
from steer.live.sliders import Sliders
from steer.live.window import fit
from steer.values.cards import Card
from steer.values.profile import Profile
from steer.values.sampler import CHAT, Sampler

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


class Session:
    """A conversation with sliders of its own, on a model that others may be talking to as well.

    Every piece of a reply is made with this session's amounts applied, under the model's lock, and the lock
    is free between two pieces: sessions in several threads take turns and never feel each other's sliders.

    What was read of the chat is kept from reply to reply, as it was under the sliders of its time: a slider that moves
    acts from here on. `reread` has the whole chat read again under the sliders of now.
    """

    def __init__(
        self,
        model: SteeredModel,
        *,
        system: str | None = None,
        sampler: Sampler = CHAT,
        sliders: Sliders | None = None,
    ) -> None:
        """`sliders`: those of the model itself, for the only one who talks to it."""
        self.model, self.system, self.sampler = model, system, sampler
        self.sliders = Sliders(model, live=False) if sliders is None else sliders
        self.messages: list[dict[str, str]] = []
        """User and assistant in turns, beginning with the user; a character may speak first."""
        self.receipts: list[Receipt] = []
        """What the sliders did to each reply, the latest last."""
        self.memory = Memory()
        self.left_out = 0
        """How many of the oldest messages the last reply was written without, as the context was full."""

    def reply(self, text: str) -> Generator[str]:
        """The reply to the next message, in pieces.

        A reply that is stopped midway (the iterator closed, Ctrl-C) is kept as far as it came; a message that
        got none is taken back, as chat templates want the roles in turns. A chat that has grown longer than the
        model's context is read without its oldest messages.
        Errors: those of `SteeredModel.prompt_ids`; UsageError for a message that is too long by itself.
        """
        # Each turn its own seed, or every reply would begin with the same draws.
        sampler = replace(self.sampler, seed=self.sampler.seed + len(self.messages) // 2)
        self.messages.append({"role": "user", "content": text})
        said, tally, left_out = "", Tally(), self.left_out
        try:
            pieces = self.model.stream_ids(self._prompt(sampler.max_new_tokens), sampler, tally, self.memory)
            while (piece := self._next(pieces)) is not None:
                said += piece
                yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
                receipt = tally.receipt()
                if self.left_out > left_out:
                    cut = (
                        f"the context of {self.model.context:,} tokens is full: the chat is read without its first "
                        f"{self.left_out} messages from here on"
                    )
                    receipt = replace(receipt, notes=(*receipt.notes, cut))
                self.receipts.append(receipt)
            else:
                self.messages.pop()

    def play(self, card: Card) -> None:
        """Begin anew as a character: its prompt, its first message, and the profile that its card may bring.

        What the card wants said after the chat stands at the end of the system prompt, as not every chat template
        takes a system message elsewhere. Errors: as `use`.
        """
        if card.profile is not None:
            self.use(card.profile)
        self.clear()
        self.system = "\n\n".join(t for t in (card.system_prompt, card.post_history_instructions) if t)
        if card.first_message:
            self.messages.append({"role": "assistant", "content": card.first_message})

    def use(self, profile: Profile) -> None:
        """Go by a profile: its sliders and no others, and its sampler, at this session's length and seed of replies.

        Errors: UsageError for a slider that this checkpoint does not have.
        """
        use(self.sliders, profile)
        mine = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=mine.max_new_tokens, seed=mine.seed)

    def profile(self, name: str) -> Profile:
        """The sliders and the sampler as they stand, to be saved."""
        return as_profile(name, self.sliders, self.sampler)

    def reread(self) -> None:
        """Have the whole chat read again under the sliders of now, before the next token; in the midst of a reply the
        words written so far stay. Without it a slider acts from here on, and what was read before it moved stays as it
        was then."""
        self.memory.forget()

    def warnings(self) -> list[str]:
        """What to know about the sliders: sites that are moved too far, and sliders that the last reply never met."""
        fired = self.receipts[-1].warnings if self.receipts else []
        return [*self.sliders.warnings(), *fired]

    def clear(self) -> None:
        """Forget what was said. The sliders stay."""
        self.messages.clear()
        self.receipts.clear()
        self.memory.forget()
        self.left_out = 0

    def _prompt(self, wanted: int) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        chat = (*system, *self.messages)
        fitted = fit(chat, self.model.prompt_ids, self.model.context, wanted, left_out=self.left_out)
        self.left_out = fitted.left_out
        return fitted.ids

    def _next(self, pieces: Iterator[str]) -> str | None:
        if self.sliders is self.model.sliders:
            return next(pieces, None)
        with self.model.steering.alone([self.sliders.current]):
            return next(pieces, None)

"""A chat that a script or the terminal runs: its messages, its sliders, and its replies piece by piece.

`Session` is the public class (`steer.Session`) and what `steer chat` runs. It shares `BaseChat` with the page's `Chat`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steer.chat.local import LocalBackend
from steer.chat.lore import Lore, with_lore
from steer.chat.voting import Thumb, keep_vote
from steer.chat.writer import Messages, PendingReply, ReplyBackend, Task
from steer.core.cards import Card
from steer.core.lorebook import Lorebook, Scan
from steer.core.profile import Profile
from steer.core.sampler import CHAT, Sampler
from steer.core.votes import Vote
from steer.errors import UsageError
from steer.model.sliders import Sliders
from steer.model.steering.receipts import Receipt

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


class BaseChat:
    """What every chat has: a backend that writes its replies, sliders, a system prompt and a sampler."""

    def __init__(self, backend: ReplyBackend, system: str | None = None, sampler: Sampler = CHAT) -> None:
        self.backend = backend
        self.system = system
        """The system prompt."""
        self.sampler = sampler
        """How tokens are drawn. Its seed is the seed of the first reply."""
        self.lore = Lore()
        """The lorebooks that are scanned before each reply."""
        self.scanned = Scan()
        """Which entries of the lorebooks were in the prompt of the last reply."""

    @property
    def left_out(self) -> int:
        """How many messages at the beginning of the chat did not fit into the model's context."""
        return self.backend.left_out

    @property
    def sliders(self) -> Any:
        """The backend's sliders: a mapping from name to amount."""
        return self.backend.sliders

    def use(self, profile: Profile) -> None:
        """Use a profile's sliders and no others, and its sampler, except for this chat's reply length and seed.

        Errors: SteerError for a slider that the model does not have; then nothing has changed.
        """
        self.backend.use(profile)
        current = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=current.max_new_tokens, seed=current.seed)

    def profile(self, name: str) -> Profile:
        """Return the current sliders and sampler as a profile that can be saved. Errors: UsageError."""
        return self.backend.profile(name, self.sampler)

    def play(self, card: Card) -> None:
        """Start a new chat with a character: its system prompt, first message and lorebook, and its card's profile.

        The card's post-history instructions are appended to the system prompt, because not every chat template accepts
        a system message after the chat. Errors: as `use`; then nothing has changed.
        """
        if card.profile is not None:
            self.use(card.profile)
        self.clear()
        self.system = "\n\n".join(t for t in (card.system_prompt, card.post_history_instructions) if t)
        self.lore = replace(self.lore, character=card.lorebook, macros=card.macros, sections=card.sections)

    def add_lorebook(self, book: Lorebook) -> None:
        """Scan another lorebook before each reply, besides the character's. A book of the same name is replaced."""
        others = tuple(b for b in self.lore.books if b.name != book.name)
        self.lore = replace(self.lore, books=(*others, book))

    def remove_lorebook(self, name: str) -> None:
        """Stop scanning a lorebook that was added."""
        self.lore = replace(self.lore, books=tuple(b for b in self.lore.books if b.name != name))

    def prompt(self, messages: Messages, seed: int, greeting: int | None) -> tuple[Messages, Scan]:
        """Return messages with the texts of the lorebooks for a reply with this seed; see `with_lore`."""
        return with_lore(self.lore, messages, self.backend, moment=seed, greeting=greeting)

    def reread(self) -> None:
        """Read the whole chat again under the current sliders, before the next token.

        The text of an unfinished reply stays. Without a call, a slider affects only tokens after its move, because the
        KV cache of earlier tokens was made under the earlier sliders.
        """
        self.backend.reread()

    def clear(self) -> None:
        """Start a new chat. The sliders and the lorebooks do not change."""
        self.backend.reread()
        self.backend.left_out = 0
        self.scanned = Scan()


class Session(BaseChat):
    """A conversation with its own sliders, on a model that other sessions may use at the same time.

    Every piece of a reply is made under the model's lock with this session's amounts applied, and the lock is released
    between two pieces. So sessions in several threads take turns, and none is affected by another's sliders.

    The KV cache of the chat is kept from reply to reply, so a slider that moves affects only the tokens that are read
    or written afterwards. `reread` drops the cache: the whole chat is then read again under the current sliders.

        session = steer.Session(steer.load("merged"), system="You are terse.")
        session.sliders["moralizing"] = -1
        print("".join(session.reply("My friend lied to me.")))
        print(session.receipts[-1].sliders)
    """

    def __init__(
        self,
        model: SteeredModel | ReplyBackend,
        *,
        system: str | None = None,
        sampler: Sampler = CHAT,
        sliders: Sliders | None = None,
    ) -> None:
        """`model`: a model, or a `RemoteBackend` for one behind a server. `system`: the system prompt. `sampler`: how
        tokens are drawn. `sliders`: `model.sliders`, if this session is to share the model's own sliders; by default
        the session has separate ones, none of which moves anything."""
        super().__init__(model if isinstance(model, ReplyBackend) else LocalBackend(model, sliders), system, sampler)
        self.model = model
        self.messages: list[dict[str, str]] = []
        """User and assistant messages in turns, beginning with the user, or with a character's first message."""
        self.receipts: list[Receipt] = []
        """What the sliders did to each reply, the latest last."""

    def reply(self, text: str) -> Generator[str]:
        """Send a message and yield the reply in pieces.

        If the reply is stopped midway (the generator is closed, or Ctrl-C), the text so far stays in the chat. If there
        is no text, the message is removed again, because chat templates require alternating roles. A chat longer than
        the model's context is read without its oldest messages.
        Errors: those of `SteeredModel.prompt_ids`; UsageError for a message that is too long by itself.
        """
        # Each turn has its own seed, or every reply would begin with the same draws.
        sampler = replace(self.sampler, seed=self.sampler.seed + len(self.messages) // 2)
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        draft: PendingReply | None = None
        written, more = "", True
        try:
            greeting = 0 if self.messages[0]["role"] == "assistant" else None
            messages, self.scanned = self.prompt((*system, *self.messages), sampler.seed, greeting)
            draft = self.backend.draft(Task(messages, sampler))
            while more:
                more = draft.step()
                piece, written = draft.text[len(written) :], draft.text
                if more or piece:
                    yield piece
            if rest := draft.rest():
                written += rest
                yield rest
        finally:
            if draft is not None:
                draft.close()
            if draft is not None and written:
                self.messages.append({"role": "assistant", "content": written})
                self.receipts.append(draft.receipt() or Receipt(draft.tokens))
            else:
                self.messages.pop()

    def rate(self, thumb: Thumb) -> Vote:
        """Keep a thumb up or down for the last reply, and return the vote.

        Errors: UsageError if there is no reply; SteerError if the vote cannot be stored.
        """
        if not self.receipts or not self.messages:
            raise UsageError("thumb: expected a reply, found none; say something first")
        system = [{"role": "system", "content": self.system}] if self.system else []
        *before, reply = self.messages
        return keep_vote(self.backend.name, [*system, *before], [(reply["content"], "", None)], thumb)

    def play(self, card: Card) -> None:
        super().play(card)
        if card.first_message:
            self.messages.append({"role": "assistant", "content": card.first_message})

    def warnings(self) -> list[str]:
        """Return warnings: sites that are moved too far, and sliders that never changed a token of the last reply."""
        fired = self.receipts[-1].warnings if self.receipts else []
        return [*self.sliders.warnings(), *fired, *self.scanned.warnings]

    def clear(self) -> None:
        """Remove all messages and receipts. The sliders do not change."""
        super().clear()
        self.messages.clear()
        self.receipts.clear()

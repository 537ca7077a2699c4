"""A chat with a model in this process: its messages, its sliders, and what is left out when the context is full.

`Session` is the public class (`steer.Session`) and what `steer chat` runs. `fit` makes prompts for the page as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steer.core.cards import Card
from steer.core.profile import Profile
from steer.core.sampler import CHAT, Sampler
from steer.errors import UsageError
from steer.model.kv_cache import PrefixCache
from steer.model.profiles import as_profile, use
from steer.model.sliders import Sliders
from steer.model.steering.receipts import Receipt, Tally

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


class Session:
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
        model: SteeredModel,
        *,
        system: str | None = None,
        sampler: Sampler = CHAT,
        sliders: Sliders | None = None,
    ) -> None:
        """`system`: the system prompt. `sampler`: how tokens are drawn. `sliders`: `model.sliders`, if this session is
        to share the model's own sliders; by default the session has separate ones, none of which moves anything."""
        self.model, self.system, self.sampler = model, system, sampler
        self.sliders = Sliders(model, live=False) if sliders is None else sliders
        self.messages: list[dict[str, str]] = []
        """User and assistant messages in turns, beginning with the user, or with a character's first message."""
        self.receipts: list[Receipt] = []
        """What the sliders did to each reply, the latest last."""
        self.memory = PrefixCache()
        self.left_out = 0
        """How many of the oldest messages were left out for the last reply because the context was full."""

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
        reply_text, tally, left_out = "", Tally(), self.left_out
        try:
            pieces = self.model.stream_ids(self._prompt(sampler.max_new_tokens), sampler, tally, self.memory)
            while (piece := self._next(pieces)) is not None:
                reply_text += piece
                yield piece
        finally:
            if reply_text:
                self.messages.append({"role": "assistant", "content": reply_text})
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
        """Start a new chat with a character: its system prompt, its first message, and its card's profile, if any.

        The card's post-history instructions are appended to the system prompt, because not every chat template accepts
        a system message after the chat. Errors: as `use`.
        """
        if card.profile is not None:
            self.use(card.profile)
        self.clear()
        self.system = "\n\n".join(t for t in (card.system_prompt, card.post_history_instructions) if t)
        if card.first_message:
            self.messages.append({"role": "assistant", "content": card.first_message})

    def use(self, profile: Profile) -> None:
        """Use a profile's sliders and no others, and its sampler, except for this session's reply length and seed.

        Errors: UsageError for a slider that this checkpoint does not have.
        """
        use(self.sliders, profile)
        current = self.sampler
        self.sampler = replace(profile.sampler, max_new_tokens=current.max_new_tokens, seed=current.seed)

    def profile(self, name: str) -> Profile:
        """Return the current sliders and sampler as a profile that can be saved."""
        return as_profile(name, self.sliders, self.sampler)

    def reread(self) -> None:
        """Read the whole chat again under the current sliders, before the next token.

        The text of an unfinished reply stays. Without a call, a slider affects only tokens after its move, because the
        KV cache of earlier tokens was made under the earlier sliders.
        """
        self.memory.forget()

    def warnings(self) -> list[str]:
        """Return warnings: sites that are moved too far, and sliders that never changed a token of the last reply."""
        fired = self.receipts[-1].warnings if self.receipts else []
        return [*self.sliders.warnings(), *fired]

    def clear(self) -> None:
        """Remove all messages and receipts. The sliders do not change."""
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


FILLED = 0.75
"""Share of the context to which a chat is shortened once it is too long. This frees more than the next reply needs, so
that messages are not dropped, and the chat read again, at every turn."""
ROOM = 0.25
"""Largest share of the context that is reserved for a reply; a longer reply gets whatever is left."""

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Fitted:
    """A chat that fits into the context."""

    ids: list[int]
    """Token ids of the prompt."""
    left_out: int
    """How many messages were removed from the beginning; the system prompt stays."""
    room: int
    """Tokens of the context that are left for the reply."""


def fit(
    messages: Messages,
    count: Callable[[Messages], list[int]],
    context: int,
    wanted: int,
    begun: int = 0,
    left_out: int = 0,
) -> Fitted:
    """Return the prompt of a chat, without its oldest messages if it would not fit together with the reply.

    `count`: makes a prompt's token ids from messages. `context`: tokens that the model can read. `wanted`: tokens that
    the reply may have. `begun`: tokens of the reply that exist already. `left_out`: how many messages were left out
    last time; the same are left out again if that is enough, because the KV cache was made without them.
    Errors: UsageError if the last message alone is too long.
    """
    head = messages[:1] if messages and messages[0]["role"] == "system" else ()
    rest = messages[len(head) :]
    promised = min(wanted, int(ROOM * context))

    def tried(cut: int, most: float) -> Fitted | None:
        ids = count((*head, *rest[cut:]))
        room = context - len(ids) - begun
        return Fitted(ids, cut, room) if len(ids) + begun <= most and room >= 1 else None

    most = context - promised
    starts = _starts(rest)
    for cut, limit in ((0, most), (left_out if left_out in starts else 0, most)):
        if found := tried(cut, limit):
            return found
    for cut in starts:
        if found := tried(cut, min(most, FILLED * context)):
            return found
    if found := tried(starts[-1], context - 1):
        return found
    found = len(count((*head, *rest[starts[-1] :]))) + begun
    raise UsageError(
        f"the last message: expected at most {context - 1} tokens with the system prompt and the reply so far, as much "
        f"as the model can read, found {found}; shorten it"
    )


def _starts(messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the indices at which a shortened chat may begin: 0, and every user message (templates need it first)."""
    return [0, *(i for i, m in enumerate(messages) if i and m["role"] == "user")]

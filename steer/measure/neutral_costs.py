"""What an edit costs where it should cost nothing: on neutral chat and plain prose that finding never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steer.live.model import Message, SteeredModel
from steer.measure.fluency import Text, mean_repetition, plain_paragraphs, row_costs
from steer.values.edit import Edit
from steer.values.sampler import Sampler
from steer.values.trait import NeutralPrompts

PROMPTS = 24
"""The last so many of the held-out neutral prompts are answered."""
TEXTS, TEXT_TOKENS = 12, 32
"""How many of the untouched replies divergences are taken on, and how many tokens of each text."""
PASSAGES = 6
"""Passages of plain prose beside them."""
REPLY_TOKENS = 48
"""Length of the replies that repetition is told from."""


class NeutralCosts:
    """The untouched model's replies to held-out neutral prompts, passages of prose, and edits measured on both.

    Making one has the replies written, with `sampler`. `on_tokens` is told how many more tokens went through the model.
    """

    def __init__(self, model: SteeredModel, sampler: Sampler, on_tokens: Callable[[int], None] | None = None) -> None:
        self.model, self._on_tokens = model, on_tokens
        self.sampler = replace(sampler, max_new_tokens=REPLY_TOKENS)
        self.tokens = 0
        """That went through the model so far, prompts included."""
        self.chats: list[list[Message]] = [
            [{"role": "user", "content": p}] for p in NeutralPrompts.load().held_out[-PROMPTS:]
        ]
        self.prompts = [model.prompt_ids(c) for c in self.chats]
        untouched = self._replies([None])
        self.repetition = mean_repetition(untouched)
        """Of the untouched replies."""
        # What stands before the text, and the text, as token ids.
        self.replies = [(p, r[:TEXT_TOKENS]) for p, r in zip(self.prompts, untouched, strict=True) if r][-TEXTS:]
        # The half that searches for bakes do not see.
        passages = [model.encode(p, frame=True)[: TEXT_TOKENS + 1] for p in plain_paragraphs()[1][:PASSAGES]]
        self.prose = [(ids[:1], ids[1:]) for ids in passages]

    def repetitions(self, edits: Sequence[Edit | None]) -> list[float]:
        """The mean repetition of replies under each edit. Nothing is written for one that moves nothing."""
        moving = [e for e in edits if e is not None]
        made, per = self._replies(moving), len(self.chats)
        told = {id(e): mean_repetition(made[i * per : (i + 1) * per]) for i, e in enumerate(moving)}
        return [self.repetition if e is None else told[id(e)] for e in edits]

    def divergences(self, edits: Sequence[Edit | None]) -> list[tuple[float, float]]:
        """KL(untouched || edited) under each edit, nats per token of chat and of prose; inf where a logit is none."""
        moving = [e for e in edits if e is not None]
        costs = zip(self._kl(self.replies, moving), self._kl(self.prose, moving), strict=True)
        told = {id(e): both for e, both in zip(moving, costs, strict=True)}
        return [(0.0, 0.0) if e is None else told[id(e)] for e in edits]

    def _kl(self, texts: Sequence[Text], edits: Sequence[Edit]) -> list[float]:
        return [divergence for divergence, _ in row_costs(self.model, texts, edits, self._count)[1:]]

    def _replies(self, edits: Sequence[Edit | None]) -> list[list[int]]:
        """Replies to every prompt under each edit; a prompt draws the same random numbers under all of them."""
        self._count(len(edits) * sum(map(len, self.prompts)))
        return self.model.replies(
            self.chats * len(edits),
            self.sampler,
            [e for e in edits for _ in self.chats],
            keys=list(range(len(self.chats))) * len(edits),
            on_tokens=self._count,
        )

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._on_tokens is not None:
            self._on_tokens(tokens)

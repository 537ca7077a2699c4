"""The cost of an edit on text where it should change nothing: neutral chat and plain prose that `steer find` never saw.

`calibrate` measures every amount of a slider with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.core.trait import NeutralPrompts
from steer.measure.fluency import Text, mean_repetition, plain_paragraphs, row_costs
from steer.model.loaded import Message
from steer.model.steered import SteeredModel

PROMPTS = 24
"""Number of prompts answered: the last ones of the held-out neutral prompts."""
TEXTS, TEXT_TOKENS = 12, 32
"""Number of untouched replies that KL is computed on, and number of tokens of each reply or passage."""
PASSAGES = 6
"""Number of passages of plain prose that KL is computed on."""
REPLY_TOKENS = 48
"""Length of the replies that repetition is measured on, tokens."""


class NeutralCosts:
    """Measures edits on the untouched model's replies to held-out neutral prompts and on passages of prose.

    The constructor generates the replies with `sampler`. `on_tokens` is called with the number of tokens that went
    through the model since its last call.
    """

    def __init__(self, model: SteeredModel, sampler: Sampler, on_tokens: Callable[[int], None] | None = None) -> None:
        self.model, self._on_tokens = model, on_tokens
        self.sampler = replace(sampler, max_new_tokens=REPLY_TOKENS)
        self.tokens = 0
        """Tokens that went through the model so far, prompts included."""
        self.chats: list[list[Message]] = [
            [{"role": "user", "content": p}] for p in NeutralPrompts.load().held_out[-PROMPTS:]
        ]
        self.prompts = [model.prompt_ids(c) for c in self.chats]
        untouched = self._replies([None])
        self.repetition = mean_repetition(untouched)
        """Mean repetition of the untouched replies."""
        # (context, text) as token ids.
        self.replies = [(p, r[:TEXT_TOKENS]) for p, r in zip(self.prompts, untouched, strict=True) if r][-TEXTS:]
        # The second half of the prose: searches for bakes use the first.
        passages = [model.encode(p, frame=True)[: TEXT_TOKENS + 1] for p in plain_paragraphs()[1][:PASSAGES]]
        self.prose = [(ids[:1], ids[1:]) for ids in passages]

    def repetitions(self, edits: Sequence[Edit | None]) -> list[float]:
        """The mean repetition of replies under each edit. For None that of the untouched replies is returned."""
        moving = [e for e in edits if e is not None]
        made, per = self._replies(moving), len(self.chats)
        measured = {id(e): mean_repetition(made[i * per : (i + 1) * per]) for i, e in enumerate(moving)}
        return [self.repetition if e is None else measured[id(e)] for e in edits]

    def divergences(self, edits: Sequence[Edit | None]) -> list[tuple[float, float]]:
        """KL(untouched || edited) under each edit: (on chat, on prose), nats per token; inf where a logit is not a
        number, and 0 for None."""
        moving = [e for e in edits if e is not None]
        costs = zip(self._kl(self.replies, moving), self._kl(self.prose, moving), strict=True)
        measured = {id(e): both for e, both in zip(moving, costs, strict=True)}
        return [(0.0, 0.0) if e is None else measured[id(e)] for e in edits]

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

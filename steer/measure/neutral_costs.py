"""What an edit costs where it should cost nothing: on neutral chat and plain prose that finding never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from steer.live.model import Message, SteeredModel
from steer.measure.fluency import mean_repetition
from steer.measure.search import plain_paragraphs
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
        passages = [model.tokenizer(p).input_ids[: TEXT_TOKENS + 1] for p in plain_paragraphs()[1][:PASSAGES]]
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

    @torch.inference_mode()
    def _kl(self, texts: Sequence[tuple[list[int], list[int]]], edits: Sequence[Edit]) -> list[float]:
        """One pass a text, its rows the untouched model and every edit."""
        hf, sums = self.model.hf, [0.0] * len(edits)
        with self.model.steering.applied([None, *edits]):
            for before, text in texts:
                ids = torch.tensor([[*before, *text]], device=self.model.device).repeat(1 + len(edits), 1)
                hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, len(before) - 1 : -1]
                # A row at a time: the logits of all would be far larger than the model's activations.
                base = hf.lm_head(hidden[0]).float().log_softmax(-1)
                for i in range(len(edits)):
                    other = hf.lm_head(hidden[1 + i]).float().log_softmax(-1)
                    sums[i] += float((base.exp() * (base - other)).sum())
                self._count(ids.numel())
        count = max(1, sum(len(text) for _, text in texts))
        return [math.inf if math.isnan(s) else s / count for s in sums]

    def _replies(self, edits: Sequence[Edit | None]) -> list[list[int]]:
        """Replies to every prompt under each edit; a prompt draws the same random numbers under all of them."""
        self._count(len(edits) * sum(map(len, self.prompts)))
        return self.model.replies(
            self.chats * len(edits),
            self.sampler,
            [e for e in edits for _ in self.chats],
            keys=list(range(len(self.chats))) * len(edits),
            batch=96,
            on_tokens=self._count,
        )

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._on_tokens is not None:
            self._on_tokens(tokens)

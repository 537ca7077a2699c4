"""Edits tried on the live model: what each does to the trait, to traits that are to stay, and to neutral text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from steer.features.contrast import Reply
from steer.live.model import Message, SteeredModel
from steer.measure.fluency import mean_repetition, plain_paragraphs, row_costs
from steer.measure.scorer import Scorer
from steer.values.edit import Edit
from steer.values.sampler import MEASURE
from steer.values.trait import Trait

REPLY_TOKENS = 100
"""Length of the replies that are scored: a trait may show late in one."""
TOPICS = 20
"""Fit topics that every trial answers; the others are for those that come near to being chosen."""
NEUTRAL, NEUTRAL_TOKENS = 16, 48
"""Neutral replies that divergences are taken on, and how many tokens of each."""
PASSAGES, PASSAGE_TOKENS = 6, 64
"""Passages of plain prose that perplexity is taken on, and how many tokens of each."""
MOST_KL = 99.0
"""Nats per token; what is beyond it, or no number, is told as this."""


@dataclass(frozen=True)
class Outcome:
    """What an edit did on fit topics."""

    rate: float
    """Share of the replies that the text scorer calls the trait."""
    probability: float
    """The scorer's mean probability, smoother than the rate."""
    kl: float
    """KL(untouched || edited) on neutral replies, nats per token."""
    perplexity: float
    """Of plain prose."""
    repetition: float
    """Share of trigrams seen before in the same reply."""
    kept: dict[str, float] = field(default_factory=dict)
    """Trait that is to stay -> its rate on its own fit topics."""
    replies: int = 0
    """Replies to the trait's topics that the rate is a share of; to each kept trait's topics there are as many."""

    def as_json(self) -> dict[str, Any]:
        """For the study and the report."""
        return asdict(self)

    def with_more(self, other: Outcome) -> Outcome:
        """Both, their replies taken together."""
        share = other.replies / max(1, self.replies + other.replies)

        def mean(mine: float, theirs: float) -> float:
            return (1 - share) * mine + share * theirs

        return replace(
            self,
            rate=mean(self.rate, other.rate),
            probability=mean(self.probability, other.probability),
            repetition=mean(self.repetition, other.repetition),
            kept={name: mean(rate, other.kept[name]) for name, rate in self.kept.items()},
            replies=self.replies + other.replies,
        )


@dataclass(frozen=True)
class Scope:
    """How much each trial sees."""

    topics: int = TOPICS
    tokens: int = REPLY_TOKENS
    neutral: int = NEUTRAL
    seed: int = 0

    def parts(self, trait: Trait) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Fit topics for every trial, and the others; all again where there are no others."""
        topics = random.Random(self.seed).sample(trait.fit, len(trait.fit))
        first, rest = tuple(topics[: self.topics]), tuple(topics[self.topics :])
        return first, rest or first


class Bench:
    """Where edits are tried: all of them at once, every row of a batch under an edit of its own.

    `neutral` are the untouched model's replies to neutral prompts of the fit split. `on_tokens` is told how many tokens
    were written.
    """

    def __init__(
        self,
        model: SteeredModel,
        scorer: Scorer,
        kept: Mapping[str, Scorer],
        neutral: Sequence[Reply],
        scope: Scope = Scope(),
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.scorer, self.kept, self.scope = model, scorer, dict(kept), scope
        self.on_tokens = on_tokens
        cut = [r for r in neutral if r.ids][: scope.neutral]
        self.neutral = [(model.prompt_ids(r.chat), list(r.ids[:NEUTRAL_TOKENS])) for r in cut]
        passages = [model.encode(p, frame=True)[: PASSAGE_TOKENS + 1] for p in plain_paragraphs()[0][:PASSAGES]]
        self.prose = [(ids[:1], ids[1:]) for ids in passages]

    def tokens(self, edits: int) -> int:
        """Tokens that trials of so many edits write at most."""
        scorers = [self.scorer, *self.kept.values()]
        return edits * self.scope.tokens * sum(len(self.scope.parts(s.trait)[0]) for s in scorers)

    def outcomes(self, edits: Sequence[Edit | None], *, rest: bool = False) -> list[Outcome]:
        """What each edit does (None: nothing is done), on the topics of every trial or on the `rest` of them.

        A topic draws the same random numbers under every edit, so that differences are the edit's. The `rest` has no
        costs: those of the first part are as good.
        """
        scored = self._replies(edits, rest)
        moving = [e for e in edits if e is not None]
        kls, entropies = [0.0] * (1 + len(moving)), [0.0] * (1 + len(moving))
        if not rest:
            kls = [kl for kl, _ in row_costs(self.model, self.neutral, moving)]
            entropies = [entropy for _, entropy in row_costs(self.model, self.prose, moving)]
        # Row 0 of the costs is the untouched model.
        place = iter(range(1, 1 + len(moving)))
        out = []
        for edit, (probabilities, repetition, kept) in zip(edits, scored, strict=True):
            row = 0 if edit is None else next(place)
            out.append(
                Outcome(
                    rate=float((probabilities > 0.5).mean()),
                    probability=float(probabilities.mean()),
                    kl=min(kls[row], MOST_KL),
                    perplexity=math.exp(min(entropies[row], MOST_KL)),
                    repetition=repetition,
                    kept=kept,
                    replies=len(probabilities),
                )
            )
        return out

    def _replies(self, edits: Sequence[Edit | None], rest: bool) -> list[tuple[np.ndarray, float, dict[str, float]]]:
        """Under each edit: the scorer's probabilities, the mean repetition, the rate of every trait that is to stay."""
        scorers = [self.scorer, *self.kept.values()]
        topics = [self.scope.parts(s.trait)[rest] for s in scorers]
        chats: list[list[Message]] = [[{"role": "user", "content": t}] for part in topics for t in part]
        per = len(chats)
        sampler = replace(MEASURE, max_new_tokens=self.scope.tokens, seed=self.scope.seed + rest)
        made = self.model.replies(
            chats * len(edits),
            sampler,
            [e for e in edits for _ in chats],
            keys=list(range(per)) * len(edits),
            on_tokens=self.on_tokens,
        )
        out = []
        for start in range(0, len(made), per):
            replies, parts = made[start : start + per], []
            for part in topics:
                parts.append(replies[: len(part)])
                replies = replies[len(part) :]
            told = [s.probabilities([self.model.text(r) for r in p]) for s, p in zip(scorers, parts, strict=True)]
            kept = {name: float((p > 0.5).mean()) for name, p in zip(self.kept, told[1:], strict=True)}
            out.append((told[0], mean_repetition(parts[0]), kept))
        return out

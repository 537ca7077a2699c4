"""The trials of a search: edits run as hooks on the live model, many per batch, and measured.

Each trial measures the trait to remove, the traits that are to stay, and the cost on neutral text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import Trait
from steer.measure.contrast import Reply
from steer.measure.fluency import mean_repetition, plain_paragraphs, row_costs
from steer.measure.scorer import Scorer
from steer.model.loaded import Message
from steer.model.steered import SteeredModel

REPLY_TOKENS = 100
"""Length of the replies that are scored, tokens; a trait may show late in a reply."""
TOPICS = 20
"""Fit topics that every trial answers; only the best trials answer the others."""
NEUTRAL, NEUTRAL_TOKENS = 16, 48
"""Number of neutral replies that KL is computed on, and tokens of each."""
PASSAGES, PASSAGE_TOKENS = 6, 64
"""Number of passages of plain prose that perplexity is computed on, and tokens of each."""
MOST_KL = 99.0
"""Nats per token; a larger value, or one that is not a number, is reported as this."""


@dataclass(frozen=True)
class Outcome:
    """The measurements of one edit on fit topics."""

    rate: float
    """Share of the replies that the text scorer calls the trait."""
    probability: float
    """The scorer's mean probability, smoother than the rate."""
    kl: float
    """KL(untouched || edited) on neutral replies, nats per token."""
    perplexity: float
    """Perplexity of plain prose under the edit."""
    repetition: float
    """Share of trigrams seen before in the same reply."""
    kept: dict[str, float] = field(default_factory=dict)
    """Per trait that is to stay: its rate on the trait's own fit topics."""
    replies: int = 0
    """Number of replies that `rate` is computed over; as many are generated for each trait that is to stay."""

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON, for the study and the report."""
        return asdict(self)

    def with_more(self, other: Outcome) -> Outcome:
        """The outcome over the replies of both. KL and perplexity are those of this one."""
        share = other.replies / max(1, self.replies + other.replies)

        def mean(first: float, second: float) -> float:
            return (1 - share) * first + share * second

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
    """How many topics, tokens and neutral replies each trial uses."""

    topics: int = TOPICS
    """Fit topics that every trial answers."""
    tokens: int = REPLY_TOKENS
    """Length of the scored replies, tokens."""
    neutral: int = NEUTRAL
    """Neutral replies that KL is computed on."""
    seed: int = 0
    """Seed of sampling and of the choice of topics."""

    def parts(self, trait: Trait) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(fit topics for every trial, the other fit topics). If no others are left, the second is the first."""
        topics = random.Random(self.seed).sample(trait.fit, len(trait.fit))
        first, rest = tuple(topics[: self.topics]), tuple(topics[self.topics :])
        return first, rest or first


class Bench:
    """Runs edits on the live model and measures them, all in one batch in which each row has its own edit.

    `kept` has a scorer per trait that is to stay. `neutral` are the untouched model's replies to neutral prompts of the
    fit split. `on_tokens` is called with the number of tokens written since its last call.
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
        """Largest number of tokens that trials of this many edits write."""
        scorers = [self.scorer, *self.kept.values()]
        return edits * self.scope.tokens * sum(len(self.scope.parts(s.trait)[0]) for s in scorers)

    def outcomes(self, edits: Sequence[Edit | None], *, rest: bool = False) -> list[Outcome]:
        """The outcome of each edit (None: the untouched model), on the topics that every trial uses, or with `rest` on
        the other fit topics.

        A topic draws the same random numbers under every edit, so that differences come from the edit. With `rest` the
        costs are not measured: neutral text is the same for all topics.
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
        """Per edit: (the scorer's probabilities, the mean repetition, the rate of each trait that is to stay)."""
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
            scored = [s.probabilities([self.model.text(r) for r in p]) for s, p in zip(scorers, parts, strict=True)]
            kept = {name: float((p > 0.5).mean()) for name, p in zip(self.kept, scored[1:], strict=True)}
            out.append((scored[0], mean_repetition(parts[0]), kept))
        return out

"""Checkpoints as they were written, on topics and text that no search saw, with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

from steer.live.model import Message, SteeredModel, load
from steer.measure.dose import neutral_replies
from steer.measure.fluency import Reference, plain_paragraphs, repetition, text_entropies
from steer.measure.scorer import Scorer
from steer.measure.search.trials import NEUTRAL_TOKENS, REPLY_TOKENS
from steer.values.sampler import MEASURE
from steer.values.trait import NeutralPrompts
from steer.weights.certify import ADAPTER

PROMPTS = 24
"""Held-out neutral prompts that divergences are taken on."""
SAMPLES = 2
"""Replies to each held-out topic."""
RESAMPLES = 9999
LEVEL = 0.95
Numbers = Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Sample:
    """What one checkpoint was seen to do: a number for each topic, neutral reply or passage, which are what intervals
    resample."""

    shows: Numbers
    """Share of a topic's replies that the text scorer calls the trait."""
    probability: Numbers
    """The scorer's mean probability of a topic's replies."""
    repetition: Numbers
    """Mean share of repeated trigrams in a topic's replies."""
    kl: Numbers
    """KL(source || checkpoint) over each of the source's neutral replies, nats."""
    lengths: Numbers
    """Their tokens."""
    entropy: Numbers
    """Cross-entropy of each passage of plain prose, nats."""
    words: Numbers
    """Its tokens."""
    kept: dict[str, Numbers]
    """Trait that is to stay -> share of each of its topics' replies that show it."""

    def as_json(self) -> dict[str, Any]:
        """Every figure as {value, low, high}: the ends of its 95 % bootstrap interval."""
        return {
            "rate": mean_interval(self.shows),
            "probability": mean_interval(self.probability),
            "repetition": mean_interval(self.repetition),
            "kl": ratio_interval(self.kl, self.lengths),
            "perplexity": {k: float(np.exp(v)) for k, v in ratio_interval(self.entropy, self.words).items()},
            "kept": {name: mean_interval(shows) for name, shows in self.kept.items()},
        }


class HeldOut:
    """Held-out topics, neutral prompts and prose, and what the source says to them."""

    def __init__(
        self,
        source: SteeredModel,
        scorer: Scorer,
        kept: Mapping[str, Scorer],
        *,
        samples: int = SAMPLES,
        tokens: int = REPLY_TOKENS,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        """Has the source write its replies to neutral prompts. `on_tokens` is told how many tokens are written."""
        self.scorer, self.kept, self.samples, self.on_tokens = scorer, dict(kept), samples, on_tokens
        self.sampler = replace(MEASURE, max_new_tokens=tokens)
        prompts = NeutralPrompts.load().held_out[:PROMPTS]
        replies = neutral_replies(source, prompts, tokens=NEUTRAL_TOKENS, on_tokens=on_tokens)
        self.reference = Reference.of(source, replies)

    @property
    def tokens(self) -> int:
        """Written at most to measure one checkpoint."""
        topics = sum(len(s.trait.held_out) for s in (self.scorer, *self.kept.values()))
        return topics * self.samples * self.sampler.max_new_tokens

    def measure(self, model: SteeredModel) -> Sample:
        """One checkpoint, the source too. A topic draws the same random numbers on each."""
        scorers = [self.scorer, *self.kept.values()]
        chats: list[list[Message]] = [
            [{"role": "user", "content": t}] for s in scorers for t in s.trait.held_out for _ in range(self.samples)
        ]
        replies = model.replies(chats, self.sampler, on_tokens=self.on_tokens)
        told: list[Numbers] = []
        first = replies[: len(self.scorer.trait.held_out) * self.samples]
        for s in scorers:
            count = len(s.trait.held_out) * self.samples
            told.append(s.probabilities([model.text(r) for r in replies[:count]]))
            replies = replies[count:]
        entropy, words = text_entropies(model, plain_paragraphs()[1])
        return Sample(
            shows=self._by_topic(told[0] > 0.5),
            probability=self._by_topic(told[0]),
            repetition=self._by_topic(np.array([repetition(r) for r in first])),
            kl=self.reference.kl_sums(model),
            lengths=self.reference.lengths,
            entropy=entropy,
            words=words,
            kept={name: self._by_topic(p > 0.5) for name, p in zip(self.kept, told[1:], strict=True)},
        )

    def _by_topic(self, values: Any) -> Numbers:
        return np.asarray(values, float).reshape(-1, self.samples).mean(1)


def compared(untouched: Sample, unsearched: Sample, searched: Sample) -> dict[str, Any]:
    """All three with their intervals; what the search saved, as shares of the unsearched bake's KL and rate moved."""
    return {
        "untouched": untouched.as_json(),
        "unsearched": unsearched.as_json(),
        "searched": searched.as_json(),
        "kl_of_unsearched": ratio_interval(searched.kl, unsearched.kl),
        "rate_above_unsearched": mean_interval(searched.shows - unsearched.shows),
    }


def mean_interval(values: Numbers) -> dict[str, float]:
    """A mean with the ends of its bootstrap interval."""
    return _interval((values,), lambda x, axis=-1: x.mean(axis))


def ratio_interval(above: Numbers, below: Numbers) -> dict[str, float]:
    """A ratio of sums with the ends of its bootstrap interval; what is above and below is resampled together."""
    return _interval((above, below), lambda x, y, axis=-1: x.sum(axis) / np.maximum(y.sum(axis), 1e-12))


def _interval(data: Sequence[Numbers], statistic: Callable[..., Any]) -> dict[str, float]:
    value = float(statistic(*data))
    if len(data[0]) < 2:
        return {"value": value, "low": value, "high": value}
    # By percentiles: the other methods have no answer where all values are equal, as rates of zero are.
    found = bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def load_exported(place: Path, source: Path) -> SteeredModel:
    """What a bake wrote, as others run it: a checkpoint through transformers, an adapter through peft on its source,
    not merged into it."""
    if not (place / ADAPTER).is_file():
        return load(place)
    from peft import PeftModel

    model = load(source)
    with warnings.catch_warnings():
        # That such an adapter cannot be merged, and what merging would do to a tied head: it is not merged.
        warnings.simplefilter("ignore", UserWarning)
        # peft changes the modules in place: the model that runs is the same one.
        PeftModel.from_pretrained(model.hf, str(place)).eval()
    return model

"""The final measurement of a search: baked checkpoints, loaded from disk, on held-out topics and text.

Every figure has a bootstrap interval. No trial of the search used these topics or texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

from steer.baking.certificate import ADAPTER
from steer.core.sampler import MEASURE
from steer.core.trait import NeutralPrompts
from steer.measure.dose import neutral_replies
from steer.measure.fluency import Reference, plain_paragraphs, repetition, text_entropies
from steer.measure.scorer import Scorer
from steer.measure.search.trials import NEUTRAL_TOKENS, REPLY_TOKENS
from steer.model.loaded import Message
from steer.model.steered import SteeredModel, load

PROMPTS = 24
"""Number of held-out neutral prompts that KL is computed on."""
SAMPLES = 2
"""Replies to each held-out topic."""
RESAMPLES = 9999
"""Bootstrap resamples per interval."""
LEVEL = 0.95
"""Confidence level of the intervals."""
Numbers = Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Sample:
    """The measurements of one checkpoint: one number per topic, neutral reply or passage. The bootstrap resamples
    these."""

    shows: Numbers
    """Share of a topic's replies that the text scorer calls the trait."""
    probability: Numbers
    """The scorer's mean probability of a topic's replies."""
    repetition: Numbers
    """Mean share of repeated trigrams in a topic's replies."""
    kl: Numbers
    """KL(source || checkpoint) over each of the source's neutral replies, nats."""
    lengths: Numbers
    """Tokens of each neutral reply."""
    entropy: Numbers
    """Cross-entropy of each passage of plain prose, nats."""
    words: Numbers
    """Tokens of each passage."""
    kept: dict[str, Numbers]
    """Per trait that is to stay: for each of its topics, the share of replies that show the trait."""

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
    """Measures checkpoints on held-out topics, neutral prompts and prose, against the source's replies."""

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
        """Generate the source's replies to the neutral prompts.

        `kept` has a scorer per trait that is to stay. `samples` is the number of replies per topic, `tokens` their
        largest length. `on_tokens` is called with the number of tokens written since its last call.
        """
        self.scorer, self.kept, self.samples, self.on_tokens = scorer, dict(kept), samples, on_tokens
        self.sampler = replace(MEASURE, max_new_tokens=tokens)
        prompts = NeutralPrompts.load().held_out[:PROMPTS]
        replies = neutral_replies(source, prompts, tokens=NEUTRAL_TOKENS, on_tokens=on_tokens)
        self.reference = Reference.of(source, replies)

    @property
    def tokens(self) -> int:
        """Largest number of tokens written to measure one checkpoint."""
        topics = sum(len(s.trait.held_out) for s in (self.scorer, *self.kept.values()))
        return topics * self.samples * self.sampler.max_new_tokens

    def measure(self, model: SteeredModel) -> Sample:
        """Measure one checkpoint, which may be the source. A topic draws the same random numbers for each of them."""
        scorers = [self.scorer, *self.kept.values()]
        chats: list[list[Message]] = [
            [{"role": "user", "content": t}] for s in scorers for t in s.trait.held_out for _ in range(self.samples)
        ]
        replies = model.replies(chats, self.sampler, on_tokens=self.on_tokens)
        probabilities: list[Numbers] = []
        first = replies[: len(self.scorer.trait.held_out) * self.samples]
        for s in scorers:
            count = len(s.trait.held_out) * self.samples
            probabilities.append(s.probabilities([model.text(r) for r in replies[:count]]))
            replies = replies[count:]
        entropy, words = text_entropies(model, plain_paragraphs()[1])
        return Sample(
            shows=self._by_topic(probabilities[0] > 0.5),
            probability=self._by_topic(probabilities[0]),
            repetition=self._by_topic(np.array([repetition(r) for r in first])),
            kl=self.reference.kl_sums(model),
            lengths=self.reference.lengths,
            entropy=entropy,
            words=words,
            kept={name: self._by_topic(p > 0.5) for name, p in zip(self.kept, probabilities[1:], strict=True)},
        )

    def _by_topic(self, values: Any) -> Numbers:
        return np.asarray(values, float).reshape(-1, self.samples).mean(1)


def compared(untouched: Sample, unsearched: Sample, searched: Sample) -> dict[str, Any]:
    """The three measurements with their intervals, the searched bake's KL as a share of the unsearched one's, and the
    difference between their rates."""
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
    """A ratio of sums with the ends of its bootstrap interval; numerator and denominator are resampled together."""
    return _interval((above, below), lambda x, y, axis=-1: x.sum(axis) / np.maximum(y.sum(axis), 1e-12))


def _interval(data: Sequence[Numbers], statistic: Callable[..., Any]) -> dict[str, float]:
    value = float(statistic(*data))
    if len(data[0]) < 2:
        return {"value": value, "low": value, "high": value}
    # By percentiles: the other methods fail if all values are equal, as they are for rates of zero.
    found = bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def load_exported(place: Path, source: Path) -> SteeredModel:
    """Load the output of a bake at `place` as its users would: a checkpoint through transformers, an adapter through
    peft on top of `source`, not merged into it."""
    if not (place / ADAPTER).is_file():
        return load(place)
    from peft import PeftModel

    model = load(source)
    with warnings.catch_warnings():
        # peft warns about merging such an adapter, also into a tied head. It is not merged here.
        warnings.simplefilter("ignore", UserWarning)
        # peft changes the modules in place, so `model` runs with the adapter.
        PeftModel.from_pretrained(model.hf, str(place)).eval()
    return model

"""The final measurement of a search: baked checkpoints, loaded from disk, on held-out topics and text.

Every figure has a bootstrap interval. No trial of the search used these topics or texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from steer.checkpoint.reader import ADAPTER
from steer.core.sampler import MEASURE
from steer.core.trait import NeutralPrompts
from steer.measure.harness import (
    Numbers,
    Reference,
    answers,
    neutral_replies,
    plain_paragraphs,
    text_entropies,
)
from steer.measure.scorer import Scorer
from steer.measure.search.trials import NEUTRAL_TOKENS, REPLY_TOKENS
from steer.model.steered import SteeredModel, load
from steer.progress import Advance

PROMPTS, SAMPLES = 24, 2
"""Number of held-out neutral prompts that KL is computed on, and replies to each held-out topic."""
RESAMPLES, LEVEL = 9999, 0.95
"""Bootstrap resamples per interval, and confidence level of the intervals."""
Sample = dict[str, tuple[Numbers, ...]]
"""The measurements of one checkpoint: for each figure an array with one number per topic, neutral reply or passage,
which the bootstrap resamples. `rate`, `probability`, `repetition` and, for a trait that is to stay, `rate of NAME` are
means over topics; `kl` and `perplexity` have a second array, the tokens of each text."""


class HeldOut:
    """Measures checkpoints on held-out topics, neutral prompts and prose, against the source's replies.

    `kept` has a scorer per trait that is to stay. `tokens` is the largest length of a reply.
    """

    def __init__(
        self,
        source: SteeredModel,
        scorer: Scorer,
        kept: Mapping[str, Scorer],
        *,
        tokens: int = REPLY_TOKENS,
        on_tokens: Advance | None = None,
    ) -> None:
        self.scorer, self.kept, self.on_tokens = scorer, dict(kept), on_tokens
        self.sampler = replace(MEASURE, max_new_tokens=tokens)
        prompts = NeutralPrompts.load().held_out[:PROMPTS]
        replies = neutral_replies(source, prompts, tokens=NEUTRAL_TOKENS, on_tokens=on_tokens)
        self.reference = Reference.of(source, replies)

    def measure(self, model: SteeredModel) -> Sample:
        """Measure one checkpoint, which may be the source. A topic draws the same random numbers for each of them."""
        scorers = [self.scorer, *self.kept.values()]
        topics = [s.trait.held_out for s in scorers]
        ((first, *others),) = answers(
            model, scorers, topics, [None], self.sampler, samples=SAMPLES, on_tokens=self.on_tokens
        )
        return {
            "rate": (_by_topic(first.probabilities > 0.5),),
            "probability": (_by_topic(first.probabilities),),
            "repetition": (_by_topic(first.repetitions),),
            "kl": (self.reference.kl_sums(model, [None])[0], self.reference.lengths),
            "perplexity": text_entropies(model, plain_paragraphs()[1]),
        } | {f"rate of {n}": (_by_topic(a.probabilities > 0.5),) for n, a in zip(self.kept, others, strict=True)}


def _by_topic(values: Any) -> Numbers:
    return np.asarray(values, float).reshape(-1, SAMPLES).mean(1)


def intervals(sample: Sample) -> dict[str, Any]:
    """Every figure as {value, low, high}: the ends of its 95 % bootstrap interval."""
    out: dict[str, Any] = {n: ratio_interval(*x) if len(x) > 1 else mean_interval(*x) for n, x in sample.items()}
    out["perplexity"] = {k: float(np.exp(v)) for k, v in out["perplexity"].items()}
    kept = {n.removeprefix("rate of "): out.pop(n) for n in sample if n.startswith("rate of ")}
    return out | {"kept": kept}


def compared(untouched: Sample, unsearched: Sample, searched: Sample) -> dict[str, Any]:
    """The three measurements with their intervals, the searched bake's KL as a share of the unsearched one's, and the
    difference between their rates."""
    return {
        "untouched": intervals(untouched),
        "unsearched": intervals(unsearched),
        "searched": intervals(searched),
        "kl_of_unsearched": ratio_interval(searched["kl"][0], unsearched["kl"][0]),
        "rate_above_unsearched": mean_interval(searched["rate"][0] - unsearched["rate"][0]),
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

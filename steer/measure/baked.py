"""A baked checkpoint held against its source, on the files that were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steer.live.model import SteeredModel
from steer.measure.dose import Point, Setting, measure_settings
from steer.measure.fluency import Reference, text_perplexity
from steer.measure.scorer import Scorer


def measure_baked(
    source: SteeredModel,
    baked: SteeredModel,
    before: Point,
    scorer: Scorer,
    topics: Sequence[str],
    reference: Reference,
    texts: Sequence[str],
    *,
    samples: int = 2,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trait rate, KL on the source's replies to neutral prompts and perplexity on plain text, before and after.

    `before` is the untouched source's point of a dose response on the same topics.
    """
    after = measure_settings(
        baked, scorer, [Setting("baked")], topics, reference, samples=samples, judge=source, on_tokens=on_tokens
    )[0]
    plain = text_perplexity(source, texts), text_perplexity(baked, texts)
    return {
        "before": before.as_json(),
        "after": after.as_json(),
        "rate_ratio": after.rate / before.rate if before.rate else None,
        "kl": after.kl,
        "perplexity_before": plain[0],
        "perplexity_after": plain[1],
        "perplexity_ratio": plain[1] / plain[0],
    }

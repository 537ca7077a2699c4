"""Dose response: replies to held-out topics at several amounts of a slider, or of a baked checkpoint, scored.

`steer demo` and `steer find --dictionary` measure with it. The text scorer comes from `scorer`, the costs from
`fluency`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE, Sampler
from steer.core.trait import Trait
from steer.measure.contrast import Reply
from steer.measure.fluency import Reference, mean_repetition, reply_perplexities, text_perplexity
from steer.measure.scorer import Scorer, marker_rates
from steer.model.loaded import Message, as_messages
from steer.model.steered import SteeredModel

AMOUNTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Amounts of the slider that a dose response measures."""


@dataclass(frozen=True)
class Point:
    """One row of a dose response: what was measured under one `Setting`."""

    label: str
    amount: float | None
    rate: float
    """Share of the replies that the text scorer calls the trait."""
    probability: float
    """The scorer's mean probability, smoother than the rate."""
    markers: float
    """Marker words per 100 words."""
    kl: float | None
    """KL per token to the untouched model on its replies to neutral prompts, nats; None for a system prompt, which
    changes the text before those replies."""
    repetition: float
    """Share of trigrams seen before in the same reply."""
    perplexity: float
    """Perplexity of each topic's first reply under the untouched model."""
    share: float
    """Displacement of the residual stream as a share of the site's median residual norm."""
    examples: tuple[str, ...] = ()
    """The first reply to each of the first three topics."""

    def as_json(self) -> dict[str, object]:
        """The point as JSON, for the machine-readable result."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """One condition to measure: an edit, or a system prompt, with its label. Without either: the model as it is."""

    label: str
    edit: Edit | None = None
    amount: float | None = None
    """Amount of the slider, copied to the `Point`; None for controls and for a baked checkpoint."""
    share: float = 0.0
    """Displacement as a share of the site's median residual norm, copied to the `Point`."""
    system: str | None = None
    """A system prompt that replaces steering, for the control by plain prompting."""


def measure_settings(
    model: SteeredModel,
    scorer: Scorer,
    settings: Sequence[Setting],
    topics: Sequence[str],
    reference: Reference | None,
    *,
    sampler: Sampler = MEASURE,
    samples: int = 2,
    judge: SteeredModel | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Point]:
    """Let the model reply to every topic under every setting and score the replies. Returns one `Point` per setting.

    All replies are generated in one call. A topic draws the same random numbers under every setting, so that
    differences come from the setting. `samples` is the number of replies per topic. `reference` holds the untouched
    model's replies to neutral prompts, on which KL is computed; without it `kl` is None. `judge` is the model that
    computes perplexity: by default the untouched `model`; for a baked checkpoint pass its source. `on_tokens` is called
    with the number of tokens written since its last call.
    """
    chats = [[as_messages(topic, setting.system) for topic in topics for _ in range(samples)] for setting in settings]
    per = len(topics) * samples
    rows = model.replies(
        [c for group in chats for c in group],
        sampler,
        [s.edit for s in settings for _ in range(per)],
        keys=list(range(per)) * len(settings),
        on_tokens=on_tokens,
    )
    groups = [rows[i * per : (i + 1) * per] for i in range(len(settings))]
    plain = [as_messages(topic, None) for topic in topics]
    perplexities = reply_perplexities(judge or model, plain, [ids[::samples] for ids in groups])
    costs: dict[int, float] = {}
    if reference is not None:
        # A system prompt has no KL. That of the unedited model is 0, except for a baked checkpoint (`judge` is given).
        costs = {i: 0.0 for i, s in enumerate(settings) if not s.system}
        moved = [i for i in costs if settings[i].edit is not None or judge is not None]
        costs |= zip(moved, reference.kls(model, [settings[i].edit for i in moved]) if moved else (), strict=True)
    out = []
    for i, setting in enumerate(settings):
        ids = groups[i]
        texts = [model.text(r) for r in ids]
        probabilities = scorer.probabilities(texts)
        out.append(
            Point(
                label=setting.label,
                amount=setting.amount,
                rate=float((probabilities > 0.5).mean()),
                probability=float(np.mean(probabilities)),
                markers=marker_rates(texts, scorer.trait),
                kl=costs.get(i),
                repetition=mean_repetition(ids),
                perplexity=perplexities[i],
                share=setting.share,
                examples=tuple(texts[: 3 * samples : samples]),
            )
        )
    return out


def dose_settings(direction: Direction, amounts: Sequence[float] = AMOUNTS) -> list[Setting]:
    """One setting per amount of `add`; amount 0 is the untouched model."""
    return [
        Setting(f"{a:+g}" if a else "0", Edit(add=((direction, a),)) if a else None, a, direction.share(a))
        for a in amounts
    ]


def control_settings(direction: Direction, trait: Trait, seed: int = 0) -> list[Setting]:
    """Controls for steering: a random direction with the same displacement, and the instruction as a system prompt."""
    noise = torch.randn(direction.width, generator=torch.Generator().manual_seed(seed))
    random = replace(direction, name="random", vector=noise)
    return [
        Setting("random direction, -1", Edit(add=((random, -1.0),)), share=direction.share(1)),
        Setting("system prompt instead", system=trait.without_instruction),
    ]


def neutral_replies(
    model: SteeredModel,
    prompts: Sequence[str],
    *,
    tokens: int = 48,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Reply]:
    """The untouched model's replies of at most `tokens` tokens to neutral prompts, without the empty ones. KL
    divergence is computed on them."""
    chats: list[list[Message]] = [[{"role": "user", "content": p}] for p in prompts]
    sampler = Sampler(max_new_tokens=tokens, temperature=0.7, top_k=40, repetition_penalty=1.05)
    with model.untouched():
        made = model.replies(chats, sampler, on_tokens=on_tokens)
    return [Reply(tuple(c), tuple(r), model.text(r)) for c, r in zip(chats, made, strict=True) if r]


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
    """Trait rate, KL on the source's replies to neutral prompts, and perplexity of plain text, before and after baking.

    `before` is the point of the untouched source in a dose response on the same topics. `texts` are the plain texts.
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

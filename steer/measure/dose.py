"""Dose response: what replies to held-out topics look like at several amounts of a slider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from steer.features.contrast import Reply
from steer.live.model import Message, SteeredModel, as_messages
from steer.measure.fluency import Reference, mean_repetition, reply_perplexities
from steer.measure.scorer import Scorer, marker_rates
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.sampler import MEASURE, Sampler
from steer.values.trait import Trait

AMOUNTS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One row of a dose response."""

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
    """Of each topic's first reply under the untouched model."""
    share: float
    """The move as a share of the site's median residual norm."""
    examples: tuple[str, ...] = ()
    """The first few replies."""

    def as_json(self) -> dict[str, object]:
        """For the machine-readable result."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What replies are measured under."""

    label: str
    edit: Edit | None = None
    amount: float | None = None
    share: float = 0.0
    system: str | None = None
    """A system prompt of its own, for the control by plain prompting."""


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
    """Replies to every topic under every setting, in one pass over all of them, scored from their text.

    The same topic draws the same random numbers under every setting, so that differences are the setting's.
    `reference` is the untouched model on neutral prompts. `judge` is the model that perplexity is taken under: the
    untouched `model` without it, the source of a baked checkpoint with it.
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
        # A system prompt has no cost; neither has the untouched model, unless it is a baked one that is measured.
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
    """One setting an amount of `add`; 0 is the untouched model."""
    return [
        Setting(f"{a:+g}" if a else "0", Edit(add=((direction, a),)) if a else None, a, direction.share(a))
        for a in amounts
    ]


def control_settings(direction: Direction, trait: Trait, seed: int = 0) -> list[Setting]:
    """What steering is held against: a random direction moved as far, and the instruction as a system prompt."""
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
    """The untouched model's replies to neutral prompts: the text that divergences are taken on."""
    chats: list[list[Message]] = [[{"role": "user", "content": p}] for p in prompts]
    sampler = Sampler(max_new_tokens=tokens, temperature=0.7, top_k=40, repetition_penalty=1.05)
    with model.untouched():
        made = model.replies(chats, sampler, on_tokens=on_tokens)
    return [Reply(tuple(c), tuple(r), model.text(r)) for c, r in zip(chats, made, strict=True) if r]

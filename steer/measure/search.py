"""A small search over what to bake: how strongly, in which blocks, and with which bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from steer.features.contrast import Reply
from steer.live.model import Message, SteeredModel
from steer.measure.fluency import Reference, mean_repetition, text_perplexity
from steer.measure.scorer import Scorer
from steer.values.direction import Direction
from steer.values.edit import Edit
from steer.values.sampler import MEASURE

MAX_KL = 0.2
"""Nats per token on neutral prompts that a bake may cost."""
MAX_PERPLEXITY = 1.1
"""Factor on the perplexity of plain text."""
MARGIN = 0.7
"""The search keeps to this share of both, since it sees a few fit prompts only."""
GOAL = 0.4
"""Share of the untouched rate to get under, on fit topics."""
GOAL_PROBABILITY = 0.6
"""Share of the untouched mean probability to get under: the rate of a few replies alone is a coarse number."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate edit and what it did on fit topics."""

    edit: Edit | None
    label: str
    rate: float
    probability: float
    kl: float
    perplexity: float
    repetition: float

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        out = {k: v for k, v in vars(self).items() if k != "edit"}
        return {**out, "edit": self.edit.describe() if self.edit else None}


@dataclass(frozen=True, eq=False)
class Search:
    """All trials, the untouched model's first, and the one chosen."""

    trials: tuple[Trial, ...]
    chosen: Trial

    @property
    def base(self) -> Trial:
        """The untouched model on the same prompts."""
        return self.trials[0]


def candidate_edits(direction: Direction, blocks: int) -> dict[str, Edit]:
    """Biases at the direction's site, ablation in the blocks around it, and both together.

    A direction that is orthogonal to the neutral mean goes to its neutral value when it is ablated, not below: on a
    checkpoint that preaches everywhere it is the bias that moves the neutral value itself.
    """
    near = (max(0, direction.site - 5), min(blocks - 1, direction.site + 6))
    far = (max(0, direction.site - 5), blocks - 1)
    grid = [(0.0, None, a) for a in (-0.6, -0.8, -1.0)]
    grid += [(0.5, near, a) for a in (-0.4, -0.6, -0.8)]
    grid += [(1.0, near, 0.0), (0.5, far, -0.6)]
    out: dict[str, Edit] = {}
    for strength, window, amount in grid:
        parts = [f"ablate {strength:g} in blocks {window[0]}-{window[1]}"] if window else []
        parts += [f"bias {amount:+g} at block {direction.site}"] if amount else []
        add = ((direction, amount),) if amount else ()
        out[", ".join(parts)] = Edit((direction,) if window else (), strength or 1.0, window, add)
    return out


def search_edit(
    model: SteeredModel,
    direction: Direction,
    scorer: Scorer,
    neutral: Sequence[Reply],
    *,
    topics: int = 14,
    on_tokens: Callable[[int], None] | None = None,
) -> Search:
    """Try every candidate on the live model as hooks, on fit topics and on `neutral` replies to fit prompts.

    All candidates' replies are written in one batch, each row under its own edit.
    """
    edits: list[tuple[str, Edit | None]] = [("untouched", None)]
    edits += list(candidate_edits(direction, model.anatomy.blocks).items())
    chats: list[list[Message]] = [[{"role": "user", "content": t}] for t in scorer.trait.fit[:topics]]
    rows = model.replies(
        chats * len(edits),
        replace(MEASURE, max_new_tokens=56),
        [edit for _, edit in edits for _ in chats],
        keys=list(range(len(chats))) * len(edits),
        batch=96,
        on_tokens=on_tokens,
    )
    reference = Reference.of(model, neutral)
    texts = plain_paragraphs()[0]
    trials = []
    for i, (label, edit) in enumerate(edits):
        ids = rows[i * len(chats) : (i + 1) * len(chats)]
        probabilities = scorer.probabilities([model.text(r) for r in ids])
        trials.append(
            Trial(
                edit=edit,
                label=label,
                rate=float((probabilities > 0.5).mean()),
                probability=float(np.mean(probabilities)),
                kl=reference.kl(model, edit) if edit else 0.0,
                perplexity=text_perplexity(model, texts, edit),
                repetition=mean_repetition(ids),
            )
        )
    return Search(tuple(trials), choose(trials))


def choose(trials: Sequence[Trial]) -> Trial:
    """The cheapest trial that reaches the goal; without one, the lowest rate among those cheap enough.

    `trials[0]` is the untouched model. Cheap is KL: what is spent on text that has nothing to do with the trait.
    """
    base, rest = trials[0], trials[1:]
    cheap = [
        t
        for t in rest
        if t.kl <= MARGIN * MAX_KL and t.perplexity <= (1 + MARGIN * (MAX_PERPLEXITY - 1)) * base.perplexity
    ]
    reached = [t for t in cheap if t.rate <= GOAL * base.rate and t.probability <= GOAL_PROBABILITY * base.probability]
    if reached:
        return min(reached, key=lambda t: t.kl)
    return min(cheap, key=lambda t: t.probability) if cheap else min(rest, key=lambda t: t.kl)


def plain_paragraphs() -> tuple[list[str], list[str]]:
    """Plain prose written for this project, in two halves: one to search with, one to measure with."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    paragraphs = [p.replace("\n", " ") for p in text.strip().split("\n\n")]
    return paragraphs[0::2], paragraphs[1::2]

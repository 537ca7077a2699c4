"""On-policy contrast replies: the model answers the same topics under a trait's two opposite instructions.

This is the first step of `steer find`: directions, text scorers and feature rankings are all computed from these
replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.sampler import Sampler
from steer.core.trait import NeutralPrompts, Trait
from steer.errors import SteerError
from steer.model.loaded import Message
from steer.model.steered import SteeredModel

FIT_SAMPLES = 2
"""Replies to each fit topic under each instruction."""
SAMPLER = Sampler(max_new_tokens=64, temperature=0.7, top_k=40, repetition_penalty=1.05)
_PARTS = ("fit_with", "fit_without", "held_out_with", "held_out_without", "neutral")


@dataclass(frozen=True)
class Reply:
    """A chat and what the model answered."""

    chat: tuple[Message, ...]
    ids: tuple[int, ...]
    """The reply's tokens, without the end token."""
    text: str
    mean: Float[Tensor, "sites d"] | None = field(default=None, compare=False, repr=False)
    """The mean residual stream over the reply's tokens after each block, if it was summed during generation."""


@dataclass(frozen=True)
class Contrast:
    """Replies to the topics of a trait under its two instructions, and to neutral prompts under none."""

    trait: Trait
    fit_with: tuple[Reply, ...]
    fit_without: tuple[Reply, ...]
    held_out_with: tuple[Reply, ...]
    held_out_without: tuple[Reply, ...]
    neutral: tuple[Reply, ...]
    """Replies to the neutral prompts of the fit split, under no instruction."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value for a file. Of the trait it holds only the name."""
        parts = {name: [{"chat": r.chat, "ids": r.ids, "text": r.text} for r in getattr(self, name)] for name in _PARTS}
        return {"trait": self.trait.name, **parts}

    @classmethod
    def from_json(cls, trait: Trait, told: Mapping[str, Any]) -> Contrast:
        """The contrast of `trait` from a value that `as_json` returned."""
        parts = {n: tuple(Reply(tuple(r["chat"]), tuple(r["ids"]), r["text"]) for r in told[n]) for n in _PARTS}
        return cls(trait, **parts)

    def check(self) -> None:
        """Check that every group has enough replies for a mean, a cross-validation fold and an AUROC.

        Errors: SteerError that names the group with too few replies: the model ended them at once.
        """
        for name in _PARTS:
            topics = {r.chat[-1]["content"] for r in getattr(self, name)}
            if len(topics) < (2 if name.startswith("fit") else 1):
                raise SteerError(
                    f"trait {self.trait.name!r}: expected replies to the topics of {name}, found {len(topics)} that "
                    "are not empty; the model ends its replies at once, check its chat template and end tokens"
                )


def contrast_replies(
    model: SteeredModel,
    trait: Trait,
    *,
    sampler: Sampler = SAMPLER,
    neutral: Sequence[Reply] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Contrast:
    """Let the model answer every topic under both instructions, all in one call of `model.replies`.

    Standing sliders are off meanwhile. `neutral` gives replies to neutral prompts that another trait's contrast has
    already, which saves generating them again. `on_tokens` is called with the number of tokens written since its last
    call.
    """
    parts: list[list[list[Message]]] = [
        [_chat(topic, instruction) for topic in topics for _ in range(count)]
        for topics, instruction, count in (
            (trait.fit, trait.with_instruction, FIT_SAMPLES),
            (trait.fit, trait.without_instruction, FIT_SAMPLES),
            (trait.held_out, trait.with_instruction, 1),
            (trait.held_out, trait.without_instruction, 1),
            (NeutralPrompts.load().fit if neutral is None else (), None, 1),
        )
    ]
    chats = [chat for part in parts for chat in part]
    sums = torch.zeros(model.anatomy.blocks, len(chats), model.anatomy.width, device=model.device)
    with model.untouched():
        made = model.replies(chats, sampler, on_tokens=on_tokens, sums=sums)
    replies = [
        Reply(tuple(c), tuple(ids), model.text(ids), (sums[:, i] / max(1, len(ids))).cpu())
        for i, (c, ids) in enumerate(zip(chats, made, strict=True))
    ]
    split: list[tuple[Reply, ...]] = []
    for part in parts:
        # A reply that ended at once has no tokens to measure.
        split.append(tuple(r for r in replies[: len(part)] if r.ids))
        replies = replies[len(part) :]
    return Contrast(trait, *split[:4], neutral=split[4] if neutral is None else tuple(neutral))


def _chat(topic: str, instruction: str | None) -> list[Message]:
    system: Sequence[Message] = [{"role": "system", "content": instruction}] if instruction else []
    return [*system, {"role": "user", "content": topic}]

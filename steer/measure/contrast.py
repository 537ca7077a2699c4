"""Contrast replies, a model's answers to the same topics under a trait's two opposite instructions, and the residual
streams at their tokens.

This is the first step of `steer find`: directions, text scorers and feature rankings are all computed from these
replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.core.sampler import Sampler
from steer.core.trait import NeutralPrompts, Trait
from steer.errors import TraitNotFoundError
from steer.model.forward import read_residuals
from steer.model.loaded import Message, as_messages
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.progress import Advance

FIT_SAMPLES = 2
"""Replies to each fit topic under each instruction."""
ROWS = 32
"""Replies that `read_replies` runs together."""
SAMPLER = Sampler(max_new_tokens=64, temperature=0.7, top_k=40, repetition_penalty=1.05)
Take = Callable[[list[int], Bool[Tensor, "rows seq"], int, Float[Tensor, "rows seq d"]], None]
"""Callback of `read_replies`, called per batch and site with: the indices of the replies in the batch, the mask of
their response tokens, the site, and the residual stream at that site."""
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
    thoughts: tuple[int, ...] = ()
    """Tokens of thoughts that the model wrote before `ids`. They are read, and nothing is measured on them."""

    @classmethod
    def all_of(
        cls,
        model: SteeredModel,
        chats: Sequence[Sequence[Message]],
        made: Sequence[Sequence[int]],
        means: Sequence[Tensor | None] | None = None,
    ) -> list[Reply]:
        """The replies in what `model.replies` made of `chats`, without the thoughts of a model that thinks unasked.

        The first time, a warning says how many had thoughts, and how many are empty as their thoughts did not end.
        """
        means = means or [None] * len(chats)
        out = [cls.of(model, *row) for row in zip(chats, made, means, strict=True)]
        if thought := [r for r in out if r.thoughts]:
            endless, longest = sum(not r.ids for r in thought), max(map(len, made))
            without = f", and {endless} are nothing else in {longest} tokens" if endless else ""
            model.warn_once(
                "thoughts",
                f"{len(thought)} of {len(out)} replies begin with thoughts, which its chat template does not leave "
                f"out; only what follows them is measured{without}",
            )
        return out

    @classmethod
    def of(cls, model: SteeredModel, chat: Sequence[Message], made: Sequence[int], mean: Tensor | None = None) -> Reply:
        """The reply in what `model.replies` made. `mean`: over all its tokens; left out if some are thoughts."""
        start = model.answer_start(made)
        ids = tuple(made[start:])
        return cls(tuple(chat), ids, model.text(ids), None if start else mean, tuple(made[:start]))

    def as_json(self) -> dict[str, Any]:
        """A JSON value for a file, without the mean."""
        thoughts = {"thoughts": self.thoughts} if self.thoughts else {}
        return {"chat": self.chat, "ids": self.ids, "text": self.text, **thoughts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reply:
        """The reply of a value that `as_json` returned."""
        thoughts = tuple(value.get("thoughts", ()))
        return cls(tuple(value["chat"]), tuple(value["ids"]), value["text"], thoughts=thoughts)

    def prompt_ids(self, model: SteeredModel) -> list[int]:
        """Token ids of everything before the reply, the thoughts among them."""
        return [*model.prompt_ids(self.chat, thoughts=False), *self.thoughts]


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

    @property
    def sides(self) -> tuple[tuple[Reply, ...], ...]:
        """Fit with and without the trait, held-out with and without."""
        return self.fit_with, self.fit_without, self.held_out_with, self.held_out_without

    def as_json(self) -> dict[str, Any]:
        """A JSON value for a file. Of the trait it holds only the name."""
        parts = {name: [r.as_json() for r in getattr(self, name)] for name in _PARTS}
        return {"trait": self.trait.name, **parts}

    @classmethod
    def from_json(cls, trait: Trait, value: Mapping[str, Any]) -> Contrast:
        """The contrast of `trait` from a value that `as_json` returned."""
        parts = {n: tuple(Reply.from_json(r) for r in value[n]) for n in _PARTS}
        return cls(trait, **parts)

    def check(self) -> None:
        """Check that every group has enough replies for a mean, a cross-validation fold and an AUROC.

        Errors: TraitNotFoundError that names the group with too few replies: the model ended them at once.
        """
        for name in _PARTS:
            topics = {r.chat[-1]["content"] for r in getattr(self, name)}
            if len(topics) < (2 if name.startswith("fit") else 1):
                raise TraitNotFoundError(
                    f"trait {self.trait.name!r}: expected replies to the topics of {name}, found {len(topics)} that "
                    "are not empty; the model ends its replies at once, check its chat template and end tokens"
                )


def contrast_replies(
    model: SteeredModel,
    trait: Trait,
    *,
    sampler: Sampler = SAMPLER,
    samples: tuple[int, int] = (FIT_SAMPLES, 1),
    prompts: Sequence[str] | None = None,
    neutral: Sequence[Reply] | None = None,
    on_tokens: Advance | None = None,
) -> Contrast:
    """Let the model answer every topic under both instructions, all in one call of `model.replies`.

    Standing sliders are off meanwhile. `samples`: replies to each fit topic and to each held-out topic under each
    instruction. `prompts`: the neutral ones to answer, by default all of the fit split; `neutral` gives replies to them
    that another trait's contrast has already, which saves generating them again. `on_tokens` is called with the number
    of tokens written since its last call.
    """
    if prompts is None:
        prompts = NeutralPrompts.load().fit
    fit, held_out = samples
    parts: list[list[list[Message]]] = [
        [as_messages(topic, instruction) for topic in topics for _ in range(count)]
        for topics, instruction, count in (
            (trait.fit, trait.with_instruction, fit),
            (trait.fit, trait.without_instruction, fit),
            (trait.held_out, trait.with_instruction, held_out),
            (trait.held_out, trait.without_instruction, held_out),
            (prompts if neutral is None else (), None, 1),
        )
    ]
    chats = [chat for part in parts for chat in part]
    sums = None
    if model.end_text is None:  # else the sums would have the tokens of that text in them
        sums = torch.zeros(model.anatomy.blocks, len(chats), model.anatomy.width, device=model.device)
    with model.untouched():
        made = model.replies(chats, sampler, on_tokens=on_tokens, sums=sums, thoughts=False)
    means = sums if sums is None else [(sums[:, i] / max(1, len(ids))).cpu() for i, ids in enumerate(made)]
    replies = iter(Reply.all_of(model, chats, made, means))
    # A reply that ended at once has no tokens to measure.
    split = [tuple(r for r in islice(replies, len(part)) if r.ids) for part in parts]
    return Contrast(trait, *split[:4], neutral=split[4] if neutral is None else tuple(neutral))


def reply_means(
    model: SteeredModel, replies: Sequence[Reply], *, on_rows: Advance | None = None
) -> Float[Tensor, "replies sites d"]:
    """The mean residual stream over each reply's tokens, at every site, fp32.

    A reply whose `mean` is set already is not run through the model again. `on_rows` is called with the number of
    replies of each batch.
    """
    out = torch.zeros(len(replies), model.anatomy.blocks, model.anatomy.width)

    def take(rows: list[int], mask: Tensor, site: int, h: Tensor) -> None:
        weights = (mask / mask.sum(1, keepdim=True)).to(h.device)
        out[[unread[i] for i in rows], site] = torch.einsum("btd,bt->bd", h.float(), weights).cpu()

    for i, reply in enumerate(replies):
        if reply.mean is not None:
            out[i] = reply.mean
    unread = [i for i, reply in enumerate(replies) if reply.mean is None]
    read_replies(model, [replies[i] for i in unread], range(model.anatomy.blocks), take, on_rows=on_rows)
    model.check_finite(out)
    return out


def reply_tokens(model: SteeredModel, replies: Sequence[Reply], site: int) -> Float[Tensor, "tokens d"]:
    """The residual stream at every token of the replies at one site, fp32."""
    parts: list[Tensor] = []
    read_replies(model, replies, [site], lambda rows, mask, at, h: parts.append(h.float().cpu()[mask]))
    return torch.cat(parts)


def padded_replies(
    model: SteeredModel, prompts: Sequence[list[int]], replies: Sequence[Reply]
) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"], Bool[Tensor, "rows seq"]]:
    """(token ids, attention mask, mask of the reply's tokens) of replies after their prompts, padded on the right. The
    last one is on the CPU."""
    ids, attention = padded([[*p, *r.ids] for p, r in zip(prompts, replies, strict=True)], device=model.device)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt, reply in zip(mask, prompts, replies, strict=True):
        row[len(prompt) : len(prompt) + len(reply.ids)] = True
    return ids, attention, mask


@torch.inference_mode()
def read_replies(
    model: SteeredModel,
    replies: Sequence[Reply],
    sites: Sequence[int],
    take: Take,
    *,
    on_rows: Advance | None = None,
) -> None:
    """Run chats with their replies through the unsteered model and pass the residual streams to `take`.

    `ROWS` replies of similar length are run together. The mask given to `take` is true at the reply's tokens only,
    not at the prompt, BOS, or the special tokens around the reply. `on_rows` is called with the number of replies of
    each batch.
    """
    prompts = [r.prompt_ids(model) for r in replies]
    order = sorted(range(len(replies)), key=lambda i: len(prompts[i]) + len(replies[i].ids))
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        ids, attention, mask = padded_replies(model, [prompts[i] for i in rows], [replies[i] for i in rows])
        # No LM head and no block after the last site: the logits are not needed.
        with model.untouched():
            read_residuals(model, ids, sites, lambda site, h, r=rows, m=mask: take(r, m, site, h), attention)
        if on_rows is not None:
            on_rows(len(rows))

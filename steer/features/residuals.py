"""Residual streams of response tokens, every site in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steer.features.contrast import Reply
from steer.live.forward import read_residuals
from steer.live.model import SteeredModel
from steer.live.tokens import padded

Take = Callable[[list[int], Bool[Tensor, "rows seq"], int, Float[Tensor, "rows seq d"]], None]
"""Given which replies a batch holds, the mask of their response tokens, the site, and the residual stream."""


def reply_means(
    model: SteeredModel, replies: Sequence[Reply], *, on_rows: Callable[[int], None] | None = None
) -> Float[Tensor, "replies sites d"]:
    """The mean residual stream over each reply's tokens, at every site, fp32; a reply that has its mean is not read."""
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


@torch.inference_mode()
def read_replies(
    model: SteeredModel,
    replies: Sequence[Reply],
    sites: Sequence[int],
    take: Take,
    *,
    batch: int = 32,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """Run chats with their replies through the decoder, batches by length, and hand the residual streams over.

    Response tokens only are unmasked: the prompt, BOS and the special tokens around the reply are not.
    """
    prompts = [model.prompt_ids(r.chat) for r in replies]
    full = [p + list(r.ids) for p, r in zip(prompts, replies, strict=True)]
    order = sorted(range(len(full)), key=lambda i: len(full[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids, attention = padded([full[i] for i in rows], device=model.device)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for j, i in enumerate(rows):
            mask[j, len(prompts[i]) : len(full[i])] = True
        # The decoder alone, and no block after the last site: no logits are wanted.
        with model.untouched():
            read_residuals(model, ids, sites, lambda site, h, r=rows, m=mask: take(r, m, site, h), attention)
        if on_rows is not None:
            on_rows(len(rows))

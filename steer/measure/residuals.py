"""Residual streams at the response tokens of replies, all sites in one forward pass.

`steer.finding.directions`, `steer.measure.neutral_means` and `steer.sae.pooling` read replies through this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steer.measure.contrast import Reply
from steer.model.forward import read_residuals
from steer.model.steered import SteeredModel
from steer.model.tokens import padded

Take = Callable[[list[int], Bool[Tensor, "rows seq"], int, Float[Tensor, "rows seq d"]], None]
"""Callback of `read_replies`, called per batch and site with: the indices of the replies in the batch, the mask of
their response tokens, the site, and the residual stream at that site."""


def reply_means(
    model: SteeredModel, replies: Sequence[Reply], *, on_rows: Callable[[int], None] | None = None
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
    """Run chats with their replies through the unsteered model and pass the residual streams to `take`.

    `batch` replies of similar length are run together. The mask given to `take` is true at the reply's tokens only,
    not at the prompt, BOS, or the special tokens around the reply. `on_rows` is called with the number of replies of
    each batch.
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
        # No LM head and no block after the last site: the logits are not needed.
        with model.untouched():
            read_residuals(model, ids, sites, lambda site, h, r=rows, m=mask: take(r, m, site, h), attention)
        if on_rows is not None:
            on_rows(len(rows))

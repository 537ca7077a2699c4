"""Activations of a dictionary's latents pooled over whole replies: the largest and the mean of each latent.

`steer.sae.ranking` computes AUROCs from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.fit import OUTLIER
from steer.measure.contrast import Reply, read_replies
from steer.model.fit_check import check_fits
from steer.model.forward import chunks
from steer.model.steered import SteeredModel


@dataclass(frozen=True, eq=False)
class Pooled:
    """Activations pooled over the response tokens of each reply, fp32."""

    max: Float[Tensor, "replies latents"]
    """Largest activation over the reply's tokens."""
    mean: Float[Tensor, "replies latents"]
    """Mean activation over the reply's tokens."""
    topics: tuple[str, ...]
    """The topic of each reply; replies to one topic under the two instructions are a pair."""

    def __len__(self) -> int:
        return len(self.topics)


@torch.inference_mode()
def pooled(
    model: SteeredModel,
    dictionary: Dictionary,
    replies: Sequence[Reply],
    *,
    on_rows: Callable[[int], None] | None = None,
) -> Pooled:
    """Pool every latent over each reply's tokens (not its prompt's) at the dictionary's site, without outliers.

    `on_rows` is called with the number of replies of each batch.
    Errors: those of `check_fits`.
    """
    site = check_fits(model, dictionary)
    highest = torch.zeros(len(replies), dictionary.latents)
    total = torch.zeros(len(replies), dictionary.latents)
    count = torch.zeros(len(replies), 1)

    def take(rows: list[int], mask: Bool[Tensor, "rows seq"], _: int, h: Float[Tensor, "rows seq d"]) -> None:
        mask = mask.to(h.device) & inliers(dictionary, h)
        reply = torch.tensor(rows)[mask.nonzero()[:, 0].cpu()]
        for start, acts in encoded(dictionary, h[mask]):
            of = reply[start : start + len(acts)]
            highest.scatter_reduce_(0, of[:, None].expand_as(acts), acts, "amax")
            total.index_add_(0, of, acts)
            count.index_add_(0, of, torch.ones(len(acts), 1))

    read_replies(model, replies, [site], take, on_rows=on_rows)
    return Pooled(highest, total / count.clamp(min=1), tuple(str(r.chat[-1]["content"]) for r in replies))


def encoded(
    dictionary: Dictionary, x: Float[Tensor, "tokens d"]
) -> Iterator[tuple[int, Float[Tensor, "chunk latents"]]]:
    """Yield (index of the first token, activations on the CPU) per chunk of tokens; the chunk size bounds memory."""
    for part in chunks(len(x), dictionary.latents):
        yield part.start, dictionary.encode(x[part].to(dictionary.W_enc.device)).float().cpu()


def inliers(dictionary: Dictionary, h: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch"]:
    """Mask of the tokens that are not outliers, i.e. whose norm is at most `OUTLIER` times the dictionary's `norm`. If
    the dictionary does not know that norm, every token is kept."""
    norms = h.float().norm(dim=-1)
    return norms <= OUTLIER * dictionary.norm if dictionary.norm else torch.ones_like(norms, dtype=torch.bool)

"""How well a dictionary preserves the model's predictions: cross-entropy with its reconstruction spliced in.

`steer train` measures it once, after training, on held-out documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from steer.core.dictionary import Dictionary
from steer.errors import UsageError
from steer.model.fit_check import check_fits
from steer.model.forward import changed_output, chunks, hidden_states, logits_in_chunks
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.sae.pooling import inliers


@dataclass(frozen=True)
class Spliced:
    """Cross-entropies of the next token in nats per token, all three over the same tokens."""

    plain: float
    """Cross-entropy of the unchanged model."""
    spliced: float
    """Cross-entropy with the residual stream at the site replaced by the dictionary's reconstruction of it."""
    ablated: float
    """Cross-entropy with the residual stream at the site replaced by its mean over these tokens (mean ablation)."""
    recovered: float
    """`(ablated - spliced) / (ablated - plain)`: 1 for a perfect dictionary, 0 for one that only knows the mean."""
    tokens: int
    """Number of predictions that the means are taken over."""


@dataclass(eq=False)
class _Batch:
    ids: Int[Tensor, "rows seq"]
    attention: Int[Tensor, "rows seq"]
    replaced: Bool[Tensor, "rows seq"]
    """Positions whose residual stream is replaced. Predictions made there are counted if a token follows."""

    @property
    def counted(self) -> Bool[Tensor, "rows seq-1"]:
        return self.replaced[:, :-1] & self.attention[:, 1:].bool()


Change = Callable[[_Batch, Tensor], Tensor]
"""Maps the residual stream of a batch at the site to the one that the model goes on with."""


@torch.inference_mode()
def cross_entropies(
    model: SteeredModel,
    dictionary: Dictionary,
    documents: Sequence[list[int]],
    *,
    batch_tokens: int = 4096,
) -> Spliced:
    """Run the documents three times (unchanged, reconstructed, mean-ablated) and compare the losses.

    `documents` are token ids, with BOS if the model uses one; `batch_tokens` is the number of tokens per forward pass.
    A document's first position and outliers (residual norm over ten times the dictionary's) are not replaced, and
    predictions made there are not counted: a dictionary is not trained on them.
    Errors: UsageError when no document has two tokens to predict from, and those of `check_fits`.
    """
    site = check_fits(model, dictionary)
    rows = sorted((d for d in documents if len(d) > 2), key=len)
    if not rows:
        raise UsageError(
            f"dictionary {dictionary.name}: expected documents of three tokens or more to splice it into, found none; "
            "give longer text"
        )
    batches = list(_batches(model, rows, batch_tokens))
    total = torch.zeros(dictionary.width, dtype=torch.float64)

    def look(batch: _Batch, h: Float[Tensor, "rows seq d"]) -> Tensor:
        """Leave the residual stream as it is, and find out where it may be replaced."""
        batch.replaced = batch.attention.bool() & inliers(dictionary, h).to(batch.attention.device)
        batch.replaced[:, 0] = False
        total.add_(h[batch.replaced.to(h.device)].double().sum(0).cpu())
        return h

    def reconstruct(x: Float[Tensor, "tokens d"]) -> Tensor:
        x = x.to(dictionary.W_enc.device)
        return torch.cat([dictionary.reconstruct(x[part]) for part in chunks(len(x), dictionary.latents)])

    plain = _loss(model, site, batches, look)
    tokens = sum(int(b.counted.sum()) for b in batches)
    if not tokens:
        raise UsageError(
            f"dictionary {dictionary.name}: expected tokens whose residual norm is near its own, {dictionary.norm:g}, "
            f"found outliers alone; use a dictionary trained on {model.name}"
        )
    mean = (total / sum(int(b.replaced.sum()) for b in batches)).float()
    spliced = _loss(model, site, batches, _replacing(reconstruct))
    ablated = _loss(model, site, batches, _replacing(lambda x: mean.expand(len(x), -1)))
    plain, spliced, ablated = plain / tokens, spliced / tokens, ablated / tokens
    # If no later block reads the site, ablation changes nothing and there is nothing to recover.
    recovered = (ablated - spliced) / (ablated - plain) if ablated != plain else float("nan")
    return Spliced(plain, spliced, ablated, recovered, tokens)


def _batches(model: SteeredModel, rows: Sequence[list[int]], batch_tokens: int) -> Iterator[_Batch]:
    """Batches of documents of similar length: as many as fit into `batch_tokens`, but at least one."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= batch_tokens:
            end += 1
        ids, attention = padded(rows[start:end], device=model.device)
        yield _Batch(ids, attention, torch.zeros_like(attention, dtype=torch.bool))
        start = end


def _replacing(replacement: Callable[[Tensor], Tensor]) -> Change:
    def change(batch: _Batch, h: Float[Tensor, "rows seq d"]) -> Tensor:
        h, where = h.clone(), batch.replaced.to(h.device)
        h[where] = replacement(h[where]).to(h.device, h.dtype)
        return h

    return change


def _loss(model: SteeredModel, site: int, batches: Sequence[_Batch], change: Change) -> float:
    """Summed cross-entropy of the counted predictions, with the residual stream at the site changed."""
    block = model.hf.get_submodule(model.anatomy.block_module(site))
    loss = 0.0
    for b in batches:
        with model.untouched(), changed_output(block, partial(change, b)):
            hidden = hidden_states(model, b.ids, b.attention)
        states = hidden[:, :-1][b.counted.to(hidden.device)]
        targets = b.ids[:, 1:][b.counted]
        for part, made in logits_in_chunks(model, states):
            loss += float(cross_entropy(made, targets[part].to(made.device), reduction="sum").double())
    return loss

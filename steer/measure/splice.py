"""What a dictionary keeps of the model's predictions: cross-entropy with its reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from steer.errors import UsageError
from steer.features.pooling import check_fits, kept
from steer.live.forward import changed_output, chunks, hidden_states, logits_in_chunks
from steer.live.model import SteeredModel
from steer.live.record import reading
from steer.live.tokens import padded
from steer.values.dictionary import Dictionary

Replacement = Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]]


@dataclass(frozen=True)
class Spliced:
    """Cross-entropies of the next token, nats per token, over the same tokens in all three."""

    plain: float
    """The model as it is."""
    spliced: float
    """The residual stream at the site replaced by the dictionary's reconstruction of it."""
    ablated: float
    """The residual stream at the site replaced by its mean over these tokens (mean ablation)."""
    recovered: float
    """`(ablated - spliced) / (ablated - plain)`: 1 for a perfect dictionary, 0 for one that only knows the mean."""
    tokens: int
    """Predictions that the means are over."""

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Batch:
    ids: Tensor
    attention: Tensor
    replaced: Bool[Tensor, "rows seq"]
    """Positions whose residual is replaced; the predictions made there, of tokens that exist, are what is counted."""


@torch.inference_mode()
def cross_entropies(
    model: SteeredModel,
    dictionary: Dictionary,
    documents: Sequence[list[int]],
    *,
    batch_tokens: int = 4096,
    on_tokens: Callable[[int], None] | None = None,
) -> Spliced:
    """Run the documents (token ids, BOS where the model wants one) three times and compare the losses.

    A document's first position, and outliers (residual norm over ten times the dictionary's), are left as they are
    in all three, and the predictions made there are not counted: neither is what a dictionary is trained on.
    `on_tokens` is told of each pass.
    Errors: UsageError when no document has two tokens to predict from, and those of `check_fits`.
    """
    site = check_fits(model, dictionary)
    rows = sorted((d for d in documents if len(d) > 2), key=len)
    if not rows:
        raise UsageError(
            f"dictionary {dictionary.name}: expected documents of three tokens or more to splice it into, found none; "
            "give longer text"
        )
    total = torch.zeros(dictionary.width, dtype=torch.float64)
    positions = 0
    batches: list[_Batch] = []
    plain = 0.0
    for ids, attention in _batches(model, rows, batch_tokens):
        seen: list[Tensor] = []
        with model.untouched(), reading(model.hf, model.anatomy, [site], lambda _, h, s=seen: s.append(h)):
            hidden = hidden_states(model, ids, attention)
        h = seen[0]
        replaced = attention.bool().to(h.device) & kept(dictionary, h)
        replaced[:, 0] = False
        total += h[replaced].double().sum(0).cpu()
        positions += int(replaced.sum())
        batches.append(_Batch(ids, attention, replaced))
        plain += _loss(model, hidden, batches[-1])
        _tell(on_tokens, attention)
    tokens = sum(int(_counted(b).sum()) for b in batches)
    if not tokens:
        raise UsageError(
            f"dictionary {dictionary.name}: expected tokens whose residual norm is near its own, {dictionary.norm:g}, "
            f"found outliers alone; use a dictionary trained on {model.name}"
        )
    mean = (total / positions).float()

    def reconstruct(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        x = x.to(dictionary.W_enc.device)
        return torch.cat([dictionary.reconstruct(x[part]) for part in chunks(len(x), dictionary.latents)])

    sums = []
    for replacement in (reconstruct, lambda x: mean.expand(len(x), -1)):
        loss = 0.0
        for b in batches:

            def splice(h: Tensor, where: Tensor = b.replaced, by: Replacement = replacement) -> Tensor:
                h, where = h.clone(), where.to(h.device)
                h[where] = by(h[where]).to(h.device, h.dtype)
                return h

            block = model.hf.get_submodule(model.anatomy.block_module(site))
            with model.untouched(), changed_output(block, splice):
                hidden = hidden_states(model, b.ids, b.attention)
            loss += _loss(model, hidden, b)
            _tell(on_tokens, b.attention)
        sums.append(loss)
    plain, spliced, ablated = (s / tokens for s in (plain, *sums))
    # A site that no later block reads has nothing to recover.
    recovered = (ablated - spliced) / (ablated - plain) if ablated != plain else float("nan")
    return Spliced(plain, spliced, ablated, recovered, tokens)


def _batches(model: SteeredModel, rows: Sequence[list[int]], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, attention mask) of documents of like length, as many as fit into `batch_tokens`, one at least."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= batch_tokens:
            end += 1
        yield padded(rows[start:end], device=model.device)
        start = end


def _counted(batch: _Batch) -> Bool[Tensor, "rows seq-1"]:
    """Positions that were replaced and are followed by a token."""
    return batch.replaced[:, :-1] & batch.attention[:, 1:].bool().to(batch.replaced.device)


def _loss(model: SteeredModel, hidden: Float[Tensor, "rows seq d"], batch: _Batch) -> float:
    """Summed cross-entropy of the counted predictions, a chunk of tokens at a time."""
    counted = _counted(batch)
    states = hidden[:, :-1][counted.to(hidden.device)]
    targets = batch.ids[:, 1:][counted.to(batch.ids.device)]
    loss = 0.0
    for part, made in logits_in_chunks(model, states):
        loss += float(cross_entropy(made, targets[part].to(made.device), reduction="sum").double())
    return loss


def _tell(on_tokens: Callable[[int], None] | None, attention: Tensor) -> None:
    if on_tokens is not None:
        on_tokens(int(attention.sum()))

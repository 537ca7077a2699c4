"""How well a dictionary preserves the model's predictions: cross-entropy with its reconstruction spliced in.

`steer train` measures it once, after training, on held-out documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from steer.core.dictionary import Dictionary
from steer.errors import UsageError
from steer.model.forward import changed_output, chunks, hidden_states, logits_in_chunks
from steer.model.record import reading
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.sae.pooling import check_fits, kept

Replacement = Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]]
"""Maps residual streams to their replacements."""


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

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON, for the manifest."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Batch:
    ids: Tensor
    attention: Tensor
    replaced: Bool[Tensor, "rows seq"]
    """Positions whose residual stream is replaced. Predictions made there are counted if a token follows."""


@torch.inference_mode()
def cross_entropies(
    model: SteeredModel,
    dictionary: Dictionary,
    documents: Sequence[list[int]],
    *,
    batch_tokens: int = 4096,
    on_tokens: Callable[[int], None] | None = None,
) -> Spliced:
    """Run the documents three times (unchanged, reconstructed, mean-ablated) and compare the losses.

    `documents` are token ids, with BOS if the model uses one; `batch_tokens` is the number of tokens per forward pass.
    A document's first position and outliers (residual norm over ten times the dictionary's) are not replaced, and
    predictions made there are not counted: a dictionary is not trained on them. `on_tokens` is called with the number
    of tokens of each forward pass.
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
        _report(on_tokens, attention)
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

            def splice(h: Tensor, where: Tensor = b.replaced, replace: Replacement = replacement) -> Tensor:
                h, where = h.clone(), where.to(h.device)
                h[where] = replace(h[where]).to(h.device, h.dtype)
                return h

            block = model.hf.get_submodule(model.anatomy.block_module(site))
            with model.untouched(), changed_output(block, splice):
                hidden = hidden_states(model, b.ids, b.attention)
            loss += _loss(model, hidden, b)
            _report(on_tokens, b.attention)
        sums.append(loss)
    plain, spliced, ablated = (s / tokens for s in (plain, *sums))
    # If no later block reads the site, ablation changes nothing and there is nothing to recover.
    recovered = (ablated - spliced) / (ablated - plain) if ablated != plain else float("nan")
    return Spliced(plain, spliced, ablated, recovered, tokens)


def _batches(model: SteeredModel, rows: Sequence[list[int]], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, attention mask) of documents of similar length: as many as fit into `batch_tokens`, but at least
    one."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * len(rows[end]) <= batch_tokens:
            end += 1
        yield padded(rows[start:end], device=model.device)
        start = end


def _counted(batch: _Batch) -> Bool[Tensor, "rows seq-1"]:
    """Mask of the predictions that are counted: made at replaced positions that are followed by a token."""
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


def _report(on_tokens: Callable[[int], None] | None, attention: Tensor) -> None:
    if on_tokens is not None:
        on_tokens(int(attention.sum()))

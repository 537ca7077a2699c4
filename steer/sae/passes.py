"""Forward passes over documents, batched by length and stopped after the last site that is needed.

`harvest` writes the residual streams to disk, `stream` puts them into a shuffle buffer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.core.fit import OUTLIER
from steer.errors import UsageError
from steer.model.forward import read_residuals
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.sae.documents import Document

WINDOW = 1 << 17
"""Documents are sorted by length within a window of this many tokens before they are cut into batches."""

Numbered = tuple[int, Document]
"""(number of the document in the text, document)."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pass:
    """The result of one forward pass: the text tokens of its documents in order, without special tokens."""

    number: int
    """Number of the pass, counted from 0 over the whole text."""
    special: Bool[Tensor, " all"]
    """Per token of the pass, special tokens included: whether it is special."""
    place: Int[Tensor, " n"]
    """Index of each text token among all tokens of the pass."""
    token_ids: Int[Tensor, " n"]
    document: Int[Tensor, " n"]
    """Number of each token's document."""
    position: Int[Tensor, " n"]
    """Position of each token in its document."""
    residuals: dict[int, Float[Tensor, "n d"]]
    """Site -> residual stream, in the model's dtype and on its device."""

    def norms(self, site: int) -> Float[Tensor, " n"]:
        """Residual norms at a site, in fp32 or wider, on the CPU."""
        h = self.residuals[site]
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.linalg.vector_norm(h, dim=-1, dtype=wide).cpu()

    def outliers(self, limits: Mapping[int, float]) -> dict[int, Bool[Tensor, " n"]]:
        """Site -> mask of the tokens whose norm is over the limit; a norm that is not a number counts as over it."""
        return {site: ~(self.norms(site) <= limit) for site, limit in limits.items()}

    def __len__(self) -> int:
        return len(self.place)


def norm_limits(passes: Sequence[Pass]) -> tuple[dict[int, float], dict[int, float]]:
    """(site -> norm above which a token is left out as an outlier, ten times the median over these passes, site ->
    median norm of the other tokens). The passes must have at least one token."""
    limits, medians = {}, {}
    for site in passes[0].residuals:
        norms = torch.cat([p.norms(site) for p in passes])
        limits[site] = OUTLIER * float(norms.nanmedian())
        medians[site] = float(norms[norms <= limits[site]].median())
    return limits, medians


def first_tokens(items: Iterator[T], wanted: int, tokens_of: Callable[[T], int]) -> list[T]:
    """Take the first items from an iterator, with `wanted` tokens together, or all if there are fewer."""
    taken: list[T] = []
    while wanted > 0 and (item := next(items, None)) is not None:
        taken.append(item)
        wanted -= tokens_of(item)
    return taken


def check_sites(model: SteeredModel, sites: Sequence[int]) -> list[int]:
    """The sites sorted and without duplicates. Errors: UsageError for none, or for one that the model lacks."""
    blocks = model.anatomy.blocks
    for site in sites:
        if not 0 <= site < blocks:
            raise UsageError(f"site {site}: expected a block of {model.name} from 0 to {blocks - 1}")
    if not sites:
        raise UsageError(f"site: expected a block of {model.name} from 0 to {blocks - 1}, found none")
    return sorted(set(sites))


def default_batch_tokens(model: SteeredModel) -> int:
    """Tokens per forward pass: enough to keep a GPU busy, or few enough to stay in the caches of a CPU."""
    return 2048 if model.device.type == "cpu" else 16384


def passes(
    model: SteeredModel, numbered: Iterable[Numbered], sites: Sequence[int], *, batch_tokens: int, skip: int = 0
) -> Iterator[Pass]:
    """Run documents through the unsteered model up to the last of `sites` and yield one `Pass` per batch.

    The first `skip` passes are counted but not run, to resume a harvest. The division of documents into passes depends
    only on the documents and on `batch_tokens`.
    Errors: CheckpointError when most residual streams of the first pass are not finite.
    """
    batches = islice(enumerate(batches_by_length(numbered, batch_tokens)), skip, None)
    number, batch = next(batches, (0, None))
    checked = False
    while batch is not None:
        ids, _ = padded([d.ids for _, d in batch])  # no mask: see `tokens.padded`
        found: dict[int, Tensor] = {}
        with torch.no_grad(), model.untouched():
            read_residuals(model, ids.to(model.device), sites, found.__setitem__)
        lengths = torch.tensor([len(d.ids) for _, d in batch])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        special = torch.tensor([s for _, d in batch for s in d.special])
        at = real.reshape(-1).nonzero()[:, 0][~special]
        made = Pass(
            number=number,
            special=special,
            place=(~special).nonzero()[:, 0],
            token_ids=ids.reshape(-1)[at],
            document=torch.tensor([n for n, _ in batch])[at // ids.shape[1]],
            position=at % ids.shape[1],
            residuals={s: h.reshape(-1, h.shape[-1]).index_select(0, at.to(h.device)) for s, h in found.items()},
        )
        # Read the text of the next pass while a GPU still computes this one.
        number, batch = next(batches, (0, None))
        if not checked:
            # A few norms that are not finite are outliers; if most are, this dtype overflows with this model.
            norms = torch.cat([made.norms(site) for site in sites])
            if norms.isfinite().sum() < len(norms) / 2:
                raise model.overflow()
            checked = True
        yield made


def batches_by_length(numbered: Iterable[Numbered], batch_tokens: int) -> Iterator[list[Numbered]]:
    """Batches of documents of similar length, at most `batch_tokens` tokens per batch with padding, or one document."""
    numbered = iter(numbered)
    while window := first_tokens(numbered, WINDOW, lambda item: len(item[1].ids)):
        batches: list[list[Numbered]] = []
        for item in sorted(window, key=lambda item: -len(item[1].ids)):
            if not batches or (len(batches[-1]) + 1) * len(batches[-1][0][1].ids) > batch_tokens:
                batches.append([])
            batches[-1].append(item)
        # Shuffled, or training from a stream would see long texts first and short ones last in every window.
        random.Random(len(window)).shuffle(batches)
        yield from batches

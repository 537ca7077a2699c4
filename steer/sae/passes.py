"""Forward passes over documents that stop after the last site needed: documents batched by length, no LM head, no
KV cache.

Between `documents` and the two consumers of activations, `harvest` (to disk) and `stream` (to a buffer).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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

    def outliers(self, limits: Limits) -> dict[int, Bool[Tensor, " n"]]:
        """Site -> mask of the tokens whose norm is over the limit; a norm that is not a number counts as over it."""
        return {site: ~(self.norms(site) <= limit) for site, limit in limits.limit.items()}

    def __len__(self) -> int:
        return len(self.place)


@dataclass(frozen=True)
class Limits:
    """Per site, the norm above which a token is left out as an outlier; measured on the first tokens of a text."""

    limit: dict[int, float]
    """Site -> largest norm that is kept."""
    norm: dict[int, float]
    """Site -> median norm of the tokens that are kept."""

    @classmethod
    def measure(cls, passes: Sequence[Pass]) -> Limits:
        """Limits of ten times the median norm over these passes, which must have at least one token."""
        limit, norm = {}, {}
        for site in passes[0].residuals:
            norms = torch.cat([p.norms(site) for p in passes])
            limit[site] = OUTLIER * float(norms.nanmedian())
            norm[site] = float(norms[norms <= limit[site]].median())
        return cls(limit, norm)


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
    batches = enumerate(batches_by_length(numbered, batch_tokens))
    number, batch = next(((n, b) for n, b in batches if n >= skip), (0, None))
    checked = False
    while batch is not None:
        ids, _ = padded([d.ids for _, d in batch])  # no mask: see `tokens.padded`
        found = cut_forward(model, ids.to(model.device), sites)
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
    window: list[Numbered] = []
    size = 0
    for item in numbered:
        window.append(item)
        size += len(item[1].ids)
        if size >= WINDOW:
            yield from _cut(window, batch_tokens)
            window, size = [], 0
    yield from _cut(window, batch_tokens)


def cut_forward(
    model: SteeredModel, ids: Int[Tensor, "rows seq"], sites: Sequence[int]
) -> dict[int, Float[Tensor, "rows seq d"]]:
    """Site -> unsteered residual stream after its block. Standing sliders are off, and no block after the last of
    `sites` runs."""
    found: dict[int, Tensor] = {}
    with torch.no_grad(), model.untouched():
        read_residuals(model, ids, sites, found.__setitem__)
    return found


def _cut(window: list[Numbered], batch_tokens: int) -> list[list[Numbered]]:
    out: list[list[Numbered]] = []
    for item in sorted(window, key=lambda item: -len(item[1].ids)):
        if not out or (len(out[-1]) + 1) * len(out[-1][0][1].ids) > batch_tokens:
            out.append([])
        out[-1].append(item)
    # Shuffled, or training from a stream would see long texts first and short ones last in every window.
    random.Random(len(window)).shuffle(out)
    return out

"""Forward passes over documents, cut after the last site wanted: batches by length, no head, no cache."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.errors import UsageError
from steer.features.documents import Document
from steer.live.forward import read_residuals
from steer.live.model import SteeredModel
from steer.live.tokens import padded
from steer.values.fit import OUTLIER

WINDOW = 1 << 17
"""Tokens of text that are sorted by length before they are cut into batches."""

Numbered = tuple[int, Document]
"""A document with its number."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: the text tokens of its documents, special tokens left out, in order."""

    number: int
    """Counted from 0 over the whole text."""
    special: Bool[Tensor, " all"]
    """Of every token, the special ones among them."""
    place: Int[Tensor, " n"]
    """Where each text token stands among all."""
    token_ids: Int[Tensor, " n"]
    document: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    """Place in its document."""
    residuals: dict[int, Float[Tensor, "n d"]]
    """By site, in the dtype and on the device where the model left them."""

    def norms(self, site: int) -> Float[Tensor, " n"]:
        """Residual norms at a site, fp32 at least, on the CPU."""
        h = self.residuals[site]
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.linalg.vector_norm(h, dim=-1, dtype=wide).cpu()

    def outliers(self, limits: Limits) -> dict[int, Bool[Tensor, " n"]]:
        """Which tokens are over the limit at each site; one that is no number is."""
        return {site: ~(self.norms(site) <= limit) for site, limit in limits.limit.items()}

    def __len__(self) -> int:
        return len(self.place)


@dataclass(frozen=True)
class Limits:
    """From which norm on a token is left out, per site, fixed by the first tokens of a text."""

    limit: dict[int, float]
    norm: dict[int, float]
    """Median norm of the tokens that are not."""

    @classmethod
    def measure(cls, passes: Sequence[Pass]) -> Limits:
        """Ten times the median norm over these passes, which have at least one token."""
        limit, norm = {}, {}
        for site in passes[0].residuals:
            norms = torch.cat([p.norms(site) for p in passes])
            limit[site] = OUTLIER * float(norms.nanmedian())
            norm[site] = float(norms[norms <= limit[site]].median())
        return cls(limit, norm)


def check_sites(model: SteeredModel, sites: Sequence[int]) -> list[int]:
    """Sites in order, each once. Errors: UsageError for none, or one that the model lacks."""
    blocks = model.anatomy.blocks
    for site in sites:
        if not 0 <= site < blocks:
            raise UsageError(f"site {site}: expected a block of {model.name} from 0 to {blocks - 1}")
    if not sites:
        raise UsageError(f"site: expected a block of {model.name} from 0 to {blocks - 1}, found none")
    return sorted(set(sites))


def default_batch_tokens(model: SteeredModel) -> int:
    """Tokens a pass: what keeps a GPU busy, or what stays in the caches of a CPU."""
    return 2048 if model.device.type == "cpu" else 16384


def passes(
    model: SteeredModel, numbered: Iterable[Numbered], sites: Sequence[int], *, batch_tokens: int, skip: int = 0
) -> Iterator[Pass]:
    """Run documents through the model up to the last of `sites`. The first `skip` passes are not made, only counted.

    How documents fall into passes depends on them and on `batch_tokens` alone.
    Errors: CheckpointError where most residual streams of the first pass are not finite.
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
        # A GPU still works on this pass: read the text of the next one meanwhile.
        number, batch = next(batches, (0, None))
        if not checked:
            # One that is not finite is an outlier; where most are, the dtype cannot hold what this model computes.
            norms = torch.cat([made.norms(site) for site in sites])
            if norms.isfinite().sum() < len(norms) / 2:
                raise model.overflow()
            checked = True
        yield made


def batches_by_length(numbered: Iterable[Numbered], batch_tokens: int) -> Iterator[list[Numbered]]:
    """Documents of like length together, at most `batch_tokens` a batch with its padding (or one document)."""
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
    """The residual stream after each of `sites`, whatever sliders stand; no block after the last of them runs."""
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
    # Else a stream would learn from long texts first and from short ones last, window for window.
    random.Random(len(window)).shuffle(out)
    return out

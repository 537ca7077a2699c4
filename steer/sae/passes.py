"""Forward passes over documents, batched by length and stopped after the last site that is needed.

`harvest` writes the residual streams to disk. `ModelStream` puts them into a shuffle buffer and draws training batches
from it, for runs whose harvest would not fit on the disk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

from steer.core.fit import OUTLIER
from steer.errors import UsageError
from steer.model.forward import read_residuals
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.sae.documents import Document, as_sources, documents
from steer.sae.shards import check_batch, check_source, is_held_out

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


class ModelStream:
    """Batches of residual streams at one site, computed on demand; the text starts again when it ends.

    The shuffle buffer holds exactly `buffer` tokens whenever a batch is drawn from it. A batch is drawn at random
    and its places are refilled with the next tokens of the text, so that a token waits `buffer / batch` batches on
    average, and no token comes twice in an epoch or is lost. Tokens of a forward pass for which no place is free wait
    in front of the buffer: fewer than `batch_tokens`.

    Special tokens are left out, and so are tokens of over ten times the median norm of the held-out tokens. With
    several processes (`rank` of `world`) each process reads different documents, has its share of `batch` and
    `buffer`, and its own state.

        stream = ModelStream(model, "text.jsonl", site=14, batch=2048)
        x = next(stream)  # [2048, d], bf16
    """

    def __init__(
        self,
        model: SteeredModel,
        sources: str | Sequence[str],
        *,
        site: int,
        batch: int,
        buffer: int = 131072,
        context: int = 512,
        seed: int = 0,
        held_out: float = 0.05,
        held_out_tokens: int = 20000,
        rank: int = 0,
        world: int = 1,
        batch_tokens: int | None = None,
    ) -> None:
        """Read as much of the text as is needed for `held_out_tokens` tokens of held-out documents.

        `held_out` is the share of documents that is held out, `batch_tokens` the tokens per forward pass.
        Errors: those of `documents`; UsageError for a site that the model lacks, a buffer smaller than a batch, or a
        text in which no document is held out.
        """
        check_sites(model, [site])
        check_batch(batch, rank, world)
        if buffer < batch:
            raise UsageError(f"buffer: expected at least a batch of {batch} tokens, found {buffer}")
        self.model, self.sources, self.site, self.context = model, as_sources(sources), site, context
        self.batch, self.size, self.share = batch // world, buffer // world, held_out
        self.rank, self.world = rank, world
        self.batch_tokens = batch_tokens or default_batch_tokens(model)
        self._source = {
            "text": ", ".join(self.sources), "site": site, "batch": self.batch, "size": self.size, "context": context,
            "batch_tokens": self.batch_tokens, "seed": seed, "held_out": held_out, "rank": rank, "world": world,
        }  # fmt: skip
        self.epoch = 0
        """How many times the text has been read to its end."""
        self._passes, self._rows = 0, self._all_rows()
        self._waiting = self._buffer = torch.empty(0, model.anatomy.width, dtype=torch.bfloat16)
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        self._limit: dict[int, float]
        self.norm: float
        """Median residual norm of the held-out tokens."""
        self.held_out: BFloat16[Tensor, "n d"] = self._held_out_rows(held_out_tokens)
        """The first tokens of held-out documents, which are never in a batch; the same in every process."""

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self._waiting.shape[1]

    def peek(self, tokens: int = 16384) -> BFloat16[Tensor, "n d"]:
        """The first `tokens` tokens of the buffer, copied and not removed: a sample of the training data."""
        self._fill()
        return self._buffer[:tokens].clone()

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        self._fill()
        places = torch.randperm(self.size, generator=self._generator)[: self.batch]
        out = self._buffer[places]
        self._refill(places)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on, including a copy of the buffer."""
        return {
            **self._source,
            "epoch": self.epoch,
            "passes": self._passes,
            "generator": self._generator.get_state(),
            "waiting": self._waiting.clone(),
            "buffer": self._buffer.clone(),
            "limit": self._limit,
            "norm": self.norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_source(state, self._source)
        self.epoch, self._passes, self._rows = state["epoch"], state["passes"], self._all_rows()
        self._generator.set_state(state["generator"])
        self._waiting, self._buffer = state["waiting"].clone(), state["buffer"].clone()
        self._limit, self.norm = state["limit"], state["norm"]

    def _fill(self) -> None:
        if not len(self._buffer):
            self._buffer = torch.empty(self.size, self.width, dtype=torch.bfloat16)
            self._refill(torch.arange(self.size))

    def _refill(self, places: Tensor) -> None:
        """Write the next tokens of the text into `places` of the buffer."""
        while len(places):
            if not len(self._waiting):
                self._waiting = next(self._rows)
            taken, self._waiting = self._waiting[: len(places)], self._waiting[len(places) :]
            self._buffer[places[: len(taken)]] = taken
            places = places[len(taken) :]

    def _all_rows(self) -> Iterator[Tensor]:
        """The tokens of each pass, without special tokens and outliers. The text starts again when it has ended."""
        while True:
            start, found = self._passes, False
            for p in self._run(held=False, skip=start):
                self._passes += 1
                if len(rows := self._inliers(p)):
                    found = True
                    yield rows
            if not found and not start:
                raise UsageError(
                    f"{', '.join(self.sources)}: expected tokens to train on, found none beside held-out ones; give "
                    "more text"
                )
            self.epoch, self._passes = self.epoch + 1, 0

    def _inliers(self, p: Pass) -> Tensor:
        far = p.outliers(self._limit)[self.site]
        h = p.residuals[self.site]
        return h[(~far).to(h.device)].to("cpu", torch.bfloat16)

    def _held_out_rows(self, wanted: int) -> Tensor:
        found = first_tokens(self._run(held=True), wanted, len)
        if not any(map(len, found)):
            raise UsageError(
                f"{', '.join(self.sources)}: expected held-out documents, found none in all of the text; give more text"
            )
        self._limit, norms = norm_limits(found)
        self.norm = norms[self.site]
        return torch.cat([self._inliers(p) for p in found])[:wanted]

    def _run(self, held: bool, skip: int = 0) -> Iterator[Pass]:
        """Run the documents that are held out, the same in every process, or those that this process trains on."""
        numbered = (
            (n, document)
            for n, document in enumerate(documents(self.model, self.sources, context=self.context))
            if bool(is_held_out(torch.tensor([n]), self.share)) is held and (held or n % self.world == self.rank)
        )
        return passes(self.model, numbered, [self.site], batch_tokens=self.batch_tokens, skip=skip)

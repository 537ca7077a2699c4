"""Training rows straight from the model, through a shuffle buffer, for runs whose harvest would not fit on the disk.

`steer train MODEL --text` uses a `ModelStream` in place of a harvest; both are `shards.Batches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor

from steer.errors import UsageError
from steer.model.steered import SteeredModel
from steer.sae.documents import as_sources, documents
from steer.sae.passes import Pass, check_sites, default_batch_tokens, first_tokens, norm_limits, passes
from steer.sae.shards import check_batch, check_source, is_held_out


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
        self._passes = 0
        self._made: Iterator[Pass] | None = None
        self._waiting = torch.empty(0, model.anatomy.width, dtype=torch.bfloat16)
        self._buffer: Tensor | None = None
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
        return self._filled()[:tokens].clone()

    def _filled(self) -> BFloat16[Tensor, "buffer d"]:
        if self._buffer is None:
            self._buffer = torch.empty(self.size, self.width, dtype=torch.bfloat16)
            self._refill(self._buffer, torch.arange(self.size))
        return self._buffer

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        buffer = self._filled()
        places = torch.randperm(self.size, generator=self._generator)[: self.batch]
        out = buffer[places]
        self._refill(buffer, places)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on, including a copy of the buffer."""
        return {
            **self._source,
            "epoch": self.epoch,
            "passes": self._passes,
            "generator": self._generator.get_state(),
            "waiting": self._waiting.clone(),
            "buffer": self._waiting[:0].clone() if self._buffer is None else self._buffer.clone(),
            "limit": self._limit,
            "norm": self.norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_source(state, self._source)
        self.epoch, self._passes, self._made = state["epoch"], state["passes"], None
        self._generator.set_state(state["generator"])
        self._waiting = state["waiting"].clone()
        self._buffer = state["buffer"].clone() if len(state["buffer"]) else None
        self._limit, self.norm = state["limit"], state["norm"]

    def _refill(self, buffer: Tensor, places: Tensor) -> None:
        """Write the next tokens of the text into `places` of the buffer."""
        while len(places):
            if not len(self._waiting):
                self._waiting = self._next_rows()
            taken, self._waiting = self._waiting[: len(places)], self._waiting[len(places) :]
            buffer[places[: len(taken)]] = taken
            places = places[len(taken) :]

    def _next_rows(self) -> Tensor:
        """The tokens of the next pass, without special tokens and outliers. The text starts again when it has ended."""
        ended = 0
        while ended < 2:
            if self._made is None:
                self._made = self._run(held=False, skip=self._passes)
            p = next(self._made, None)
            if p is None:
                self.epoch, self._passes, self._made = self.epoch + 1, 0, None
                ended += 1
                continue
            self._passes += 1
            if len(rows := self._kept(p)):
                return rows
        raise UsageError(
            f"{', '.join(self.sources)}: expected tokens to train on, found none beside held-out ones; give more text"
        )

    def _kept(self, p: Pass) -> Tensor:
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
        return torch.cat([self._kept(p) for p in found])[:wanted]

    def _run(self, held: bool, skip: int = 0) -> Iterator[Pass]:
        """Run the documents that are held out, the same in every process, or those that this process trains on."""
        numbered = (
            (n, document)
            for n, document in enumerate(documents(self.model, self.sources, context=self.context))
            if bool(is_held_out(torch.tensor([n]), self.share)) is held and (held or n % self.world == self.rank)
        )
        return passes(self.model, numbered, [self.site], batch_tokens=self.batch_tokens, skip=skip)

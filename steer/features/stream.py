"""Training rows from the model itself, through a shuffle buffer, for when a harvest would not fit on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor

from steer.errors import MismatchError, UsageError
from steer.features.batches import check_batch, is_held_out
from steer.features.documents import Document, as_sources, documents
from steer.features.passes import Limits, Pass, check_sites, default_batch_tokens, passes
from steer.live.model import SteeredModel


class ModelStream:
    """Batches of residual streams at one site, made as they are wanted; the text begins anew when it ends.

    The shuffle buffer holds exactly `buffer` tokens whenever a batch is drawn from it. A batch is drawn at random
    and the places it leaves are filled with the next tokens of the text, so that a token waits `buffer / batch`
    batches on average, and none comes twice in an epoch or is lost. What a forward pass makes beyond the places
    that are free waits in front of the buffer: fewer than `batch_tokens` tokens.

    Special tokens are left out, and tokens over ten times the median norm of the held-out tokens. With several
    processes each reads documents of its own, with its share of `batch` and `buffer`; each has its own state.
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
        """Read as much text as the held-out tokens need.

        Errors: those of `documents`; UsageError for a site that there is not, a buffer smaller than a batch, or a
        text in which nothing is held out.
        """
        check_sites(model, [site])
        check_batch(batch, rank, world)
        if buffer < batch:
            raise UsageError(f"buffer: expected at least a batch of {batch} tokens, found {buffer}")
        self.model, self.sources, self.site, self.context = model, as_sources(sources), site, context
        self.batch, self.size, self.seed, self.share = batch // world, buffer // world, seed, held_out
        self.rank, self.world = rank, world
        self.batch_tokens = batch_tokens or default_batch_tokens(model)
        self.left_out = {"special": 0, "outliers": 0}
        """Tokens left out so far."""
        self.epoch = 0
        """How often the text has ended."""
        self._passes = 0
        self._made: Iterator[Pass] | None = None
        self._waiting = torch.empty(0, model.anatomy.width, dtype=torch.bfloat16)
        self._buffer: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        self._limits: Limits
        self.held_out: BFloat16[Tensor, "n d"] = self._held_out_rows(held_out_tokens)
        """The first tokens of held-out documents, which never come in a batch; the same in every process."""

    @property
    def norm(self) -> float:
        """Median residual norm of the held-out tokens."""
        return self._limits.norm[self.site]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self._waiting.shape[1]

    @property
    def buffered(self) -> int:
        """Tokens in the buffer now: none before the first batch, then always its size."""
        return 0 if self._buffer is None else len(self._buffer)

    def __iter__(self) -> ModelStream:
        return self

    def peek(self, tokens: int = 16384) -> BFloat16[Tensor, "n d"]:
        """Tokens that are waiting in the buffer, which stay there: a sample of the training data."""
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
        """Everything that the next batches depend on, a copy of the buffer included."""
        return {
            **self._source(),
            "epoch": self.epoch,
            "passes": self._passes,
            "generator": self._generator.get_state(),
            "waiting": self._waiting.clone(),
            "buffer": self._waiting[:0].clone() if self._buffer is None else self._buffer.clone(),
            "limit": self._limits.limit[self.site],
            "norm": self.norm,
            **self.left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, ours in self._source().items():
            if state.get(name) != ours:
                raise MismatchError(
                    f"stream: expected to go on with {name} {state.get(name)}, found {ours}; "
                    "resume with the text and options that the training began with"
                )
        self.epoch, self._passes, self._made = state["epoch"], state["passes"], None
        self._generator.set_state(state["generator"])
        self._waiting = state["waiting"].clone()
        self._buffer = state["buffer"].clone() if len(state["buffer"]) else None
        self._limits = Limits({self.site: state["limit"]}, {self.site: state["norm"]})
        self.left_out = {name: state[name] for name in self.left_out}

    def _source(self) -> dict[str, Any]:
        return {
            "text": ", ".join(self.sources),
            "site": self.site,
            "batch": self.batch,
            "size": self.size,
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
            "held_out": self.share,
            "rank": self.rank,
            "world": self.world,
        }

    def _refill(self, buffer: Tensor, places: Tensor) -> None:
        """Put the next tokens of the text into these places."""
        while len(places):
            if not len(self._waiting):
                self._waiting = self._next_rows()
            taken, self._waiting = self._waiting[: len(places)], self._waiting[len(places) :]
            buffer[places[: len(taken)]] = taken
            places = places[len(taken) :]

    def _next_rows(self) -> Tensor:
        """The tokens of the next pass that are kept; the text begins anew when it has ended."""
        ended = 0
        while ended < 2:
            if self._made is None:
                self._made = self._run(self._documents(held=False), skip=self._passes)
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
        far = p.outliers(self._limits)[self.site]
        self.left_out["special"] += int(p.special.sum())
        self.left_out["outliers"] += int(far.sum())
        h = p.residuals[self.site]
        return h[(~far).to(h.device)].to("cpu", torch.bfloat16)

    def _held_out_rows(self, wanted: int) -> Tensor:
        held: list[Pass] = []
        left = wanted
        for p in self._run(self._documents(held=True)):
            held.append(p)
            left -= len(p)
            if left <= 0:
                break
        if not any(map(len, held)):
            raise UsageError(
                f"{', '.join(self.sources)}: expected held-out documents, found none in all of the text; give more text"
            )
        self._limits = Limits.measure(held)
        rows = torch.cat([self._kept(p) for p in held])[:wanted]
        self.left_out = dict.fromkeys(self.left_out, 0)
        return rows

    def _run(self, text: Iterator[tuple[int, Document]], skip: int = 0) -> Iterator[Pass]:
        return passes(self.model, text, [self.site], batch_tokens=self.batch_tokens, skip=skip)

    def _documents(self, held: bool) -> Iterator[tuple[int, Document]]:
        for n, document in enumerate(documents(self.model, self.sources, context=self.context)):
            if bool(is_held_out(torch.tensor([n]), self.share)) is not held:
                continue
            if held or n % self.world == self.rank:
                yield n, document

"""Rows of activations in exactly shuffled batches, and which documents are held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Int
from torch import Tensor

from steer.errors import MismatchError, UsageError

IN_MEMORY = 4 << 30
"""A site of at most this many bytes is read into memory once, for faster batches."""


class Batches(Protocol):
    """An endless source of training rows that can be stopped and gone on with."""

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        """The next batch; this process's slice of it where there are several."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch after the state. Errors: MismatchError for the state of another source."""
        ...


class Activations:
    """`[tokens, d]` in bf16 over memory-mapped shards; indexing it with a slice or row numbers reads those rows."""

    def __init__(self, shards: list[Tensor], shard_tokens: int, width: int) -> None:
        self.shards, self.shard_tokens = shards, shard_tokens
        self.shape = torch.Size([sum(len(s) for s in shards), width])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> BFloat16[Tensor, "n d"]:
        """A copy of these rows, in their order."""
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows.long()
        if len(self.shards) == 1:
            return self.shards[0].index_select(0, rows)
        # Sorted, each shard is read once and from its beginning to its end.
        rows, order = rows.sort()
        bounds = torch.searchsorted(rows, torch.arange(len(self.shards) + 1) * self.shard_tokens).tolist()
        parts = [
            shard.index_select(0, rows[a:b] - n * self.shard_tokens)
            for n, (shard, a, b) in enumerate(zip(self.shards, bounds, bounds[1:], strict=False))
            if b > a
        ]
        out = torch.empty(len(rows), self.shape[1], dtype=torch.bfloat16)
        return out.index_copy_(0, order, torch.cat(parts)) if parts else out

    def loaded(self, limit: int = IN_MEMORY) -> Activations:
        """Itself in memory where it is no larger than `limit` bytes."""
        if len(self) * self.shape[1] * 2 > limit:
            return self
        return Activations([torch.cat(self.shards)], max(len(self), 1), self.shape[1])


class ShuffledRows:
    """Batches of rows: each epoch's permutation after the other's, cut into batches of equal size.

    So every row comes exactly once an epoch, and a batch may hold the end of one and the start of the next.
    """

    def __init__(
        self, data: Activations, rows: Int[Tensor, " train"], batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        check_batch(batch, rank, world)
        self.data, self.rows, self.batch, self.seed = data, rows, batch, seed
        self.rank, self.world = rank, world
        self.step = 0
        """Batches given so far."""
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch begins in."""
        return self.step * self.batch // len(self.rows)

    def __iter__(self) -> ShuffledRows:
        return self

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        share = self.batch // self.world
        start = self.step * self.batch + self.rank * share
        self.step += 1
        return self.data[self.rows[self._span(start, start + share)]]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self._source()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, ours in self._source().items():
            if state.get(name) != ours:
                raise MismatchError(
                    f"batches: expected to go on with {name} {state.get(name)}, found {ours}; "
                    "resume with the harvest and options that the training began with"
                )
        self.step = state["step"]

    def _source(self) -> dict[str, int]:
        return {"rows": len(self.rows), "batch": self.batch, "seed": self.seed}

    def _span(self, start: int, end: int) -> Tensor:
        """Places `start` to `end` in the permutations laid end to end."""
        parts = []
        while start < end:
            epoch, at = divmod(start, len(self.rows))
            taken = self._permutation(epoch)[at : at + end - start]
            parts.append(taken)
            start += len(taken)
        return torch.cat(parts).long()

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            # A small prime apart, so that seed 0's second epoch is not seed 1's first.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            dtype = torch.int32 if len(self.rows) < 1 << 31 else torch.int64
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator, dtype=dtype)
        return self._order


def check_batch(batch: int, rank: int, world: int) -> None:
    """Raise UsageError unless every process gets an equal slice."""
    if batch < 1 or batch % world or not 0 <= rank < world:
        raise UsageError(
            f"batch: expected a multiple of the {world} processes, found {batch} (process {rank}); change the batch"
        )


def is_held_out(document: Int[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Whether documents are held out, by a hash of their number (splitmix64), the same everywhere."""
    with np.errstate(over="ignore"):
        z = (document.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share)

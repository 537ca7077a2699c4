"""Harvested activations on disk, and batches drawn from them.

`harvest` writes the shards; `train` and `labels` read them through `Harvest`. Shards are memory-mapped safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.checkpoint.staging import hash_file
from steer.errors import CheckpointError, MismatchError, UsageError
from steer.files import read_json_object, replacing, write_atomic

IN_MEMORY = 4 << 30
"""Activations of a site of at most this many bytes (4 GiB) are read into memory once, for faster batches."""


class Batches(Protocol):
    """An endless source of training rows whose position can be saved and restored."""

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        """The next batch; with several processes, this process's slice of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the source: tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the saved state. Errors: MismatchError for the state of another source."""
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
        # Sorted, so that each shard is read once, from its beginning to its end.
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
        """The same activations in memory, or this object itself if they are larger than `limit` bytes."""
        if len(self) * self.shape[1] * 2 > limit:
            return self
        return Activations([torch.cat(self.shards)], max(len(self), 1), self.shape[1])


class ShuffledRows:
    """Batches of rows: the permutations of all epochs one after another, cut into batches of equal size.

    Every row comes exactly once per epoch, and a batch may hold the end of one epoch and the start of the next.
    `rows` are the rows to draw from; with several processes, process `rank` of `world` gets its slice of each batch.
    """

    def __init__(
        self, data: Activations, rows: Int[Tensor, " train"], batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        check_batch(batch, rank, world)
        self.data, self.rows, self.batch, self.seed = data, rows, batch, seed
        self.rank, self.world = rank, world
        self.step = 0
        """Number of batches returned so far."""
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
        """Elements `start` to `end` of the concatenated permutations of all epochs."""
        parts = []
        while start < end:
            epoch, at = divmod(start, len(self.rows))
            taken = self._permutation(epoch)[at : at + end - start]
            parts.append(taken)
            start += len(taken)
        return torch.cat(parts).long()

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            # The seeds are 1,000,003 (a prime) apart, so that seed 0's second epoch is not seed 1's first.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            dtype = torch.int32 if len(self.rows) < 1 << 31 else torch.int64
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator, dtype=dtype)
        return self._order


def check_batch(batch: int, rank: int, world: int) -> None:
    """Raise UsageError unless `batch` divides into equal slices for `world` processes."""
    if batch < 1 or batch % world or not 0 <= rank < world:
        raise UsageError(
            f"batch: expected a multiple of the {world} processes, found {batch} (process {rank}); change the batch"
        )


def is_held_out(document: Int[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Mask of the documents that are held out: about `share` of them, by a hash (splitmix64) of the document's number,
    the same on every machine."""
    with np.errstate(over="ignore"):
        z = (document.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share)


MANIFEST = "manifest.json"
"""Written last: a harvest that has this file is complete."""
PARTIAL = "harvest.partial.json"
"""The record of the finished shards, while a harvest is running or after it was stopped."""
FORMAT = 1
_DTYPES = {torch.bfloat16: "BF16", torch.int32: "I32"}


@dataclass(frozen=True, eq=False)
class Harvest:
    """Residual streams of a text at some sites of one model, without special tokens and outliers.

    Rows are tokens. Row i of every site, of `token_ids`, `document` and `position` belongs to the same token.

        harvested = Harvest.open("harvest")
        x = harvested.activations(14)[:1000]  # [1000, d], bf16
    """

    place: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, place: str | Path) -> Harvest:
        """Read a harvest's manifest and check that its shards exist in full length.

        Errors: CheckpointError when `place` has no harvest, an unfinished one, or one with missing or truncated files.
        """
        place = Path(place)
        file = place / MANIFEST
        if not file.is_file():
            if (place / PARTIAL).is_file():
                raise CheckpointError(
                    f"{place}: expected a finished harvest, found one that was stopped; "
                    "run the same steer harvest again and it goes on from its finished shards"
                )
            raise CheckpointError(f"{place}: expected a harvest, found no {MANIFEST}; make one with steer harvest")
        manifest = read_record(file)
        if manifest.get("format") != FORMAT or "shards" not in manifest:
            raise CheckpointError(f"{file}: expected the manifest of a harvest, found another; harvest anew")
        check_shards(place, manifest["shards"])
        return cls(place, manifest)

    @property
    def sites(self) -> list[int]:
        """The blocks after which the residual stream was read."""
        return list(self.manifest["sites"])

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.manifest["width"]

    @property
    def tokens(self) -> int:
        """Number of tokens, which is the number of rows."""
        return self.manifest["tokens"]

    def norm(self, site: int) -> float:
        """Median residual norm at a site over the tokens of the first shard, without outliers."""
        self._check_site(site)
        return self.manifest["norm"][str(site)]

    def activations(self, site: int) -> Activations:
        """The residual stream at a site, memory-mapped. Errors: MismatchError for a site that was not harvested."""
        self._check_site(site)
        parts = [self._mapped(n, f"site{site}", "residual") for n in range(len(self.manifest["shards"]))]
        return Activations(parts, self.manifest["shard_tokens"], self.width)

    @cached_property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """The token id of each row."""
        return self._column("token_ids")

    @cached_property
    def document(self) -> Int[Tensor, " tokens"]:
        """The number of each row's document, from 0 in the order of the text. A document's rows are contiguous."""
        return self._column("document")

    @cached_property
    def position(self) -> Int[Tensor, " tokens"]:
        """The position of each row's token in its document, from 0, special tokens included."""
        return self._column("position")

    def split(self, held_out: float = 0.05) -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
        """(rows to train on, rows held out). About `held_out` of the documents are held out whole, the same ones in
        every run."""
        held = is_held_out(self.document, held_out)
        return (~held).nonzero()[:, 0], held.nonzero()[:, 0]

    def batches(
        self, site: int, batch: int, *, seed: int = 0, held_out: float = 0.05, rank: int = 0, world: int = 1
    ) -> Batches:
        """Batches of a site's training rows, exactly shuffled with a new permutation in each epoch.

        With several processes `batch` is the size of the joint batch, of which process `rank` of `world` gets a slice.
        Errors: UsageError when nothing is left to train on.
        """
        train, _ = self.split(held_out)
        if not len(train):
            raise UsageError(
                f"{self.place}: expected tokens to train on, found that all {self.tokens:,} are held out; harvest more"
            )
        return ShuffledRows(self.activations(site).loaded(), train, batch, seed, rank, world)

    def held_out_rows(self, site: int, limit: int | None = None, *, held_out: float = 0.05) -> BFloat16[Tensor, "n d"]:
        """Up to `limit` rows that `batches` never returns. Errors: UsageError when no document is held out."""
        _, rows = self.split(held_out)
        if not len(rows):
            raise UsageError(
                f"{self.place}: expected held-out tokens, found that no document is held out; harvest more documents"
            )
        return self.activations(site)[rows[:limit]]

    def _check_site(self, site: int) -> None:
        if site not in self.sites:
            raise MismatchError(
                f"{self.place}: expected one of its sites {', '.join(map(str, self.sites))}, found {site}; "
                f"harvest site {site}"
            )

    def _mapped(self, number: int, part: str, tensor: str) -> Tensor:
        return read_tensor(self.place / shard_name(number, part), tensor)

    def _column(self, name: str) -> Tensor:
        return torch.cat([self._mapped(n, "tokens", name) for n in range(len(self.manifest["shards"]))])


def shard_name(number: int, part: str) -> str:
    """The file name of one part of a shard; `part` is `tokens` or, for example, `site14`."""
    return f"shard-{number:05}.{part}.safetensors"


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file atomically; returns its name, size and sha256.

    Written by hand: the writer of the safetensors package holds the interpreter lock while it writes, and the model
    would wait.
    """
    entries, at = {}, 0
    for name, t in tensors.items():
        entries[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(file) as part, open(part, "xb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for t in tensors.values():
            f.write(t.contiguous().view(torch.uint8).numpy().reshape(-1).data)
    return {"file": file.name, "bytes": 8 + len(header) + at, "sha256": hash_file(file)}


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, memory-mapped. Errors: CheckpointError for a file that cannot be read."""
    try:
        with safe_open(str(file), framework="pt") as f:
            return f.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{file}: expected a shard of a harvest, found {e}; harvest anew") from e


def write_record(file: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_atomic(file, json.dumps(value, indent=2) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Errors: CheckpointError for anything else."""
    return read_json_object(file, do="harvest anew")


def check_shards(place: Path, shards: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless every file of the shards exists and has its recorded length."""
    for entry in (file for shard in shards for file in shard["files"]):
        path = place / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "none" if size is None else f"{size:,}"
            raise CheckpointError(f"{path}: expected {entry['bytes']:,} bytes, found {found}; harvest anew")

"""Harvested activations on disk, and batches drawn from them.

`harvest` writes the shards; `train` and `labels` read them through `Harvest`. Shards are memory-mapped safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Int
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.checkpoint.staging import hash_file
from steer.errors import CheckpointError, MismatchError, UsageError
from steer.files import read_json_object

IN_MEMORY = 4 << 30
"""Activations of a site of at most this many bytes (4 GiB) are read into memory once, for faster batches."""


def check_source(state: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Raise MismatchError unless a saved state is that of the same source of batches, with the same options."""
    for name, value in source.items():
        if state.get(name) != value:
            raise MismatchError(
                f"batches: expected to go on with {name} {state.get(name)}, found {value}; "
                "resume with the harvest or text and the options that the training began with"
            )


class Activations:
    """`[tokens, d]` in bf16 over memory-mapped shards; indexing it with a slice or row numbers reads those rows."""

    def __init__(self, shards: list[Tensor]) -> None:
        self.shards = shards
        self._starts = torch.tensor([0, *map(len, shards)]).cumsum(0)
        self.shape = torch.Size([int(self._starts[-1]), shards[0].shape[1]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> BFloat16[Tensor, "n d"]:
        """A copy of these rows, in their order."""
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows.long()
        if len(self.shards) == 1:
            return self.shards[0].index_select(0, rows)
        # Sorted, so that each shard is read once, from its beginning to its end.
        rows, order = rows.sort()
        bounds = torch.searchsorted(rows, self._starts).tolist()
        parts = [
            shard.index_select(0, rows[a:b] - start)
            for shard, start, a, b in zip(self.shards, self._starts, bounds, bounds[1:], strict=False)
            if b > a
        ]
        out = torch.empty(len(rows), self.shape[1], dtype=torch.bfloat16)
        return out.index_copy_(0, order, torch.cat(parts)) if parts else out

    def loaded(self, limit: int = IN_MEMORY) -> Activations:
        """The same activations in memory, or this object itself if they are larger than `limit` bytes."""
        return self if self.shape.numel() * 2 > limit else Activations([torch.cat(self.shards)])


class ShuffledRows:
    """Batches of rows: the permutations of all epochs one after another, cut into batches of equal size.

    Every row comes exactly once per epoch, and a batch may hold the end of one epoch and the start of the next.
    `rows` are the rows to draw from; with several processes, process `rank` of `world` gets its slice of each batch.
    """

    def __init__(
        self, data: Activations, rows: Int[Tensor, " train"], batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        check_batch(batch, rank, world)
        self.data, self.rows, self.batch, self.rank, self.world = data, rows, batch, rank, world
        self.step = 0
        """Number of batches returned so far."""
        self._source = {"rows": len(rows), "batch": batch, "seed": seed}
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __next__(self) -> BFloat16[Tensor, "batch d"]:
        """The next batch; with several processes, this process's slice of it."""
        share = self.batch // self.world
        start = self.step * self.batch + self.rank * share
        self.step += 1
        return self.data[self.rows[self._span(start, start + share)]]

    def state_dict(self) -> dict[str, Any]:
        """The position in the rows."""
        return {"step": self.step, **self._source}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the saved state. Errors: MismatchError for the state of another source."""
        check_source(state, self._source)
        self.step = state["step"]

    def _span(self, start: int, end: int) -> Tensor:
        """Elements `start` to `end` of the concatenated permutations of all epochs."""
        parts = []
        while start < end:
            epoch, at = divmod(start, len(self.rows))
            if epoch != self._epoch:
                # The seeds are 1,000,003 (a prime) apart, so that seed 0's second epoch is not seed 1's first.
                generator = torch.Generator().manual_seed(self._source["seed"] * 1_000_003 + epoch)
                dtype = torch.int32 if len(self.rows) < 1 << 31 else torch.int64
                self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator, dtype=dtype)
            parts.append(self._order[at : at + end - start])
            start += len(parts[-1])
        return torch.cat(parts).long()


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
FORMAT = 2


class _Shard(BaseModel, strict=True):
    file: str = Field(pattern=r"^[\w-]+\.safetensors$")
    bytes: int
    sha256: str


class _Inputs(BaseModel, strict=True):
    dtype: str
    context: int


class _Manifest(BaseModel, strict=True):
    """What a harvest's manifest must hold; the rest is information."""

    checkpoint: str
    sources: list[str]
    sites: list[int] = Field(min_length=1)
    width: int
    tokens: int = Field(ge=1)
    norm: dict[str, float]
    shards: list[_Shard] = Field(min_length=1)
    inputs: _Inputs


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
            found, do = f"no {MANIFEST}", "make one with steer harvest"
            if (place / PARTIAL).is_file():
                found = "one that was stopped"
                do = "run the same steer harvest again and it goes on from its finished shards"
            raise CheckpointError(f"{place}: expected a finished harvest, found {found}; {do}")
        manifest = read_json_object(file, do="harvest anew")
        if manifest.get("format") != FORMAT or "shards" not in manifest:
            raise CheckpointError(f"{file}: expected the manifest of a harvest, found another; harvest anew")
        try:
            _Manifest.model_validate(manifest)
        except ValidationError as e:
            place_in_file = ".".join(map(str, e.errors()[0]["loc"]))
            raise CheckpointError(f"{file}: {place_in_file}: {e.errors()[0]['msg'].lower()}; harvest anew") from e
        if lacking := [s for s in manifest["sites"] if not manifest["norm"].get(str(s), 0) > 0]:
            raise CheckpointError(f"{file}: norm: expected one above 0 of site {lacking[0]}, found none; harvest anew")
        check_shards(place, manifest["shards"])
        return cls(place, manifest)

    @property
    def sites(self) -> list[int]:
        """The blocks after which the residual stream was read."""
        return self.manifest["sites"]

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
        return Activations(self._mapped(f"site{site}"))

    @cached_property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """The token id of each row."""
        return torch.cat(self._mapped("token_ids"))

    @cached_property
    def document(self) -> Int[Tensor, " tokens"]:
        """The number of each row's document, from 0 in the order of the text. A document's rows are contiguous."""
        return torch.cat(self._mapped("document"))

    @cached_property
    def position(self) -> Int[Tensor, " tokens"]:
        """The position of each row's token in its document, from 0, special tokens included."""
        return torch.cat(self._mapped("position"))

    def split(self, held_out: float = 0.05) -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
        """(rows to train on, rows held out). About `held_out` of the documents are held out whole, the same ones in
        every run."""
        held = is_held_out(self.document, held_out)
        return (~held).nonzero()[:, 0], held.nonzero()[:, 0]

    def batches(
        self, site: int, batch: int, *, seed: int = 0, held_out: float = 0.05, rank: int = 0, world: int = 1
    ) -> ShuffledRows:
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

    def check_contents(self) -> None:
        """Raise CheckpointError unless every shard has its recorded sha256. It reads all files."""
        for shard in self.manifest["shards"]:
            if hash_file(file := self.place / shard["file"]) != shard["sha256"]:
                raise CheckpointError(
                    f"{file}: expected the sha256 that {MANIFEST} records, found another; copy the harvest again or "
                    "harvest anew"
                )

    def _check_site(self, site: int) -> None:
        if site not in self.sites:
            raise MismatchError(
                f"{self.place}: expected one of its sites {', '.join(map(str, self.sites))}, found {site}; "
                f"harvest site {site}"
            )

    def _mapped(self, tensor: str) -> list[Tensor]:
        """A tensor of every shard, memory-mapped."""
        out = []
        for shard in self.manifest["shards"]:
            file = self.place / shard["file"]
            try:
                with safe_open(file, framework="pt") as f:
                    out.append(f.get_tensor(tensor))
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{file}: expected a shard of a harvest, found {e}; harvest anew") from e
        return out


def check_shards(place: Path, shards: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless every shard exists and has its recorded length."""
    for shard in shards:
        path = place / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "none" if size is None else f"{size:,}"
            raise CheckpointError(f"{path}: expected {shard['bytes']:,} bytes, found {found}; harvest anew")

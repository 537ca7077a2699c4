"""A harvest on disk: bf16 shards of fixed size, read by memory mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import BFloat16, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import CheckpointError, MismatchError, UsageError
from steer.features.batches import Activations, Batches, ShuffledRows, is_held_out
from steer.files import read_json_object, replacing, write_atomic
from steer.weights.staging import HashingFile

MANIFEST = "manifest.json"
"""Written last: a harvest with it is complete."""
PARTIAL = "harvest.partial.json"
"""What a harvest that is under way, or was stopped, knows of its finished shards."""
FORMAT = 1
_DTYPES = {torch.bfloat16: "BF16", torch.int32: "I32"}


@dataclass(frozen=True, eq=False)
class Harvest:
    """Residual streams of a text at some sites of one model, special tokens and outliers left out.

    Rows are tokens; the rows of all sites, and of `token_ids`, `document` and `position`, go together.
    """

    place: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, place: str | Path) -> Harvest:
        """Read a harvest's manifest and check that its shards are there.

        Errors: CheckpointError when there is no harvest, an unfinished one, or one with missing or cut files.
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
        """How many tokens were kept."""
        return self.manifest["tokens"]

    def norm(self, site: int) -> float:
        """Median residual norm at a site over the first shard's tokens, outliers left out."""
        self._check_site(site)
        return self.manifest["norm"][str(site)]

    def activations(self, site: int) -> Activations:
        """The residual stream at a site, memory-mapped. Errors: MismatchError for a site that was not harvested."""
        self._check_site(site)
        parts = [self._mapped(n, f"site{site}", "residual") for n in range(len(self.manifest["shards"]))]
        return Activations(parts, self.manifest["shard_tokens"], self.width)

    @cached_property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """The token that each row was read at."""
        return self._column("token_ids")

    @cached_property
    def document(self) -> Int[Tensor, " tokens"]:
        """The number of its document, from 0 in the order of the text. A document's rows stand together."""
        return self._column("document")

    @cached_property
    def position(self) -> Int[Tensor, " tokens"]:
        """Its place in its document, from 0, special tokens counted."""
        return self._column("position")

    def split(self, held_out: float = 0.05) -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
        """Rows to train on and rows held out, whole documents, the same ones in every run."""
        held = is_held_out(self.document, held_out)
        return (~held).nonzero()[:, 0], held.nonzero()[:, 0]

    def batches(
        self, site: int, batch: int, *, seed: int = 0, held_out: float = 0.05, rank: int = 0, world: int = 1
    ) -> Batches:
        """Training rows of a site in an exact shuffle, anew each epoch.

        With several processes `batch` is the joined batch, of which each gets its slice.
        Errors: UsageError when nothing is left to train on.
        """
        train, _ = self.split(held_out)
        if not len(train):
            raise UsageError(
                f"{self.place}: expected tokens to train on, found that all {self.tokens:,} are held out; harvest more"
            )
        return ShuffledRows(self.activations(site).loaded(), train, batch, seed, rank, world)

    def held_out_rows(self, site: int, limit: int | None = None, *, held_out: float = 0.05) -> BFloat16[Tensor, "n d"]:
        """Rows that `batches` never gives, at most `limit`. Errors: UsageError when there are none."""
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
    """File name of a part of a shard: `tokens`, or `site14`."""
    return f"shard-{number:05}.{part}.safetensors"


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file that is complete or absent; returns its name, size and sha256.

    By hand, since the package's own writer holds the interpreter while it writes, and the model would wait.
    """
    entries, at = {}, 0
    for name, t in tensors.items():
        entries[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(file) as part, HashingFile(part) as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for t in tensors.values():
            f.write(t.contiguous().view(torch.uint8).numpy().reshape(-1).data)
    return {"file": file.name, "bytes": 8 + len(header) + at, "sha256": f.sha256}


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, memory-mapped. Errors: CheckpointError for a file that is none."""
    try:
        with safe_open(str(file), framework="pt") as f:
            return f.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{file}: expected a shard of a harvest, found {e}; harvest anew") from e


def write_record(file: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_atomic(file, json.dumps(value, indent=2) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """A JSON object. Errors: CheckpointError for anything else."""
    return read_json_object(file, do="harvest anew")


def check_shards(place: Path, shards: list[dict[str, Any]]) -> None:
    """Raise CheckpointError unless every file is there in its length."""
    for entry in (file for shard in shards for file in shard["files"]):
        path = place / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "none" if size is None else f"{size:,}"
            raise CheckpointError(f"{path}: expected {entry['bytes']:,} bytes, found {found}; harvest anew")

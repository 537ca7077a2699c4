"""Reads checkpoints on disk: all safetensors headers are read and checked; tensors are read one at a time.

A safetensors file is `u64 length, JSON header, data`; the header gives each tensor's dtype, shape and byte range in the
data, and the ranges cover the data without holes (https://github.com/huggingface/safetensors#format). Bakes, sketches
and checks start from `CheckpointFiles.open`. Nothing here computes, so nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from steer.errors import CheckpointError
from steer.files import one_line, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
"""File of an adapter's weights, as peft names it."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Width of an element in bits, by safetensors' code for the dtype."""


Buffer = bytearray | memoryview


@dataclass(frozen=True)
class TensorInfo:
    """A header's entry for one tensor."""

    name: str
    dtype: str
    """safetensors' code for the dtype: BF16, F32, ..."""
    shape: tuple[int, ...]
    file: str
    """Name of the shard that holds it."""
    start: int
    """Offset of the first byte of data, from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def end(self) -> int:
        """Offset of the byte after the last, in the file."""
        return self.start + self.nbytes


@dataclass(frozen=True)
class DecodedTensor(TensorInfo):
    """A tensor that is stored in another form than it is read in, which `dtype` and `nbytes` describe."""

    stored: TensorInfo
    """The tensor as described in the header."""
    decode: Callable[[Buffer, Buffer], None]
    """Called with (stored bytes, output buffer); writes the tensor in `dtype` to the output buffer."""

    @property
    def end(self) -> int:
        return self.stored.end


@dataclass(frozen=True)
class NewTensor:
    """A tensor that a bake adds to a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | TensorInfo
    """The bytes, or a tensor of the same shard whose bytes are copied."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    header: bytes
    """The header as in the file, including the eight bytes of its length."""
    metadata: dict[str, str] | None
    """The header's `__metadata__`; None without one."""
    tensors: tuple[TensorInfo, ...]
    """In the order of their data in the file."""
    size: int
    """Size of the file in bytes."""
    mtime_ns: int
    """Time of the last change, for noticing a change while the file is read."""

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header, which safetensors checks.

        Errors: CheckpointError if the file is missing or truncated, or its header contradicts it.
        """
        try:
            with open(path, "rb") as f, safe_open(str(path), framework="np"):
                stat, length = os.fstat(f.fileno()), f.read(8)
                header = length + f.read(int.from_bytes(length, "little"))
        except FileNotFoundError as e:
            raise CheckpointError(f"{path}: expected a weights file, found none; fetch the model again") from e
        except OSError as e:
            raise CheckpointError(f"{path}: could not be read ({e.strerror}); check its permissions") from e
        except SafetensorError as e:
            why = one_line(e).removeprefix("Error while deserializing header: ")
            raise _broken(path, f"{path.stat().st_size} bytes: {why}") from e
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__", None)
        tensors = [
            TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path.name, len(header) + entry["data_offsets"][0])
            for name, entry in entries.items()
        ]
        tensors.sort(key=lambda t: (t.start, t.nbytes))
        return cls(path, header, metadata, tuple(tensors), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class CheckpointFiles:
    """A model directory in Hugging Face layout. The headers are in memory, the data is not."""

    root: Path
    config: dict[str, Any]
    """Contents of config.json, with the changes in `decoded` made."""
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    """Contents of model.safetensors.index.json; None for a checkpoint in a single file."""
    decoded: dict[str, Any] = field(default_factory=dict)
    """Changes to config.json that go with dequantised weights. A value of None means that the key is deleted."""

    @classmethod
    def open(cls, root: Path) -> CheckpointFiles:
        """Read the config, the index if there is one, and every header.

        Errors: CheckpointError for anything that is missing, broken, or contradicts the index.
        """
        if not root.is_dir():
            raise CheckpointError(
                f"{root}: expected a model directory, found {'a file' if root.exists() else 'none'}; check the path"
            )
        config = _read_object(root / "config.json")
        if (root / SINGLE).exists():  # transformers looks for it first too
            return cls(root, config, (Shard.open(root / SINGLE),), None)
        if not (root / INDEX).exists():
            raise CheckpointError(f"{root}: expected {SINGLE} or {INDEX}, found {_other_weights(root)}")
        index = _read_object(root / INDEX)
        _check_totals(root / INDEX, index)
        files = cls(root, config, _open_shards(root, index), index)
        for name, file in index["weight_map"].items():
            if name not in files.tensors or files.tensors[name].file != file:
                raise CheckpointError(
                    f"{root / INDEX}: expected {name} in {file}, found none there; fetch the model again"
                )
        return files

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        out: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for t in shard.tensors:
                if t.name in out:
                    raise CheckpointError(
                        f"{shard.path}: tensor {t.name} is also in {out[t.name].file}, expected it once; "
                        "fetch the model again"
                    )
                out[t.name] = t
        return out

    def read(self, tensor: TensorInfo) -> bytearray:
        """The bytes of one tensor, in the dtype it is read in."""
        stored = tensor.stored if isinstance(tensor, DecodedTensor) else tensor
        data = bytearray(stored.nbytes)
        with open(self.root / tensor.file, "rb", buffering=0) as f:
            read_into(f.fileno(), stored.start, data, self.root / tensor.file)
        if not isinstance(tensor, DecodedTensor):
            return data
        out = bytearray(tensor.nbytes)
        tensor.decode(data, out)
        return out


def read_into(fd: int, at: int, buffer: Buffer, path: Path) -> None:
    """Fill a buffer with the bytes of a file, from offset `at` on.

    Errors: CheckpointError if the file ends too early, or the disk fails.
    """
    view = memoryview(buffer)
    try:
        while view:
            n = os.preadv(fd, [view], at)
            if not n:
                raise _broken(path, f"its end at byte {at}, though its header describes more")
            view, at = view[n:], at + n
    except OSError as e:
        raise CheckpointError(f"{path}: could not be read ({e.strerror}); check its disk") from e


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: expected a whole safetensors file, found {found}; fetch the model again")


def _check_totals(path: Path, index: dict[str, Any]) -> None:
    """Raise CheckpointError unless the totals, to which a bake adds, are numbers where they are given."""
    metadata = index.get("metadata")
    given = metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
    for key in ("metadata", "total_size", "total_parameters"):
        if key in given and type(given[key]) not in (int, float):
            raise CheckpointError(
                f"{path}: expected numbers under {key}, found {one_line(repr(given[key]))}; fetch the model again"
            )


def _open_shards(root: Path, index: dict[str, Any]) -> tuple[Shard, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX}: expected a non-empty weight_map, found none; fetch the model again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        # The name itself is checked, not where it leads: in a hub cache every file is a symlink out of the directory.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{root / INDEX}: expected names of safetensors files in the same directory, found {name!r}; "
                "do not use this checkpoint"
            )
    return tuple(Shard.open(root / name) for name in names)


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(
        path, what="a JSON object in a model directory", do="check the path, or fetch the model again"
    )


def _other_weights(root: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors"):
        for path in sorted(root.glob(pattern)):
            return f"{path.name}; only safetensors is loaded, convert it with save_pretrained"
    return "no weights; fetch the model again"

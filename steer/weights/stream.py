"""Checkpoints on disk, one tensor at a time: safetensors headers read, shards rewritten in a stream.

A safetensors file is `u64 length, JSON header, data`; the header gives each tensor's dtype, shape and byte
range in the data, which the ranges cover without holes
(https://github.com/huggingface/safetensors#format). Nothing here computes, so nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from steer.errors import CheckpointError
from steer.weights.staging import CHUNK, HashingFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: str
    """The format's own code: BF16, F32, ..."""
    shape: tuple[int, ...]
    file: str
    """Name of the shard that holds it."""
    start: int
    """First byte, counted from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _nbytes(self.dtype, self.shape)

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.start + self.nbytes


@dataclass(frozen=True)
class NewTensor:
    """A tensor that a rewritten shard gains."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | TensorInfo
    """The bytes, or the tensor of the same shard whose bytes it repeats."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return _nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    header: bytes
    """As it stands in the file, the eight bytes of its length included."""
    metadata: dict[str, str] | None
    """The header's `__metadata__`."""
    tensors: tuple[TensorInfo, ...]
    """In the order of their data."""
    size: int
    """Of the file, in bytes."""
    mtime_ns: int
    """When it was last written, to notice a change while it is read."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header.

        Errors: CheckpointError when the file is missing, truncated, or its header lies.
        """
        try:
            with open(path, "rb") as f:
                stat = os.fstat(f.fileno())
                length = int.from_bytes(f.read(8), "little")
                if stat.st_size < 8 or length > min(_MAX_HEADER, stat.st_size - 8):
                    raise _broken(path, f"a header of {length} bytes in a file of {stat.st_size}")
                raw = f.read(length)
        except FileNotFoundError as e:
            raise CheckpointError(f"{path}: expected a weights file, found none; fetch the model again") from e
        except OSError as e:
            raise CheckpointError(f"{path}: could not be read ({e.strerror}); check its permissions") from e
        metadata, tensors = _parse(path, raw, stat.st_size)
        header = length.to_bytes(8, "little") + raw
        return cls(path, header, metadata, tensors, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class CheckpointFiles:
    """A model directory in Hugging Face layout, its headers read and its data not."""

    root: Path
    config: dict[str, Any]
    """config.json."""
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    """model.safetensors.index.json, None for a checkpoint in a single file."""

    @classmethod
    def open(cls, root: Path) -> CheckpointFiles:
        """Read the config, the index if there is one, and every header.

        Errors: CheckpointError for whatever is missing, broken, or not what it says.
        """
        if not root.is_dir():
            raise CheckpointError(
                f"{root}: expected a model directory, found {'a file' if root.exists() else 'none'}; check the path"
            )
        config = _read_object(root / "config.json")
        if (root / SINGLE).exists():  # the order transformers looks in
            return cls(root, config, (Shard.open(root / SINGLE),), None)
        if not (root / INDEX).exists():
            raise CheckpointError(f"{root}: expected {SINGLE} or {INDEX}, found {_other_weights(root)}")
        index = _read_object(root / INDEX)
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
        """The bytes of one tensor."""
        with open(self.root / tensor.file, "rb") as f:
            return _read_exactly(f, tensor)


def rewrite_shard(
    shard: Shard,
    target: Path,
    *,
    change: Mapping[str, Callable[[bytearray], None]],
    new: Sequence[NewTensor] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[str, str]:
    """Write `shard` to `target`, holding one changed tensor at a time; return the sha256 of both files.

    `change` edits a tensor's bytes in place; every other tensor passes through. Tensors keep their order;
    with nothing new the header passes through too. `advance` is told the bytes written, bit by bit.

    Errors: CheckpointError when the source is shorter than its header said, or changes while being read.
    """
    layout = _merged(shard.tensors, new)
    header = _header(layout, shard.metadata) if new else shard.header
    read = hashlib.sha256(shard.header)
    with open(shard.path, "rb") as src, HashingFile(target) as dst:
        dst.write(header)
        for t in layout:
            if isinstance(t, NewTensor):
                chunks = [t.data] if isinstance(t.data, bytes) else _chunks(src, t.data)
                for chunk in chunks:
                    dst.write(chunk)
                    advance(len(chunk))
            elif t.name in change:
                data = _read_exactly(src, t)
                read.update(data)
                change[t.name](data)
                dst.write(data)
                advance(len(data))
            else:
                for chunk in _chunks(src, t):
                    read.update(chunk)
                    dst.write(chunk)
                    advance(len(chunk))
        stat = os.fstat(src.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise CheckpointError(f"{shard.path}: changed while it was read; wait until nothing writes to it, run again")
    return read.hexdigest(), dst.sha256


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _BITS[dtype] // 8


def _merged(old: Sequence[TensorInfo], new: Sequence[NewTensor]) -> list[TensorInfo | NewTensor]:
    """Each new tensor behind the last old one whose elements are as wide: files are written widest dtype
    first, which aligns every tensor, and this keeps it so."""
    out: list[TensorInfo | NewTensor] = list(old)
    for t in new:
        wide = [i for i, o in enumerate(out) if _BITS[o.dtype] >= _BITS[t.dtype]]
        out.insert(wide[-1] + 1 if wide else 0, t)
    return out


def _header(tensors: Sequence[TensorInfo | NewTensor], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data starts aligned
    return len(raw).to_bytes(8, "little") + raw


def _chunks(f: BinaryIO, tensor: TensorInfo) -> Iterator[bytes]:
    f.seek(tensor.start)
    left = tensor.nbytes
    while left:
        chunk = f.read(min(left, CHUNK))
        if not chunk:
            raise _broken(Path(f.name), f"its end within tensor {tensor.name}")
        left -= len(chunk)
        yield chunk


def _read_exactly(f: BinaryIO, tensor: TensorInfo) -> bytearray:
    data = bytearray(tensor.nbytes)
    f.seek(tensor.start)
    if f.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise _broken(Path(f.name), f"its end within tensor {tensor.name}")
    return data


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: expected a whole safetensors file, found {found}; fetch the model again")


def _parse(path: Path, raw: bytes, size: int) -> tuple[dict[str, str] | None, tuple[TensorInfo, ...]]:
    try:
        entries = json.loads(raw)
    except ValueError as e:
        raise _broken(path, "a header that is no JSON") from e
    if not isinstance(entries, dict):
        raise _broken(path, "a header that is no JSON object")
    metadata = entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            counts = all(type(n) is int and n >= 0 for n in (*shape, start, end))
            sound = counts and end - start == _nbytes(dtype, shape)
        except (KeyError, TypeError, ValueError) as e:
            raise _broken(path, f"a header entry for {name} that cannot be read") from e
        if not sound:
            raise _broken(path, f"{name} as {dtype} {list(shape)} in bytes {start} to {end}")
        tensors.append(TensorInfo(name, dtype, shape, path.name, 8 + len(raw) + start))
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    at = 8 + len(raw)
    for t in tensors:
        if t.start != at:
            raise _broken(path, f"data of {t.name} at byte {t.start} where byte {at} comes next")
        at = t.end
    if at != size:
        raise _broken(path, f"{size} bytes where its header describes {at}")
    return metadata, tuple(tensors)


def _open_shards(root: Path, index: dict[str, Any]) -> tuple[Shard, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX}: expected a non-empty weight_map, found none; fetch the model again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        # Compared as text: in a hub cache the file itself is a symlink that leads out of the directory.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{root / INDEX}: expected names of safetensors files in the same directory, found {name!r}; "
                "do not use this checkpoint"
            )
        if not (root / name).exists():
            raise CheckpointError(f"{root / name}: the index names it, but it is missing; fetch the model again")
    return tuple(Shard.open(root / name) for name in names)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{path}: expected one in a model directory, found none; check the path, or fetch the model again"
        ) from e
    except OSError as e:
        raise CheckpointError(f"{path}: could not be read ({e.strerror}); check its permissions") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: expected JSON, found something else ({e}); fetch the model again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found another value; fetch the model again")
    return value


def _other_weights(root: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors"):
        for path in sorted(root.glob(pattern)):
            return f"{path.name}; only safetensors is loaded, convert it with save_pretrained"
    return "no weights; fetch the model again"

"""Checkpoints on disk: safetensors headers read and checked, one tensor at a time when it is asked for.

A safetensors file is `u64 length, JSON header, data`; the header gives each tensor's dtype, shape and byte
range in the data, which the ranges cover without holes
(https://github.com/huggingface/safetensors#format). Nothing here computes, so nothing here needs torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from steer.errors import CheckpointError
from steer.files import one_line, parse_json, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Width of an element, by the format's own code of its dtype."""


Buffer = bytearray | memoryview


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
        return data_bytes(self.dtype, self.shape)

    @property
    def end(self) -> int:
        """The byte behind its last in the file."""
        return self.start + self.nbytes


@dataclass(frozen=True)
class DecodedTensor(TensorInfo):
    """A tensor that is stored in another form than the one it is read in, which `dtype` and `nbytes` tell."""

    stored: TensorInfo
    """As the header has it."""
    decode: Callable[[Buffer, Buffer], None]
    """From the stored bytes to those of `dtype`, which it writes to the second."""

    @property
    def end(self) -> int:
        """The byte behind its last in the file."""
        return self.stored.end


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
        return data_bytes(self.dtype, self.shape)


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
    decoded: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json that differ from the file's because the weights are read decoded; None where one goes."""

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
    """Fill a buffer with the bytes of a file from `at` on.

    Errors: CheckpointError when the file ends before that, or the disk fails.
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


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size of a tensor's data in bytes."""
    return math.prod(shape) * BITS[dtype] // 8


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: expected a whole safetensors file, found {found}; fetch the model again")


def _parse(path: Path, raw: bytes, size: int) -> tuple[dict[str, str] | None, tuple[TensorInfo, ...]]:
    try:
        entries = parse_json(raw)
    except ValueError as e:
        raise _broken(path, f"a header that is no JSON ({one_line(e)})") from e
    if not isinstance(entries, dict):
        raise _broken(path, "a header that is no JSON object")
    metadata = entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            counts = all(type(n) is int and n >= 0 for n in (*shape, start, end))
            sound = counts and end - start == data_bytes(dtype, shape)
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
    return read_json_object(
        path, what="a JSON object in a model directory", do="check the path, or fetch the model again"
    )


def _other_weights(root: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors"):
        for path in sorted(root.glob(pattern)):
            return f"{path.name}; only safetensors is loaded, convert it with save_pretrained"
    return "no weights; fetch the model again"

"""Rewrites shards as a stream: reading, hashing, editing, writing and hashing the output, each on its own thread.

Reading, hashing and writing release the interpreter lock, so they run at the same time. Memory is bounded to the
largest tensor to be edited plus `ROOM`. `bake` passes in one `Rewrite` per shard; `_ShardCopy` has the steps of one
shard, `_Piece` is a range of bytes on its way through them, and `_Ring` is the memory of the pieces.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer.checkpoint.reader import BITS, Buffer, DecodedTensor, NewTensor, Shard, TensorInfo, read_into
from steer.checkpoint.staging import CHUNK, DirectFile
from steer.errors import CheckpointError

Change = Callable[[Buffer], None]
"""Edits the bytes of a tensor in place."""
ROOM = 256 << 20
"""Bytes in memory at a time, in addition to the largest tensor."""
_AHEAD = 64 << 20  # bytes that the kernel is asked to read ahead


@dataclass(frozen=True)
class Rewrite:
    """One shard to rewrite."""

    shard: Shard
    target: Path
    """The file to write."""
    change: Mapping[str, Change] = field(default_factory=dict)
    """Tensor -> function that edits its bytes in place. All other tensors are copied."""
    new: Sequence[NewTensor] = ()
    """Tensors to add."""


@dataclass(frozen=True)
class Rewritten:
    """A shard that is written and synced to the disk."""

    shard: Shard
    read: str
    """sha256 of the source."""
    written: str
    """sha256 of the output."""


def rewrite_shards(jobs: Sequence[Rewrite], advance: Callable[[int], None] = lambda n: None) -> Generator[Rewritten]:
    """Write each shard to its target, and yield it once it is on the disk.

    Tensors keep their order. The header is copied too if no tensor is new or decoded. `advance` is called with the
    bytes of tensors written since the last call.

    Errors: CheckpointError if a source is shorter than its header says, cannot be read, or changes while it is read.
    """
    shard_copies = [_ShardCopy(job) for job in jobs]
    steps = ((p, piece) for p in shard_copies for piece in (*p.pieces, _END))
    room = _Ring(ROOM + max((piece.memory for p in shard_copies for piece in p.pieces), default=0))
    ahead: deque[tuple[_ShardCopy, _Piece, memoryview, Future[None]]] = deque()
    behind: deque[tuple[_ShardCopy, _Piece, Future[None], Future[None]]] = deque()
    reading, hashing_in, writing, hashing_out = pools = tuple(ThreadPoolExecutor(1, "bake") for _ in range(4))
    try:
        step = next(steps, None)
        while step or ahead or behind:
            while step and (buffer := room.take(step[1].memory)) is not None:
                read = reading.submit(step[0].read, step[1], buffer)
                ahead.append((*step, buffer, hashing_in.submit(step[0].hash_in, step[1], buffer, read)))
                step = next(steps, None)
            if ahead:
                shard_copy, piece, buffer, hashed = ahead.popleft()
                hashed.result()  # an edit in place has to wait for the hash of the input
                data = shard_copy.edit(piece, buffer)
                write = writing.submit(shard_copy.write, piece, data)
                behind.append((shard_copy, piece, write, hashing_out.submit(shard_copy.hash_out, data)))
                advance(piece.written)
            # With nothing read ahead, the loop must wait for these writes, to get memory or to finish.
            while behind and (not ahead or all(f.done() for f in behind[0][2:])):
                shard_copy, piece, write, hashed = behind.popleft()
                write.result()
                hashed.result()
                room.give()
                if piece is _END:
                    yield shard_copy.rewritten
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        for shard_copy in shard_copies:
            with suppress(OSError):  # such as that of a full disk, which has been raised already
                shard_copy.close()


@dataclass(frozen=True)
class _Piece:
    """A range of the source, or new bytes, on the way to the output."""

    at: int = 0
    """Offset of the first byte in the source."""
    size: int = 0
    """Number of bytes to read from there."""
    hashed: bool = True
    """Whether the bytes go into the source's hash; not if they are read a second time."""
    edit: Callable[[memoryview], memoryview | bytes | None] | None = None
    """Changes the bytes in place, or returns other bytes to write instead; empty bytes leave the piece out."""
    written: int = 0
    """Bytes of tensors in the output."""
    beside: int = 0
    """Bytes of memory after those read, for the edit to write to."""

    @property
    def memory(self) -> int:
        """Bytes of memory that the piece needs."""
        return (self.size + self.beside) // 64 * 64 + 64  # aligned for any dtype, and never 0


_END = _Piece()
"""Marks the end of a shard, after its last piece."""


class _ShardCopy:
    """One shard on its way through the steps; each of its methods runs on its own thread."""

    def __init__(self, job: Rewrite) -> None:
        self.job, self.shard = job, job.shard
        layout = _merged(self.shard.tensors, job.new)
        as_it_was = not job.new and _covered(self.shard)
        self.header = self.shard.header if as_it_was else _header(layout, self.shard.metadata)
        self.pieces = tuple(_pieces(self.shard, layout, job.change))
        self._read, self._written = hashlib.sha256(self.shard.header), hashlib.sha256(self.header)
        self._source = -1
        self._target: DirectFile | None = None

    def read(self, piece: _Piece, buffer: memoryview) -> None:
        """Fill the buffer. At the end, check that the source is unchanged since its header was read."""
        path = self.shard.path
        if self._source < 0:
            self._source = os.open(path, os.O_RDONLY)
        if piece is _END:
            stat = os.fstat(self._source)
            if (stat.st_size, stat.st_mtime_ns) != (self.shard.size, self.shard.mtime_ns):
                raise CheckpointError(f"{path}: changed while it was read; wait until nothing writes to it, run again")
        elif piece.size:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._source, piece.at + piece.size, _AHEAD, os.POSIX_FADV_WILLNEED)
            read_into(self._source, piece.at, buffer[: piece.size], path)

    def hash_in(self, piece: _Piece, buffer: memoryview, read: Future[None]) -> None:
        """Hash the bytes that were read."""
        read.result()
        if piece.hashed:
            self._read.update(buffer[: piece.size])

    def edit(self, piece: _Piece, buffer: memoryview) -> memoryview | bytes:
        """The bytes to write."""
        instead = piece.edit(buffer[: piece.size + piece.beside]) if piece.edit else None
        return buffer[: piece.size] if instead is None else instead

    def write(self, piece: _Piece, data: memoryview | bytes) -> None:
        """Write the bytes; at the end, wait until they are on the disk."""
        if self._target is None:
            self._target = DirectFile(self.job.target)
            self._target.write(self.header)
        self._target.write(data)
        if piece is _END:
            self._target.sync()
            self.close()

    def hash_out(self, data: memoryview | bytes) -> None:
        """Hash the bytes that are written."""
        self._written.update(data)

    @property
    def rewritten(self) -> Rewritten:
        """The result, once all pieces have passed."""
        return Rewritten(self.shard, self._read.hexdigest(), self._written.hexdigest())

    def close(self) -> None:
        """Close both files."""
        if self._source >= 0:
            os.close(self._source)
            self._source = -1
        if self._target is not None:
            self._target.close()
            self._target = None  # also frees its write buffer


class _Ring:
    """Memory for the pieces in flight, taken and released in the same order. Reusing one block avoids page faults for
    new memory."""

    def __init__(self, capacity: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, max(capacity, 1)))
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> memoryview | None:
        """`size` bytes in one stretch, or None while there is no room for them."""
        start, end = 0, len(self._memory)
        if self._taken:
            oldest, start = self._taken[0][0], self._taken[-1][1]
            if self._taken[-1][0] < oldest:  # wrapped around: the free memory lies before the oldest
                end = oldest
            elif start + size > end:
                start, end = 0, oldest
        if start + size > end:
            return None
        self._taken.append((start, start + size))
        return self._memory[start : start + size]

    def give(self) -> None:
        """Release the oldest stretch."""
        self._taken.popleft()


def _pieces(shard: Shard, layout: Sequence[TensorInfo | NewTensor], change: Mapping[str, Change]) -> Iterator[_Piece]:
    """The pieces of a shard in the order of the output: unchanged ranges, edited tensors, new tensors, and ranges left
    out."""
    start = at = len(shard.header)  # bytes from `start` to `at` are unchanged tensors, still to be copied
    for t in layout:
        if isinstance(t, NewTensor):
            yield from _unchanged(start, at)
            yield from _added(t)
            start = at
            continue
        if t.start > at:
            yield from _unchanged(start, at)
            yield from _left_out(at, t.start)
            start = at = t.start
        if isinstance(t, DecodedTensor) or t.name in change:
            yield from _unchanged(start, at)
            yield _edited(t, change.get(t.name))
            start = t.end
        at = t.end
    yield from _unchanged(start, at)
    yield from _left_out(at, shard.size)


def _unchanged(start: int, end: int, *, hashed: bool = True) -> Iterator[_Piece]:
    """Pieces that copy the bytes from `start` to `end`."""
    for at in range(start, end, CHUNK):
        size = min(CHUNK, end - at)
        yield _Piece(at, size, hashed, written=size)


def _left_out(start: int, end: int) -> Iterator[_Piece]:
    """Pieces that read and hash the bytes from `start` to `end` but write nothing."""
    for at in range(start, end, CHUNK):
        yield _Piece(at, min(CHUNK, end - at), edit=lambda data: b"")


def _edited(t: TensorInfo, change: Change | None, *, hashed: bool = True) -> _Piece:
    """The piece that decodes a tensor if it is stored in another form, then edits it."""
    if not isinstance(t, DecodedTensor):
        return _Piece(t.start, t.nbytes, hashed, change, t.nbytes)
    size = t.stored.nbytes

    def decode_and_change(data: memoryview) -> memoryview:
        t.decode(data[:size], data[size:])
        if change:
            change(data[size:])
        return data[size:]

    return _Piece(t.start, size, hashed, decode_and_change, t.nbytes, beside=t.nbytes)


def _added(t: NewTensor) -> Iterator[_Piece]:
    """The pieces of a new tensor: its bytes, or a second reading of the tensor it copies."""
    if isinstance(t.data, bytes):
        data = t.data
        yield _Piece(edit=lambda empty: data, written=t.nbytes)
    elif isinstance(t.data, DecodedTensor):
        yield _edited(t.data, None, hashed=False)
    else:
        yield from _unchanged(t.data.start, t.data.end, hashed=False)


def _covered(shard: Shard) -> bool:
    """Whether the tensors are all that the shard's file holds, in the form that the file holds them."""
    plain = not any(isinstance(t, DecodedTensor) for t in shard.tensors)
    return plain and len(shard.header) + sum(t.nbytes for t in shard.tensors) == shard.size


def _merged(old: Sequence[TensorInfo], new: Sequence[NewTensor]) -> list[TensorInfo | NewTensor]:
    """All tensors in the order of the output. Each new one is placed after the last old one with elements at least as
    wide: files are written widest dtype first, which aligns every tensor, and this keeps the order."""
    out: list[TensorInfo | NewTensor] = list(old)
    for t in new:
        wide = [i for i, o in enumerate(out) if BITS[o.dtype] >= BITS[t.dtype]]
        out.insert(wide[-1] + 1 if wide else 0, t)
    return out


def _header(tensors: Sequence[TensorInfo | NewTensor], metadata: dict[str, str] | None) -> bytes:
    """A safetensors header for these tensors in this order."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data starts aligned
    return len(raw).to_bytes(8, "little") + raw

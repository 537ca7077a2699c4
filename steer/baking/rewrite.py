"""Rewrites shards as a stream: reading, hashing, editing, writing and hashing the output, each on its own thread.

Reading, hashing and writing release the interpreter lock, so they run at the same time. Memory is bounded to the
largest tensor to be edited plus `ROOM`. `Rewrite` has the steps of one shard, `_Piece` is a range of bytes on its way
through them, and `_Ring` is the memory of the pieces.
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
from dataclasses import dataclass, replace
from io import FileIO
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


def rewrite_shards(jobs: Sequence[Rewrite], advance: Callable[[int], None] = lambda n: None) -> Generator[Rewrite]:
    """Write each shard to its target, and yield it once it is on the disk.

    Tensors keep their order. The header is copied too if no tensor is new or decoded. `advance` is called with the
    bytes of tensors written since the last call.

    Errors: CheckpointError if a source is shorter than its header says, cannot be read, or changes while it is read.
    """
    steps = ((job, piece) for job in jobs for piece in (*job.pieces, _END))
    room = _Ring(ROOM + max((piece.memory for job in jobs for piece in job.pieces), default=0))
    ahead: deque[tuple[Rewrite, _Piece, memoryview, Future[None]]] = deque()
    behind: deque[tuple[Rewrite, _Piece, Future[None], Future[None]]] = deque()
    reading, hashing_in, writing, hashing_out = pools = tuple(ThreadPoolExecutor(1, "bake") for _ in range(4))
    try:
        step = next(steps, None)
        while step or ahead or behind:
            while step and (buffer := room.take(step[1].memory)) is not None:
                read = reading.submit(step[0].fill, step[1], buffer)
                ahead.append((*step, buffer, hashing_in.submit(step[0].hash_filled, step[1], buffer, read)))
                step = next(steps, None)
            if ahead:
                job, piece, buffer, hashed = ahead.popleft()
                hashed.result()  # an edit in place has to wait for the hash of the input
                data = job.edit(piece, buffer)
                write = writing.submit(job.write, piece, data)
                behind.append((job, piece, write, hashing_out.submit(job.hash_written.update, data)))
                advance(piece.written)
            # With nothing read ahead, the loop must wait for these writes, to get memory or to finish.
            while behind and (not ahead or all(f.done() for f in behind[0][2:])):
                job, piece, write, hashed = behind.popleft()
                write.result()
                hashed.result()
                room.give()
                if piece is _END:
                    yield job
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        for job in jobs:
            with suppress(OSError):  # such as that of a full disk, which has been raised already
                job.close()


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


class Rewrite:
    """One shard on its way through the steps; each of the methods that `rewrite_shards` calls runs on its own thread.

    `target`: the file to write. `change`: tensor -> function that edits its bytes in place; all other tensors are
    copied. `new`: tensors to add.
    """

    def __init__(
        self, shard: Shard, target: Path, change: Mapping[str, Change] | None = None, new: Sequence[NewTensor] = ()
    ) -> None:
        self.shard, self.target = shard, target
        layout = _merged(shard.tensors, new)
        stored = [t for t in layout if isinstance(t, TensorInfo) and not isinstance(t, DecodedTensor)]
        unchanged = stored == layout and shard.size == len(shard.header) + sum(t.nbytes for t in stored)
        self.header = shard.header if unchanged else _header(layout, shard.metadata)
        self.pieces = tuple(_pieces(shard, layout, change or {}))
        self.hash_read, self.hash_written = hashlib.sha256(shard.header), hashlib.sha256(self.header)
        self._source: FileIO | None = None
        self._target: DirectFile | None = None

    def fill(self, piece: _Piece, buffer: memoryview) -> None:
        """Fill the buffer. At the end, check that the source is unchanged since its header was read."""
        path = self.shard.path
        if self._source is None:
            self._source = FileIO(path)
        source = self._source.fileno()
        if piece is _END:
            stat = os.fstat(source)
            if (stat.st_size, stat.st_mtime_ns) != (self.shard.size, self.shard.mtime_ns):
                raise CheckpointError(f"{path}: changed while it was read; wait until nothing writes to it, run again")
        elif piece.size:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source, piece.at + piece.size, _AHEAD, os.POSIX_FADV_WILLNEED)
            read_into(source, piece.at, buffer[: piece.size], path)

    def hash_filled(self, piece: _Piece, buffer: memoryview, read: Future[None]) -> None:
        """Hash the bytes once they are read."""
        read.result()
        if piece.hashed:
            self.hash_read.update(buffer[: piece.size])

    def edit(self, piece: _Piece, buffer: memoryview) -> memoryview | bytes:
        """The bytes to write."""
        instead = piece.edit(buffer[: piece.size + piece.beside]) if piece.edit else None
        return buffer[: piece.size] if instead is None else instead

    def write(self, piece: _Piece, data: memoryview | bytes) -> None:
        """Write the bytes; at the end, wait until they are on the disk."""
        if self._target is None:
            self._target = DirectFile(self.target)
            self._target.write(self.header)
        self._target.write(data)
        if piece is _END:
            self._target.sync()
            self.close()

    @property
    def read(self) -> str:
        """sha256 of the source, once all pieces have passed."""
        return self.hash_read.hexdigest()

    @property
    def written(self) -> str:
        """sha256 of the output, once all pieces have passed."""
        return self.hash_written.hexdigest()

    def close(self) -> None:
        """Close both files."""
        if self._source is not None:
            self._source.close()
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
            yield from _copied(start, at)
            yield from _added(t)
            start = at
            continue
        if t.start > at:
            yield from _copied(start, at)
            yield from _left_out(at, t.start)
            start = at = t.start
        if isinstance(t, DecodedTensor) or t.name in change:
            yield from _copied(start, at)
            yield _edited(t, change.get(t.name))
            start = t.end
        at = t.end
    yield from _copied(start, at)
    yield from _left_out(at, shard.size)


def _copied(start: int, end: int, *, hashed: bool = True) -> Iterator[_Piece]:
    """Pieces that copy the bytes from `start` to `end`."""
    for at in range(start, end, CHUNK):
        size = min(CHUNK, end - at)
        yield _Piece(at, size, hashed, written=size)


def _left_out(start: int, end: int) -> Iterator[_Piece]:
    """Pieces that read and hash the bytes from `start` to `end` but write nothing."""
    return (replace(piece, edit=lambda data: b"", written=0) for piece in _copied(start, end))


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
        return iter([_Piece(edit=lambda empty: data, written=t.nbytes)])
    if isinstance(t.data, DecodedTensor):
        return iter([_edited(t.data, None, hashed=False)])
    return _copied(t.data.start, t.data.end, hashed=False)


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

"""Shards rewritten in a stream: read ahead, hashed, edited, written and hashed again, each on a thread of its own.

Reading, hashing and writing let go of the interpreter, so that all of it goes on at once. What is on its way is bounded
in bytes: the largest tensor to be edited, and `ROOM` beside it.
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

from steer.errors import CheckpointError
from steer.weights.staging import CHUNK, DirectFile
from steer.weights.stream import BITS, Buffer, DecodedTensor, NewTensor, Shard, TensorInfo, read_into

Change = Callable[[Buffer], None]
"""Edits the bytes of a tensor in place."""
ROOM = 256 << 20
"""Bytes on their way beside the largest tensor."""
_AHEAD = 64 << 20  # asked of the disk before they are read


@dataclass(frozen=True)
class Rewrite:
    """What is to become of one shard."""

    shard: Shard
    target: Path
    change: Mapping[str, Change] = field(default_factory=dict)
    """Tensor -> edits its bytes in place. Every other tensor passes through."""
    new: Sequence[NewTensor] = ()
    """Tensors it gains."""


@dataclass(frozen=True)
class Rewritten:
    """A shard that is written and synced."""

    shard: Shard
    read: str
    """sha256 of the source."""
    written: str
    """sha256 of the output."""


def rewrite_shards(jobs: Sequence[Rewrite], advance: Callable[[int], None] = lambda n: None) -> Generator[Rewritten]:
    """Write each shard to its target, and say so once it is on the disk.

    Tensors keep their order; the header passes through too where no tensor is new or decoded. `advance` is told the
    bytes of tensors written, bit by bit.

    Errors: CheckpointError when a source is shorter than its header said, cannot be read, or changes while it is.
    """
    passages = [_Passage(job) for job in jobs]
    steps = ((p, piece) for p in passages for piece in (*p.pieces, _END))
    room = _Ring(ROOM + max((piece.memory for p in passages for piece in p.pieces), default=0))
    ahead: deque[tuple[_Passage, _Piece, memoryview, Future[None]]] = deque()
    behind: deque[tuple[_Passage, _Piece, Future[None], Future[None]]] = deque()
    reading, hashing_in, writing, hashing_out = pools = tuple(ThreadPoolExecutor(1, "bake") for _ in range(4))
    try:
        step = next(steps, None)
        while step or ahead or behind:
            while step and (buffer := room.take(step[1].memory)) is not None:
                read = reading.submit(step[0].read, step[1], buffer)
                ahead.append((*step, buffer, hashing_in.submit(step[0].hash_in, step[1], buffer, read)))
                step = next(steps, None)
            if ahead:
                passage, piece, buffer, hashed = ahead.popleft()
                hashed.result()  # an edit in place has to wait for that
                data = passage.edit(piece, buffer)
                write = writing.submit(passage.write, piece, data)
                behind.append((passage, piece, write, hashing_out.submit(passage.hash_out, data)))
                advance(piece.written)
            # Without anything ahead the next step waits for room, or for the end.
            while behind and (not ahead or all(f.done() for f in behind[0][2:])):
                passage, piece, write, hashed = behind.popleft()
                write.result()
                hashed.result()
                room.give()
                if piece is _END:
                    yield passage.rewritten
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        for passage in passages:
            with suppress(OSError):  # of a disk that is full, say, which is known by now
                passage.close()


@dataclass(frozen=True)
class _Piece:
    """A range of the source, or new bytes, on the way to the output."""

    at: int = 0
    """First byte in the source."""
    size: int = 0
    """Bytes read from there."""
    hashed: bool = True
    """Whether they count as read from the source; a second reading does not."""
    edit: Callable[[memoryview], memoryview | bytes | None] | None = None
    """Changes them in place, or gives others in their place; none at all for what is left out."""
    written: int = 0
    """Bytes of tensors in the output."""
    beside: int = 0
    """Bytes of memory behind those read, for the edit to write to."""

    @property
    def memory(self) -> int:
        return (self.size + self.beside) // 64 * 64 + 64  # aligned for any dtype, and never nothing


_END = _Piece()
"""After the last piece of a shard."""


class _Passage:
    """One shard on its way through; each of its methods runs on a thread of its own."""

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
        """Fill the memory; at the end see whether the source is still the one whose header was read."""
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
        """Hash what was read."""
        read.result()
        if piece.hashed:
            self._read.update(buffer[: piece.size])

    def edit(self, piece: _Piece, buffer: memoryview) -> memoryview | bytes:
        """What goes into the output."""
        instead = piece.edit(buffer[: piece.size + piece.beside]) if piece.edit else None
        return buffer[: piece.size] if instead is None else instead

    def write(self, piece: _Piece, data: memoryview | bytes) -> None:
        """Write what goes into the output; at the end wait for the disk."""
        if self._target is None:
            self._target = DirectFile(self.job.target)
            self._target.write(self.header)
        self._target.write(data)
        if piece is _END:
            self._target.sync()
            self.close()

    def hash_out(self, data: memoryview | bytes) -> None:
        """Hash what goes into the output."""
        self._written.update(data)

    @property
    def rewritten(self) -> Rewritten:
        """What became of it, once it has passed."""
        return Rewritten(self.shard, self._read.hexdigest(), self._written.hexdigest())

    def close(self) -> None:
        """Close both files."""
        if self._source >= 0:
            os.close(self._source)
            self._source = -1
        if self._target is not None:
            self._target.close()
            self._target = None  # and the memory that it wrote from


class _Ring:
    """The memory of what is on its way, taken and given back in the same order: no page of it is fetched twice."""

    def __init__(self, capacity: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, max(capacity, 1)))
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> memoryview | None:
        """So many bytes in one stretch, or None while there is no room for them."""
        start, end = 0, len(self._memory)
        if self._taken:
            oldest, start = self._taken[0][0], self._taken[-1][1]
            if self._taken[-1][0] < oldest:  # once around: what is free lies before the oldest
                end = oldest
            elif start + size > end:
                start, end = 0, oldest
        if start + size > end:
            return None
        self._taken.append((start, start + size))
        return self._memory[start : start + size]

    def give(self) -> None:
        """Take the oldest back."""
        self._taken.popleft()


def _pieces(shard: Shard, layout: Sequence[TensorInfo | NewTensor], change: Mapping[str, Change]) -> Iterator[_Piece]:
    start = at = len(shard.header)  # what lies between the two waits to pass through
    for t in layout:
        if isinstance(t, NewTensor):
            yield from _passing(start, at)
            yield from _added(t)
            start = at
            continue
        if t.start > at:
            yield from _passing(start, at)
            yield from _left_out(at, t.start)
            start = at = t.start
        if isinstance(t, DecodedTensor) or t.name in change:
            yield from _passing(start, at)
            yield _edited(t, change.get(t.name))
            start = t.end
        at = t.end
    yield from _passing(start, at)
    yield from _left_out(at, shard.size)


def _passing(start: int, end: int, *, hashed: bool = True) -> Iterator[_Piece]:
    for at in range(start, end, CHUNK):
        size = min(CHUNK, end - at)
        yield _Piece(at, size, hashed, written=size)


def _left_out(start: int, end: int) -> Iterator[_Piece]:
    for at in range(start, end, CHUNK):
        yield _Piece(at, min(CHUNK, end - at), edit=lambda data: b"")


def _edited(t: TensorInfo, change: Change | None, *, hashed: bool = True) -> _Piece:
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
    if isinstance(t.data, bytes):
        data = t.data
        yield _Piece(edit=lambda empty: data, written=t.nbytes)
    elif isinstance(t.data, DecodedTensor):
        yield _edited(t.data, None, hashed=False)
    else:
        yield from _passing(t.data.start, t.data.end, hashed=False)


def _covered(shard: Shard) -> bool:
    """Whether its tensors are all that its file holds, and as the file holds them."""
    plain = not any(isinstance(t, DecodedTensor) for t in shard.tensors)
    return plain and len(shard.header) + sum(t.nbytes for t in shard.tensors) == shard.size


def _merged(old: Sequence[TensorInfo], new: Sequence[NewTensor]) -> list[TensorInfo | NewTensor]:
    """Each new tensor behind the last old one whose elements are as wide: files are written widest dtype
    first, which aligns every tensor, and this keeps it so."""
    out: list[TensorInfo | NewTensor] = list(old)
    for t in new:
        wide = [i for i, o in enumerate(out) if BITS[o.dtype] >= BITS[t.dtype]]
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

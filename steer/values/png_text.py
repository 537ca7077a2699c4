"""Texts in a PNG, chunk by chunk: nothing is decoded but the texts asked for, and nothing else is changed.

PNG specification, third edition (W3C 2025), sections 5 and 11.3.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from steer.errors import SteerError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_CHUNK_LIMIT = 100_000  # encoders put kilobytes of pixels into each
_KEYWORD = 79  # the longest a keyword may be, in bytes


@dataclass(frozen=True)
class TextChunk:
    """Where a text stands in a file."""

    keyword: str
    """In lower case."""
    kind: bytes
    """tEXt, zTXt (deflated) or iTXt (UTF-8, maybe deflated)."""
    start: int
    """The first byte of the chunk, its length field."""
    end: int
    """The byte after its checksum."""


def text_chunks(data: bytes, where: str) -> list[TextChunk]:
    """Every text of a PNG, in the order of the file.

    Errors: SteerError where the file ends early, is no row of chunks, or of far too many.
    """
    out: list[TextChunk] = []
    at = len(SIGNATURE)
    for _ in range(_CHUNK_LIMIT):
        if len(data) < at + 12:
            raise _truncated(where, at, len(data))
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha() or length >= 2**31:
            raise SteerError(f"{where}: expected a PNG chunk at byte {at}, found {kind!r}; fetch the file again")
        end = at + 12 + length
        if len(data) < end:
            raise _truncated(where, at, len(data))
        if kind in _TEXTS:
            keyword = data[at + 8 : min(at + 8 + _KEYWORD + 1, end - 4)].partition(b"\0")[0]
            out.append(TextChunk(keyword.decode("latin-1").lower(), kind, at, end))
        at = end
        if kind == b"IEND":
            return out
    raise SteerError(f"{where}: expected a PNG of at most {_CHUNK_LIMIT:,} chunks, found more; is it the right file?")


def read_text(data: bytes, chunk: TextChunk, limit: int, where: str) -> bytes:
    """The text of a chunk, inflated if it is deflated, but never further than `limit` bytes.

    Errors: SteerError for a wrong checksum, a broken or deflated text, one over the limit.
    """
    body = data[chunk.start + 8 : chunk.end - 4]
    if zlib.crc32(chunk.kind + body) != int.from_bytes(data[chunk.end - 4 : chunk.end], "big"):
        raise SteerError(f"{where}: expected its checksum to match, found it damaged; fetch the file again")
    _, nul, text = body.partition(b"\0")
    deflated = chunk.kind == b"zTXt"
    if chunk.kind == b"iTXt":
        deflated, text = text[:1] == b"\1", text[2:]
        for _ in ("language tag", "translated keyword"):
            _, nul, text = text.partition(b"\0")
    elif deflated:
        text = text[1:]
    if not nul:
        raise SteerError(f"{where}: expected a keyword and a text, found no end of the keyword; fetch the file again")
    if deflated:
        text = _inflated(text, limit, where)
    if len(text) > limit:
        raise SteerError(f"{where}: expected a text of at most {limit:,} bytes, found more; is it a character card?")
    return text


def with_texts(data: bytes, texts: Mapping[TextChunk, bytes]) -> bytes:
    """The same file with other texts in these chunks, as tEXt; every other byte stays."""
    parts: list[bytes] = []
    at = 0
    for chunk, text in sorted(texts.items(), key=lambda item: item[0].start):
        # The keyword as it was written: `text_chunks` told it in lower case.
        body = data[chunk.start + 8 : chunk.start + 8 + len(chunk.keyword)] + b"\0" + text
        parts += [data[at : chunk.start], struct.pack(">I4s", len(body), b"tEXt"), body]
        parts.append(zlib.crc32(b"tEXt" + body).to_bytes(4, "big"))
        at = chunk.end
    return b"".join([*parts, data[at:]])


def _inflated(text: bytes, limit: int, where: str) -> bytes:
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(text, limit + 1)
    except zlib.error as e:
        raise SteerError(f"{where}: expected a deflated text, found it damaged; fetch the file again") from e
    if len(out) <= limit and not inflater.eof:
        raise SteerError(f"{where}: expected a deflated text, found it cut short; fetch the file again")
    return out


def _truncated(where: str, at: int, size: int) -> SteerError:
    return SteerError(
        f"{where}: expected a whole PNG, found {size:,} bytes that end within the chunk at byte {at:,}; fetch it again"
    )

"""The JSON of a character card, in a PNG or a file of its own: read within limits, written with the rest untouched.

Character Card V1 and V2 (malfoyslastname/character-card-spec-v2), V3 (kwaroran/character-card-spec-v3).
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.files import one_line
from steer.values.png_text import SIGNATURE, TextChunk, read_text, text_chunks, with_texts
from steer.values.small_files import read_small, shown

FILE_LIMIT = 20_000_000
"""A card's file, in bytes."""
TEXT_LIMIT = 4_000_000
"""A card's JSON, in bytes."""
DEPTH_LIMIT = 64
"""Levels of lists and objects in a card's JSON."""
V1_TEXTS = ("name", "description", "personality", "scenario", "first_mes", "mes_example")
"""Fields of a V1 card, all of them texts."""
_CHUNKS = ("ccv3", "chara")
"""Keywords of the PNG texts that hold a card, the better one first."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_card(source: str | Path | bytes) -> tuple[bytes, str, Path | None]:
    """The file's bytes, what errors call it, and its folder."""
    if not isinstance(source, bytes):
        path = Path(source)
        return read_small(path, FILE_LIMIT, "a character card"), str(path), path.parent
    if len(source) > FILE_LIMIT:
        raise SteerError(f"card: expected at most {FILE_LIMIT:,} bytes, found {len(source):,}; is it the right file?")
    return source, "card", None


def card_json(data: bytes, where: str) -> dict[str, Any]:
    """The card's JSON object; the V3 one where a PNG holds both."""
    if data.startswith(SIGNATURE):
        return _in_chunk(data, _chunks(data, where)[0], where)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return _parse(data, where)
    do = "unpack it and pass its card.json" if data.startswith(b"PK") else "save it as PNG or JSON"
    raise SteerError(f"{where}: expected a PNG or a JSON object, found a file that begins {data[:8]!r}; {do}")


def with_json(data: bytes, where: str, change: Callable[[dict[str, Any], str], dict[str, Any]]) -> bytes:
    """The file with its card changed by `change(object, where)`: both cards where a PNG holds two, as one reader
    takes the one and another the other. Errors: SteerError as in `card_json`."""
    if not data.startswith(SIGNATURE):
        return _dumped(change(card_json(data, where), where), indent=2)
    texts: dict[TextChunk, bytes] = {}
    for chunk in _chunks(data, where):
        made = change(_in_chunk(data, chunk, where), f"{where}: text {chunk.keyword!r}")
        texts[chunk] = base64.b64encode(_dumped(made, separators=(",", ":")))
    return with_texts(data, texts)


def card_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The card's fields: `data` of V2 and later, all of it in V1."""
    if "data" in raw or raw.get("spec") is not None:
        data = raw.get("data")
        if not isinstance(data, dict):
            raise SteerError(
                f"{where}: data: expected an object with the card's fields, found {shown(data)}; export it again"
            )
        return data
    missing = [k for k in ("name", "description", "first_mes") if k not in raw]
    if missing:
        raise SteerError(
            f"{where}: expected a character card ({', '.join(V1_TEXTS)}, or `spec` and `data`), found no "
            f"{missing[0]!r}; is it another JSON file?"
        )
    return raw


def _chunks(data: bytes, where: str) -> list[TextChunk]:
    """The first chunk of each keyword, the preferred one first."""
    first: dict[str, TextChunk] = {}
    for chunk in text_chunks(data, where):
        first.setdefault(chunk.keyword, chunk)
    out = [first[k] for k in _CHUNKS if k in first]
    if not out:
        there = ", ".join(repr(k) for k in list(first)[:5]) or "none"
        raise SteerError(
            f"{where}: expected a character card in a PNG text {' or '.join(_CHUNKS)}, found texts: {there}; "
            "sites that convert images strip it, so fetch the original"
        )
    return out


def _in_chunk(data: bytes, chunk: TextChunk, where: str) -> dict[str, Any]:
    where = f"{where}: text {chunk.keyword!r}"
    text = b"".join(read_text(data, chunk, 2 * TEXT_LIMIT, where).split())
    try:
        decoded = base64.b64decode(text, validate=True)
    except ValueError as e:
        raise SteerError(f"{where}: expected base64, found none ({one_line(e)}); fetch the card again") from e
    return _parse(decoded, where)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object within the limits."""
    if len(data) > TEXT_LIMIT:
        raise SteerError(f"{where}: expected JSON of at most {TEXT_LIMIT:,} bytes, found {len(data):,}; is it a card?")
    try:
        out = json.loads(data.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as e:
        raise SteerError(f"{where}: expected a character card in JSON, found {one_line(e)}; fetch it again") from e
    if not isinstance(out, dict):
        raise SteerError(f"{where}: expected a JSON object, found {shown(out)}; is it a character card?")
    level: list[Any] = [out]
    for _ in range(DEPTH_LIMIT):
        inside = (v for node in level for v in (node.values() if isinstance(node, dict) else node))
        level = [v for v in inside if isinstance(v, dict | list)]
    if level:
        raise _too_deep(where)
    return out


def _finite(text: str) -> float:
    # JSON knows no such number: written again, it would be a card that other programs refuse.
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]}")
    return number


def _too_deep(where: str) -> SteerError:
    return SteerError(f"{where}: expected JSON of at most {DEPTH_LIMIT} levels, found more; is it a character card?")


def _dumped(raw: dict[str, Any], **layout: Any) -> bytes:
    # Half of a surrogate pair is fine in JSON's escapes, and has no UTF-8.
    text = json.dumps(raw, ensure_ascii=False, **layout)
    return _SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", text).encode()

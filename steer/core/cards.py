"""Character cards: reads one from a PNG or JSON file, and turns it into a system prompt and a greeting for a chat.

Cards come from strangers, so sizes are checked before anything is decoded. The file has three parts, from the bytes up:
the text chunks of a PNG, the card's JSON, and `Card` with `load_card` and `save_card_profile`.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from steer.core.profile import Profile
from steer.core.small_files import read_small, shown
from steer.errors import SteerError, UsageError
from steer.files import one_line, write_atomic
from steer.plain_text import without_surrogates

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_CHUNK_LIMIT = 100_000  # most chunks a PNG may have; encoders put kilobytes of pixels into each
_KEYWORD = 79  # longest keyword that the PNG format allows, in bytes


@dataclass(frozen=True)
class TextChunk:
    """Position of one text chunk in a PNG file."""

    keyword: str
    """In lower case."""
    kind: bytes
    """tEXt, zTXt (deflated) or iTXt (UTF-8, deflated or not)."""
    start: int
    """Offset of the chunk's first byte, which begins its length field."""
    end: int
    """Offset of the byte after the chunk's checksum."""


def text_chunks(data: bytes, where: str) -> list[TextChunk]:
    """Find every text chunk of a PNG, in the order of the file. `where` names the file in errors.

    Errors: SteerError if the file ends early, is not a row of chunks, or has over 100,000 of them.
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
    """Read the text of a chunk and inflate it if it is deflated, never beyond `limit` bytes.

    Errors: SteerError for a wrong checksum, for a damaged text, and for a text over the limit.
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
    """The same file with the given chunks replaced by tEXt chunks that hold the new texts. All other bytes stay."""
    parts: list[bytes] = []
    at = 0
    for chunk, text in sorted(texts.items(), key=lambda item: item[0].start):
        # Copied from the file, because `TextChunk.keyword` is in lower case.
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


FILE_LIMIT = 20_000_000
"""Largest card file, in bytes."""
TEXT_LIMIT = 4_000_000
"""Largest JSON of a card, in bytes."""
DEPTH_LIMIT = 64
"""Deepest nesting of lists and objects in a card's JSON."""
V1_TEXTS = ("name", "description", "personality", "scenario", "first_mes", "mes_example")
"""Fields of a V1 card; all of them are texts."""
_CHUNKS = ("ccv3", "chara")
"""Keywords of the PNG texts that hold a card; the first is preferred."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_card(source: str | Path | bytes) -> tuple[bytes, str, Path | None]:
    """Returns the file's bytes, its name for errors, and its folder (None for bytes)."""
    if not isinstance(source, bytes):
        path = Path(source)
        return read_small(path, FILE_LIMIT, "a character card"), str(path), path.parent
    if len(source) > FILE_LIMIT:
        raise SteerError(f"card: expected at most {FILE_LIMIT:,} bytes, found {len(source):,}; is it the right file?")
    return source, "card", None


def card_json(data: bytes, where: str) -> dict[str, Any]:
    """The card's JSON object. Where a PNG holds a V2 and a V3 card, the V3 one is returned."""
    if data.startswith(SIGNATURE):
        return _in_chunk(data, _chunks(data, where)[0], where)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return _parse(data, where)
    do = "unpack it and pass its card.json" if data.startswith(b"PK") else "save it as PNG or JSON"
    raise SteerError(f"{where}: expected a PNG or a JSON object, found a file that begins {data[:8]!r}; {do}")


def with_json(data: bytes, where: str, change: Callable[[dict[str, Any], str], dict[str, Any]]) -> bytes:
    """The file with its card replaced by `change(object, where)`. Where a PNG holds two cards both are changed, because
    some programs read the one and some the other. Errors: SteerError as in `card_json`."""
    if not data.startswith(SIGNATURE):
        return _dumped(change(card_json(data, where), where), indent=2)
    texts: dict[TextChunk, bytes] = {}
    for chunk in _chunks(data, where):
        changed = change(_in_chunk(data, chunk, where), f"{where}: text {chunk.keyword!r}")
        texts[chunk] = base64.b64encode(_dumped(changed, separators=(",", ":")))
    return with_texts(data, texts)


def card_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The card's fields: the object under `data` in V2 and later, the whole object in V1."""
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
    """The first chunk of each keyword that may hold a card, the preferred keyword first."""
    first: dict[str, TextChunk] = {}
    for chunk in text_chunks(data, where):
        first.setdefault(chunk.keyword, chunk)
    out = [first[k] for k in _CHUNKS if k in first]
    if not out:
        found = ", ".join(repr(k) for k in list(first)[:5]) or "none"
        raise SteerError(
            f"{where}: expected a character card in a PNG text {' or '.join(_CHUNKS)}, found texts: {found}; "
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
    """Parse a JSON object within the limits of this file."""
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
    # JSON has no nan or infinity: a card written with one would be refused by other programs.
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]}")
    return number


def _too_deep(where: str) -> SteerError:
    return SteerError(f"{where}: expected JSON of at most {DEPTH_LIMIT} levels, found more; is it a character card?")


def _dumped(raw: dict[str, Any], **layout: Any) -> bytes:
    # JSON can escape half of a surrogate pair, but UTF-8 cannot hold it.
    text = json.dumps(raw, ensure_ascii=False, **layout)
    return _SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", text).encode()


DEFAULT_PROMPT = "You are {{char}}. Write {{char}}'s next reply to {{user}}, and stay in character."
"""Replaces `{{original}}`, and is the system prompt of a card that has none."""

_V2_TEXTS = ("system_prompt", "post_history_instructions", "creator_notes", "nickname")  # the last one is new in V3
_V2_EMPTY: dict[str, Any] = dict.fromkeys((*V1_TEXTS, *_V2_TEXTS[:3], "creator", "character_version"), "") | {
    "alternate_greetings": [],
    "tags": [],
}
"""Every field that a V2 card must have, empty."""
_MACRO = re.compile(
    r"\{\{\s*(?P<name>char|user)\s*\}\}|<(?P<old>user|bot|char)>|\{\{(?://|comment:|hidden_key:)[^{}]*\}\}",
    re.IGNORECASE,
)
_ORIGINAL = re.compile(r"\{\{\s*original\s*\}\}", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that would move a terminal's cursor, or worse
_START = re.compile(r"<START>", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A character, ready for a chat: macros such as `{{user}}` are replaced.

    Example:
        card = steer.load_card("character.png", user="Ann")
        messages = [{"role": "system", "content": card.system_prompt}]
    """

    name: str
    version: str
    """Version of the card's specification: 1.0, 2.0 or 3.0."""
    definition: str
    """Begins the system prompt: the card's own system prompt, description, personality and scenario."""
    examples: tuple[str, ...]
    """Example conversations with the character. They are the first to be dropped where the context gets short (V1)."""
    first_message: str
    """The character's greeting, which begins the chat. Empty: the user begins."""
    alternate_greetings: tuple[str, ...] = ()
    """Other greetings to choose from."""
    post_history_instructions: str = ""
    """Instructions to insert after the chat so far; empty for none."""
    creator_notes: str = ""
    """Notes for people, never shown to the model; macros are not replaced."""
    profile: Profile | None = None
    """Sliders and sampler that come with the card, from `data.extensions.steer.profile`; None without them."""
    extensions: Mapping[str, Any] = field(default_factory=dict)
    """The card's `data.extensions`, unchanged."""

    @property
    def system_prompt(self) -> str:
        """The definition, followed by the examples."""
        return "\n\n".join([self.definition, *(f"Example dialogue:\n{e}" for e in self.examples)])


def load_card(source: str | Path | bytes, *, user: str = "You", original: str = DEFAULT_PROMPT) -> Card:
    """Load a card from a PNG or JSON file, or from the bytes of one.

    `user` replaces `{{user}}`. `original` replaces `{{original}}` in the card's prompts, and is the system prompt of a
    card that has none.

        card = steer.load_card("character.png", user="Ann")
        print(card.name, card.first_message)

    Errors: SteerError for a file that is missing, too large, truncated or damaged, for one without a card, for a card
    with fields of the wrong type, and for an invalid profile in it.
    """
    file, where, folder = read_card(source)
    raw = card_json(file, where)
    data = card_fields(raw, where)
    texts = {k: _text(data, k, where) for k in (*V1_TEXTS, *_V2_TEXTS)}
    name = " ".join(texts["name"].split())
    if not name:
        raise SteerError(f"{where}: name: expected the character's name, found none; fill it in")
    fill = _Macros(" ".join(texts["nickname"].split()) or name, user, original, where)
    about = (
        fill(texts["system_prompt"] or original, prompt=True),
        fill(texts["description"]),
        fill(texts["personality"] and "{{char}}'s personality: " + texts["personality"]),
        fill(texts["scenario"] and "Scenario: " + texts["scenario"]),
    )
    examples = (fill(e).strip() for e in _START.split(texts["mes_example"]))
    return Card(
        name,
        version=_version(raw),
        definition="\n\n".join(t.strip() for t in about if t.strip()),
        examples=tuple(e for e in examples if e),
        first_message=fill(texts["first_mes"]),
        alternate_greetings=tuple(fill(g) for g in _greetings(data, where)),
        post_history_instructions=fill(texts["post_history_instructions"], prompt=True),
        creator_notes=texts["creator_notes"],
        profile=_profile(raw, where, folder),
        extensions=_extensions(data, where),
    )


def save_card_profile(card: str | Path, profile: Profile, out: str | Path) -> Path:
    """Write a copy of `card` that contains `profile` to `out`. `out` may be the card itself; it is written whole or not
    at all.

    All else in the card is kept: a PNG's other chunks byte for byte, the card's other fields in their meaning. A V1
    card becomes a V2 card that V1 readers can still read.

    Errors: SteerError as in `load_card`, and for a profile that names files outside of the folder of `out`; UsageError
    if `out` has the suffix of the other file type.
    """
    out = Path(out)
    data, where, _ = read_card(card)
    suffix = ".png" if data.startswith(SIGNATURE) else ".json"
    if out.suffix.lower() in {".png", ".json"} - {suffix}:
        raise UsageError(f"{out}: expected a name that ends in {suffix}, as {where} does; a card keeps its kind")
    profile = profile.in_folder(out.parent)
    _check_files(profile, str(out))
    changed = with_json(data, where, lambda raw, at: _with_profile(raw, profile, at))
    if len(changed) > FILE_LIMIT:
        raise SteerError(
            f"{out}: expected a card of at most {FILE_LIMIT:,} bytes, found {len(changed):,}; shorten its profile"
        )
    # Read the result again, so that no card is written that `load_card` would refuse.
    _profile(card_json(changed, str(out)), str(out), out.parent)
    return write_atomic(out, changed)


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    """A text field of the card; empty where it is absent or null."""
    return "" if data.get(key) is None else _clean(data[key], key, where)


def _clean(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise SteerError(f"{where}: {key}: expected text, found {shown(value)}; mend the card")
    return without_surrogates(_CONTROL.sub("", value))


def _greetings(data: Mapping[str, Any], where: str) -> list[str]:
    key = "alternate_greetings"
    greetings = data.get(key) or []
    if not isinstance(greetings, list):
        raise SteerError(f"{where}: {key}: expected a list of texts, found {shown(greetings)}; mend the card")
    return [_clean(g, f"{key}[{i}]", where) for i, g in enumerate(greetings)]


def _version(raw: Mapping[str, Any]) -> str:
    if "data" not in raw:
        return "1.0"
    version = str(raw.get("spec_version"))[:8]
    if re.fullmatch(r"\d+(\.\d+)?", version):
        return version
    return "3.0" if raw.get("spec") == "chara_card_v3" else "2.0"


def _extensions(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    extensions = data.get("extensions")
    if not isinstance(extensions, dict | None):
        raise SteerError(f"{where}: data.extensions: expected an object, found {shown(extensions)}; mend the card")
    return extensions or {}


def _steer_extension(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The object under `data.extensions.steer`, where this project keeps its data in a card; empty without one."""
    extension = _extensions(data, where).get("steer")
    if not isinstance(extension, dict | None):
        raise SteerError(f"{where}: data.extensions.steer: expected an object, found {shown(extension)}; mend the card")
    return extension or {}


def _profile(raw: dict[str, Any], where: str, folder: Path | None) -> Profile | None:
    found = _steer_extension(card_fields(raw, where), where).get("profile")
    if found is None:
        return None
    profile = Profile.parse(found, f"{where}: data.extensions.steer.profile", folder)
    _check_files(profile, where)
    return profile


def _check_files(profile: Profile, where: str) -> None:
    """Raise SteerError if the profile names a file outside of the card's folder. A stranger's card must not choose
    which files are read, and on another machine the file would be missing."""
    for text in profile.files():
        path = PureWindowsPath(text)  # understands both slashes, and drives
        if path.anchor or ".." in path.parts:
            raise SteerError(
                f"{where}: profile {profile.name!r}: expected direction files in the card's folder, "
                f"found {shown(text)}; put the file beside the card, or name the slider"
            )


def _with_profile(raw: dict[str, Any], profile: Profile, where: str) -> dict[str, Any]:
    data = card_fields(raw, where)
    extension = _steer_extension(data, where) | {"profile": profile.dump()}
    extensions = {"extensions": _extensions(data, where) | {"steer": extension}}
    if data is raw:
        return raw | {"spec": "chara_card_v2", "spec_version": "2.0", "data": _V2_EMPTY | raw | extensions}
    return raw | {"data": data | extensions}


@dataclass
class _Macros:
    """Replaces macros in one pass: macros inside of a replacement are not replaced again. A short macro can stand for a
    long name a million times, so the total growth of a card is limited to `TEXT_LIMIT` characters."""

    char: str
    user: str
    original: str
    where: str
    grown: int = 0
    """Characters inserted so far."""

    def __call__(self, text: str, prompt: bool = False) -> str:
        """Replace the macros in a text. With `prompt`, `{{original}}` is replaced too."""
        if prompt:
            text = _ORIGINAL.sub(lambda _: self._counted(self.original), text)
        return _MACRO.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name = (match["name"] or match["old"] or "").lower()
        return self._counted({"": "", "user": self.user}.get(name, self.char))

    def _counted(self, text: str) -> str:
        self.grown += len(text)
        if self.grown > TEXT_LIMIT:
            raise SteerError(
                f"{self.where}: expected macros that stand for at most {TEXT_LIMIT:,} characters, found more; "
                "take some out"
            )
        return text

"""Character cards: reads one from a PNG or JSON file, and turns it into a system prompt and a greeting for a chat.

Cards come from strangers, so sizes are checked before anything is decoded. From the top down: `Card`, `load_card` and
`save_card_profile`; the card's fields and macros; its JSON; the text chunks of a PNG.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from steer.core.profile import Profile
from steer.core.small_files import read_small, shown
from steer.core.validation import from_file
from steer.errors import SteerError, UsageError
from steer.files import one_line, write_atomic
from steer.plain_text import without_surrogates

FILE_LIMIT = 20_000_000
"""Largest card file, in bytes."""
TEXT_LIMIT = 4_000_000
"""Largest JSON of a card, in bytes, and most characters that its macros may stand for."""
DEPTH_LIMIT = 64
"""Deepest nesting of lists and objects in a card's JSON."""
DEFAULT_PROMPT = "You are {{char}}. Write {{char}}'s next reply to {{user}}, and stay in character."
"""Replaces `{{original}}`, and is the system prompt of a card that has none."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK_LIMIT = 100_000  # most chunks a PNG may have; encoders put kilobytes of pixels into each
_KEYWORD = 79  # longest keyword that the PNG format allows, in bytes
_KEYWORDS = ("ccv3", "chara")  # keywords of the PNG texts that hold a card; the first is preferred
_V1_TEXTS = ("name", "description", "personality", "scenario", "first_mes", "mes_example")
_V2_TEXTS = ("system_prompt", "post_history_instructions", "creator_notes", "creator", "character_version")
_V2_EMPTY: dict[str, Any] = dict.fromkeys((*_V1_TEXTS, *_V2_TEXTS), "") | {"alternate_greetings": [], "tags": []}
"""Every field that a V2 card must have, empty."""
_MACRO = re.compile(
    r"\{\{\s*(?P<name>char|user)\s*\}\}|<(?P<old>user|bot|char)>|\{\{(?://|comment:|hidden_key:)[^{}]*\}\}",
    re.IGNORECASE,
)
_ORIGINAL = re.compile(r"\{\{\s*original\s*\}\}", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that would move a terminal's cursor, or worse
_START = re.compile(r"<START>", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    where, folder = ("card", None) if isinstance(source, bytes) else (str(source), Path(source).parent)
    file = source if isinstance(source, bytes) else read_small(Path(source), FILE_LIMIT, "a character card")
    if len(file) > FILE_LIMIT:
        raise SteerError(f"{where}: expected at most {FILE_LIMIT:,} bytes, found {len(file):,}; is it the right file?")
    raw = _card_json(file, where)
    data, fields = _fields(raw, where, folder)
    name = " ".join(fields.name.split())
    if not name:
        raise SteerError(f"{where}: name: expected the character's name, found none; fill it in")
    fill = _macros(" ".join(fields.nickname.split()) or name, user, original, where)
    about = (
        fill(fields.system_prompt or original, prompt=True),
        fill(fields.description),
        fill(fields.personality and "{{char}}'s personality: " + fields.personality),
        fill(fields.scenario and "Scenario: " + fields.scenario),
    )
    examples = (fill(e).strip() for e in _START.split(fields.mes_example))
    return Card(
        name,
        version=_version(raw),
        definition="\n\n".join(t.strip() for t in about if t.strip()),
        examples=tuple(e for e in examples if e),
        first_message=fill(fields.first_mes),
        alternate_greetings=tuple(fill(g) for g in fields.alternate_greetings),
        post_history_instructions=fill(fields.post_history_instructions, prompt=True),
        creator_notes=fields.creator_notes,
        profile=fields.extensions.steer.profile,
        extensions=data.get("extensions") or {},
    )


def save_card_profile(card: str | Path, profile: Profile, out: str | Path) -> Path:
    """Write a copy of `card` that contains `profile` to `out`. `out` may be the card itself; it is written whole or not
    at all.

    All else in the card is kept: a PNG's other chunks byte for byte, the card's other fields in their meaning. A V1
    card becomes a V2 card that V1 readers can still read.

    Errors: SteerError as in `load_card`, and for a profile that names files outside of the folder of `out`; UsageError
    if `out` has the suffix of the other file type.
    """
    out, where = Path(out), str(card)
    data = read_small(Path(card), FILE_LIMIT, "a character card")
    suffix = ".png" if data.startswith(_SIGNATURE) else ".json"
    if out.suffix.lower() in {".png", ".json"} - {suffix}:
        raise UsageError(f"{out}: expected a name that ends in {suffix}, as {where} does; a card keeps its kind")
    profile = profile.in_folder(out.parent)
    _check_files(profile, str(out))
    changed = _with_profile(data, profile, where)
    if len(changed) > FILE_LIMIT:
        raise SteerError(
            f"{out}: expected a card of at most {FILE_LIMIT:,} bytes, found {len(changed):,}; shorten its profile"
        )
    # Read the result again, so that no card is written that `load_card` would refuse.
    _fields(_card_json(changed, str(out)), str(out), out.parent)
    return write_atomic(out, changed)


class _Nullable(BaseModel):
    """Fields of a card. Unknown ones are ignored, and null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _present(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class _Steer(_Nullable):
    """The object in which this project keeps its data in a card."""

    profile: Profile | None = None


class _Extensions(_Nullable):
    steer: _Steer = _Steer()


_Text = Annotated[str, Field(strict=True), AfterValidator(lambda text: without_surrogates(_CONTROL.sub("", text)))]


class _Fields(_Nullable):
    name: _Text = ""
    description: _Text = ""
    personality: _Text = ""
    scenario: _Text = ""
    first_mes: _Text = ""
    mes_example: _Text = ""
    system_prompt: _Text = ""
    post_history_instructions: _Text = ""
    creator_notes: _Text = ""
    nickname: _Text = ""
    alternate_greetings: Annotated[list[_Text], Field(fail_fast=True), BeforeValidator(lambda v: v or [])] = []
    extensions: _Extensions = _Extensions()


def _object(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The object with the card's fields (the one under `data` in V2 and later, the whole card in V1), and its place for
    messages."""
    data = raw
    if "data" in raw or raw.get("spec") is not None:
        data, where = raw.get("data"), f"{where}: data"
    if not isinstance(data, dict):
        raise SteerError(f"{where}: expected an object with the card's fields, found {shown(data)}; export it again")
    missing = [k for k in ("name", "description", "first_mes") if data is raw and k not in raw]
    if missing:
        raise SteerError(
            f"{where}: expected a character card ({', '.join(_V1_TEXTS)}, or `spec` and `data`), found no "
            f"{missing[0]!r}; is it another JSON file?"
        )
    return data, where


def _fields(raw: dict[str, Any], where: str, folder: Path | None) -> tuple[dict[str, Any], _Fields]:
    """The object with the card's fields, also checked."""
    data, where = _object(raw, where)
    fields = from_file(_Fields, data, where)
    if fields.extensions.steer.profile is not None:
        fields.extensions.steer.profile = replace(fields.extensions.steer.profile, folder=folder)
        _check_files(fields.extensions.steer.profile, where)
    return data, fields


def _version(raw: Mapping[str, Any]) -> str:
    if "data" not in raw:
        return "1.0"
    version = str(raw.get("spec_version"))[:8]
    if re.fullmatch(r"\d+(\.\d+)?", version):
        return version
    return "3.0" if raw.get("spec") == "chara_card_v3" else "2.0"


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


def _macros(char: str, user: str, original: str, where: str) -> Callable[..., str]:
    """A function that replaces the macros in a text, in one pass: macros inside of a replacement are not replaced
    again. With `prompt=True`, `{{original}}` is replaced too.

    A short macro can stand for a long name a million times, so the growth of all texts together is limited.
    """
    grown = 0

    def counted(text: str) -> str:
        nonlocal grown
        grown += len(text)
        if grown > TEXT_LIMIT:
            raise SteerError(
                f"{where}: expected macros that stand for at most {TEXT_LIMIT:,} characters, found more; take some out"
            )
        return text

    def value(match: re.Match[str]) -> str:
        return counted({"": "", "user": user}.get((match["name"] or match["old"] or "").lower(), char))

    def fill(text: str, prompt: bool = False) -> str:
        return _MACRO.sub(value, _ORIGINAL.sub(lambda _: counted(original), text) if prompt else text)

    return fill


def _card_json(data: bytes, where: str) -> dict[str, Any]:
    """The card's JSON object. Where a PNG holds a V2 and a V3 card, the V3 one is returned."""
    if data.startswith(_SIGNATURE):
        return _in_chunk(data, _chunks(data, where)[0], where)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return _parse(data, where)
    do = "unpack it and pass its card.json" if data.startswith(b"PK") else "save it as PNG or JSON"
    raise SteerError(f"{where}: expected a PNG or a JSON object, found a file that begins {data[:8]!r}; {do}")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object within the limits of this file."""
    if len(data) > TEXT_LIMIT:
        raise SteerError(f"{where}: expected JSON of at most {TEXT_LIMIT:,} bytes, found {len(data):,}; is it a card?")
    too_deep = SteerError(
        f"{where}: expected JSON of at most {DEPTH_LIMIT} levels, found more; is it a character card?"
    )
    try:
        out = json.loads(data.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise too_deep from None
    except ValueError as e:
        raise SteerError(f"{where}: expected a character card in JSON, found {one_line(e)}; fetch it again") from e
    if not isinstance(out, dict):
        raise SteerError(f"{where}: expected a JSON object, found {shown(out)}; is it a character card?")
    level: list[Any] = [out]
    for _ in range(DEPTH_LIMIT):
        inside = (v for node in level for v in (node.values() if isinstance(node, dict) else node))
        level = [v for v in inside if isinstance(v, dict | list)]
    if level:
        raise too_deep
    return out


def _finite(text: str) -> float:
    # JSON has no nan or infinity: a card written with one would be refused by other programs.
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]}")
    return number


def _with_profile(data: bytes, profile: Profile, where: str) -> bytes:
    """The file with `profile` in its card. Where a PNG holds two cards both are changed, because some programs read the
    one and some the other."""

    def changed(raw: dict[str, Any], where: str, **layout: Any) -> bytes:
        fields, _ = _object(raw, where)  # a broken profile in it is replaced
        extensions = fields.get("extensions") or {}
        steer = (extensions.get("steer") or {}) | {"profile": profile.dump()}
        made = fields | {"extensions": extensions | {"steer": steer}}
        card = raw | {"data": made}
        if fields is raw:
            card |= {"spec": "chara_card_v2", "spec_version": "2.0", "data": _V2_EMPTY | made}
        # JSON can escape half of a surrogate pair, but UTF-8 cannot hold it.
        text = json.dumps(card, ensure_ascii=False, **layout)
        return _SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", text).encode()

    if not data.startswith(_SIGNATURE):
        return changed(_card_json(data, where), where, indent=2)
    out, at = b"", 0
    for chunk in sorted(_chunks(data, where), key=lambda c: c.start):
        raw = _in_chunk(data, chunk, where)
        text = base64.b64encode(changed(raw, f"{where}: text {chunk.keyword!r}", separators=(",", ":")))
        # Copied from the file, because `_Chunk.keyword` is in lower case.
        body = data[chunk.start + 8 : chunk.start + 8 + len(chunk.keyword)] + b"\0" + text
        crc = zlib.crc32(b"tEXt" + body).to_bytes(4, "big")
        out += data[at : chunk.start] + struct.pack(">I4s", len(body), b"tEXt") + body + crc
        at = chunk.end
    return out + data[at:]


@dataclass(frozen=True)
class _Chunk:
    """Position of one text chunk in a PNG file."""

    keyword: str
    """In lower case."""
    kind: bytes
    """tEXt, zTXt (deflated) or iTXt (UTF-8, deflated or not)."""
    start: int
    """Offset of the chunk's first byte, which begins its length field."""
    end: int
    """Offset of the byte after the chunk's checksum."""


def _chunks(data: bytes, where: str) -> list[_Chunk]:
    """The first text chunk of each keyword that may hold a card, the preferred keyword first."""
    first: dict[str, _Chunk] = {}
    at = len(_SIGNATURE)
    for _ in range(_CHUNK_LIMIT):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if len(kind) == 4 and not (kind.isalpha() and length < 2**31):
            raise SteerError(f"{where}: expected a PNG chunk at byte {at}, found {kind!r}; fetch the file again")
        end = at + 12 + length
        if len(data) < end:
            found = f"{len(data):,} bytes that end within the chunk at byte {at:,}"
            raise SteerError(f"{where}: expected a whole PNG, found {found}; fetch it again")
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[at + 8 : min(at + 9 + _KEYWORD, end - 4)].partition(b"\0")[0].decode("latin-1").lower()
            first.setdefault(keyword, _Chunk(keyword, kind, at, end))
        at = end
        if kind == b"IEND":
            break
    else:
        raise SteerError(
            f"{where}: expected a PNG of at most {_CHUNK_LIMIT:,} chunks, found more; is it the right file?"
        )
    out = [first[k] for k in _KEYWORDS if k in first]
    if not out:
        found = ", ".join(repr(k) for k in list(first)[:5]) or "none"
        raise SteerError(
            f"{where}: expected a character card in a PNG text {' or '.join(_KEYWORDS)}, found texts: {found}; "
            "sites that convert images strip it, so fetch the original"
        )
    return out


def _in_chunk(data: bytes, chunk: _Chunk, where: str) -> dict[str, Any]:
    """The JSON object in a chunk."""
    where = f"{where}: text {chunk.keyword!r}"
    text = b"".join(_text(data, chunk, 2 * TEXT_LIMIT, where).split())
    try:
        decoded = base64.b64decode(text, validate=True)
    except ValueError as e:
        raise SteerError(f"{where}: expected base64, found none ({one_line(e)}); fetch the card again") from e
    return _parse(decoded, where)


def _text(data: bytes, chunk: _Chunk, limit: int, where: str) -> bytes:
    """The text of a chunk, inflated if it is deflated, never beyond `limit` bytes."""
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
        inflater = zlib.decompressobj()
        try:
            text = inflater.decompress(text, limit + 1)
        except zlib.error as e:
            raise SteerError(f"{where}: expected a deflated text, found it damaged; fetch the file again") from e
        if len(text) <= limit and not inflater.eof:
            raise SteerError(f"{where}: expected a deflated text, found it cut short; fetch the file again")
    if len(text) > limit:
        raise SteerError(f"{where}: expected a text of at most {limit:,} bytes, found more; is it a character card?")
    return text

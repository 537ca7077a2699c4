"""Character cards: reads one from a PNG, WEBP or JSON file, and makes the system prompt and the greeting of a chat.

The fields are those of the Character Card specifications V1 to V3 (github.com/kwaroran/character-card-spec-v3); keys of
Pygmalion's cards are read as well. A field of the wrong kind counts as empty, with a warning; a profile is checked.
Cards come from strangers, so sizes are checked before anything is decoded. From the top down: `Card`, `load_card` and
`save_card_profile`; the card's fields; its JSON; the text chunks of a PNG.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from pydantic import Field

from steer.core.lorebook import Lorebook, read_lorebook
from steer.core.macros import TEXT_LIMIT, Macros
from steer.core.profile import Profile
from steer.core.small_files import read_given, read_small, shown
from steer.core.validation import Clean, Cleans, Lenient, from_file, from_stranger
from steer.errors import SteerError, UsageError
from steer.files import one_line, parse_json, write_atomic

FILE_LIMIT = 20_000_000
"""Largest card file, in bytes."""
JSON_LIMIT = 4_000_000
"""Largest JSON of a card, in bytes."""
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
_PYGMALION = {
    "char_name": "name",
    "char_persona": "description",
    "world_scenario": "scenario",
    "char_greeting": "first_mes",
    "example_dialogue": "mes_example",
}
"""Key of a Pygmalion card -> the V1 field."""
_TELLING = {*_V1_TEXTS, "system_prompt", "alternate_greetings", "mes_example"} - {"name", "description"}
"""Fields of which a flat card has at least one; another JSON file may have a name and a description too."""
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
    sections: Mapping[str, str] = field(default_factory=dict)
    """The parts of `definition`: `description`, `personality` and `scenario`. Lorebooks put texts beside them."""
    lorebook: Lorebook | None = None
    """The card's `character_book`, which a chat scans for keys before each reply; None without one."""
    macros: Macros = field(default_factory=Macros)
    """What macros in the lorebook stand for."""
    warnings: tuple[str, ...] = ()
    """One line for each field that could not be used, and one for all macros that are not known."""
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


def load_card(
    source: str | Path | bytes,
    *,
    user: str = "You",
    persona: str = "",
    original: str = DEFAULT_PROMPT,
    seed: int = 0,
    filename: str | None = None,
) -> Card:
    """Load a card.

    `source`: a PNG, WEBP or JSON file, or the bytes of one. `user` and `persona` replace `{{user}}` and `{{persona}}`,
    the user's name and description. `original` replaces `{{original}}` in the card's prompts, and is the system prompt
    of a card that has none. `seed`: of the draws of `{{random}}`, `{{pick}}` and `{{roll}}`. `filename`: the name of
    the file that the bytes are from; a card without a name is called so.

        card = steer.load_card("character.png", user="Ann")
        print(card.name, card.first_message)

    Errors: SteerError for a file that is missing, too large, truncated or damaged, for one without a card, and for an
    invalid profile in it.
    """
    file, where = read_given(source, FILE_LIMIT, "a character card", "card")
    folder = None if isinstance(source, bytes) else Path(source).parent
    raw = _card_json(file, where)
    remarks: dict[str, str] = {}
    fields, profile = _fields(raw, where, folder, remarks)
    stem = Path(filename or (source if not isinstance(source, bytes) else "")).stem
    name = " ".join(fields.name.split()) or " ".join(stem.split()) or "Character"
    fill = _Filler(Macros({"user": user, "persona": persona}, seed), where)
    fill.name(" ".join(fields.nickname.split()) or name)
    texts = {k: getattr(fields, k) for k in ("description", "personality", "scenario", "mes_example")}
    texts |= {"charprompt": fields.system_prompt, "charjailbreak": fields.post_history_instructions}
    texts |= {"mesexamples": fields.mes_example, "charversion": fields.character_version, "original": ""}
    fill.macros = fill.macros.having(dict.fromkeys(texts, ""))
    for _ in range(2):  # a text may stand in another, and not for ever in itself
        fill.macros = fill.macros.having({k: fill(t).strip() for k, t in texts.items()})
    known = fill.macros.values
    sections = {
        "description": known["description"],
        "personality": known["personality"] and f"{known['char']}'s personality: {known['personality']}",
        "scenario": known["scenario"] and f"Scenario: {known['scenario']}",
    }
    original = fill(original)
    prompt = fill(fields.system_prompt, original=original).strip() or original.strip()
    examples = (fill(e).strip() for e in _START.split(fields.mes_example))
    book = fields.character_book
    lorebook = None if book is None else read_lorebook(book, f"{where}: character_book", f"{name}'s lorebook")
    for entry in () if lorebook is None else lorebook.entries:
        fill(entry.content)
    card = Card(
        name,
        version=_version(raw),
        definition="\n\n".join(t for t in (prompt, *sections.values()) if t),
        examples=tuple(e for e in examples if e),
        first_message=fill(fields.first_mes),
        alternate_greetings=tuple(fill(g) for g in fields.alternate_greetings),
        sections={k: t for k, t in sections.items() if t},
        lorebook=lorebook,
        macros=fill.macros,
        post_history_instructions=fill(fields.post_history_instructions, original=original),
        creator_notes=fields.creator_notes,
        profile=profile,
        extensions=fields.extensions,
    )
    if fill.unknown:
        names = ", ".join(f"{{{{{n}}}}}" for n in sorted(fill.unknown)[:10])
        remarks["macros"] = f"{where}: macros that are not known stay as they are: {names}"
    warnings = (*remarks.values(), *(() if lorebook is None else lorebook.warnings))
    return replace(card, warnings=tuple(" ".join(w.split())[:800] for w in warnings))


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
    if data[:4] == b"RIFF":
        raise UsageError(f"{where}: expected a PNG or JSON card, found a WEBP, which is only read; convert it")
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
    _fields(_card_json(changed, str(out)), str(out), out.parent, {})
    return write_atomic(out, changed)


class _Fields(Lenient):
    name: Clean = ""
    description: Clean = ""
    personality: Clean = ""
    scenario: Clean = ""
    first_mes: Clean = ""
    mes_example: Clean = ""
    system_prompt: Clean = ""
    post_history_instructions: Clean = ""
    creator_notes: Clean = ""
    character_version: Clean = ""
    nickname: Clean = ""
    alternate_greetings: Cleans = Field(default_factory=list)
    character_book: dict[str, Any] | None = None
    extensions: dict[str, Any] = Field(default_factory=dict)


def _object(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """The object with the card's fields, and whether that is the whole card: in V1, and where an editor of V2 cards
    forgot `data`. Pygmalion's keys are renamed."""
    if isinstance(raw.get("data"), dict):
        return raw["data"], False
    flat = {_PYGMALION.get(k, k): v for k, v in raw.items()}
    if raw.get("data") is not None or not _TELLING & flat.keys():
        none = f"none of {', '.join(sorted(_TELLING))}"
        found = none if raw.get("data") is None else f"`data` {shown(raw['data'])}"
        raise SteerError(
            f"{where}: expected a character card ({', '.join(_V1_TEXTS)}, or `spec` and `data`), found {found}; "
            "is it another JSON file?"
        )
    return flat, True


def _fields(
    raw: dict[str, Any], where: str, folder: Path | None, remarks: dict[str, str]
) -> tuple[_Fields, Profile | None]:
    """The card's fields and its profile. `remarks` gets a line for each field that counts as empty."""
    data, flat = _object(raw, where)
    fields = from_stranger(_Fields, data, where, remarks)
    steer = fields.extensions.get("steer") or {}
    where = where if flat else f"{where}: data"
    if not isinstance(steer, dict):
        raise SteerError(f"{where}: extensions: steer: expected a mapping, found {shown(steer)}; take it out")
    if steer.get("profile") is None:
        return fields, None
    profile = replace(from_file(Profile, steer["profile"], f"{where}: extensions: steer: profile"), folder=folder)
    _check_files(profile, where)
    return fields, profile


def _version(raw: Mapping[str, Any]) -> str:
    if not isinstance(raw.get("data"), dict) and raw.get("spec") is None:
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


class _Filler:
    """Replaces the macros in the texts of one card, and limits how much longer all of them together get: a short macro
    can stand for a long name a million times."""

    def __init__(self, macros: Macros, where: str) -> None:
        self.macros, self._where, self._grown = macros, where, 0
        self.unknown: set[str] = set()

    def name(self, char: str) -> None:
        """Set the character's name."""
        self.macros = self.macros.having({"char": char, "charifnotgroup": char, "group": char})

    def __call__(self, text: str, **values: str) -> str:
        try:
            out = self.macros.having(values).expand(text, unknown=self.unknown)
        except SteerError as e:
            raise SteerError(f"{self._where}: {e}") from e
        self._grown += max(0, len(out) - len(text))
        if self._grown > TEXT_LIMIT:
            raise SteerError(
                f"{self._where}: expected macros that stand for at most {TEXT_LIMIT:,} characters, found more; "
                "take some out"
            )
        return out


def _card_json(data: bytes, where: str) -> dict[str, Any]:
    """The card's JSON object. Where a PNG holds a V2 and a V3 card, the V3 one is returned."""
    if data.startswith(_SIGNATURE):
        return _in_chunk(data, _chunks(data, where)[0], where)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return _parse(data, where)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _in_webp(data, where)
    do = "unpack it and pass its card.json" if data.startswith(b"PK") else "save it as PNG or JSON"
    raise SteerError(f"{where}: expected a PNG or a JSON object, found a file that begins {data[:8]!r}; {do}")


def _in_webp(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in the comment of a WEBP picture: text, or the numbers of its bytes with commas between them."""
    from PIL import ExifTags, Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
            warnings.simplefilter("error")
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except Exception as e:  # of many kinds, for a file made to break it
        raise SteerError(f"{where}: expected a WEBP picture, found {one_line(e)}; save it as PNG or JSON") from e
    text = comment.encode() if isinstance(comment, str) else bytes(comment)
    text = text.removeprefix(b"ASCII\0\0\0").removeprefix(b"\0" * 8).strip(b"\0 \n")
    if re.fullmatch(rb"[\d,\s]+", text):
        try:
            text = bytes(int(n) for n in text.split(b","))
        except ValueError as e:
            raise SteerError(f"{where}: expected bytes in the picture's comment, found {one_line(e)}") from e
    if not text.startswith(b"{"):
        raise SteerError(
            f"{where}: expected a character card in the WEBP's comment, found none; sites that convert images strip "
            "it, so fetch the original, or save the card as PNG or JSON"
        )
    return _parse(text, where)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object within the limits of this file."""
    if len(data) > JSON_LIMIT:
        raise SteerError(f"{where}: expected JSON of at most {JSON_LIMIT:,} bytes, found {len(data):,}; is it a card?")
    try:
        out = parse_json(data, number=_finite, halves=True)
    except ValueError as e:
        raise SteerError(f"{where}: expected a character card in JSON, found {one_line(e)}; fetch it again") from e
    if not isinstance(out, dict):
        raise SteerError(f"{where}: expected a JSON object, found {shown(out)}; is it a character card?")
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
        fields, flat = _object(raw, where)  # a broken profile in it is replaced
        extensions = fields.get("extensions") or {}
        steer = (isinstance(extensions, dict) and extensions.get("steer")) or {}
        if not isinstance(extensions, dict) or not isinstance(steer, dict):
            raise SteerError(f"{where}: extensions: expected mappings, found {shown(extensions)}; take them out")
        made = fields | {"extensions": extensions | {"steer": steer | {"profile": profile.dump()}}}
        card = raw | {"data": made}
        if flat:
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
    text = b"".join(_text(data, chunk, 2 * JSON_LIMIT, where).split())
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

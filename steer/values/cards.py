"""Character cards: PNG or JSON in, system prompt and first message out, with a profile of our own in `extensions`.

Character Card V1 and V2 (malfoyslastname/character-card-spec-v2), V3 (kwaroran/character-card-spec-v3). Lorebooks and
assets are kept in the file, and not used. Cards come from strangers: everything has a limit, no pixel is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from steer.errors import SteerError, UsageError
from steer.files import write_atomic
from steer.values.card_files import FILE_LIMIT, TEXT_LIMIT, V1_TEXTS, card_fields, card_json, read_card, with_json
from steer.values.png_text import SIGNATURE
from steer.values.profile import Profile
from steer.values.small_files import shown

DEFAULT_PROMPT = "You are {{char}}. Write {{char}}'s next reply to {{user}}, and stay in character."
"""What `{{original}}` stands for, and the system prompt of a card that brings none."""

_V2_TEXTS = ("system_prompt", "post_history_instructions", "creator_notes", "nickname")  # the last one of V3
_V2_EMPTY: dict[str, Any] = dict.fromkeys((*V1_TEXTS, *_V2_TEXTS[:3], "creator", "character_version"), "") | {
    "alternate_greetings": [],
    "tags": [],
}
"""What every V2 card has, at the least."""
_MACRO = re.compile(
    r"\{\{\s*(?P<name>char|user)\s*\}\}|<(?P<old>user|bot|char)>|\{\{(?://|comment:|hidden_key:)[^{}]*\}\}",
    re.IGNORECASE,
)
_ORIGINAL = re.compile(r"\{\{\s*original\s*\}\}", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what would move a terminal's cursor, or worse
_START = re.compile(r"<START>", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A character, ready for a chat: macros are filled in."""

    name: str
    version: str
    """Of its specification: 1.0, 2.0, 3.0."""
    definition: str
    """What the model is told first: the card's system prompt, description, personality and scenario."""
    examples: tuple[str, ...]
    """Conversations as the character would lead them; the first to go where the context gets short (V1)."""
    first_message: str
    """The character speaks first. Empty: it does not."""
    alternate_greetings: tuple[str, ...] = ()
    """Other first messages."""
    post_history_instructions: str = ""
    """To stand after the chat so far; empty for none."""
    creator_notes: str = ""
    """For people, never for the model; macros stay."""
    profile: Profile | None = None
    """`data.extensions.steer.profile`."""
    extensions: Mapping[str, Any] = field(default_factory=dict)
    """`data.extensions` as it stands in the card."""

    @property
    def system_prompt(self) -> str:
        """The definition and the examples."""
        return "\n\n".join([self.definition, *(f"Example dialogue:\n{e}" for e in self.examples)])


def load_card(source: str | Path | bytes, *, user: str = "You", original: str = DEFAULT_PROMPT) -> Card:
    """A card from a PNG or JSON file, or its bytes. `user`: what `{{user}}` becomes. `original`: what `{{original}}`
    becomes in the card's prompts; it is the system prompt where the card has none.

    Errors: SteerError for a file that is missing, too large, truncated or damaged, that holds no card, a card whose
    fields are of the wrong kind, or a profile in it that is none.
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
    """Write the card with this profile in it, to `out`, which may be the card itself: all of it or nothing.

    Everything else in it stays: a PNG's other chunks byte for byte, the card's other fields in their meaning. A V1
    card becomes a V2 card that V1 readers still read. Errors: SteerError as in `load_card`, and for a profile
    that names files outside of the folder of `out`; UsageError for an `out` of the other kind.
    """
    out = Path(out)
    data, where, _ = read_card(card)
    suffix = ".png" if data.startswith(SIGNATURE) else ".json"
    if out.suffix.lower() in {".png", ".json"} - {suffix}:
        raise UsageError(f"{out}: expected a name that ends in {suffix}, as {where} does; a card keeps its kind")
    profile = profile.in_folder(out.parent)
    _check_files(profile, str(out))
    made = with_json(data, where, lambda raw, at: _with_profile(raw, profile, at))
    if len(made) > FILE_LIMIT:
        raise SteerError(
            f"{out}: expected a card of at most {FILE_LIMIT:,} bytes, found {len(made):,}; shorten its profile"
        )
    # What is written must be read again, by its limits as well.
    _profile(card_json(made, str(out)), str(out), out.parent)
    return write_atomic(out, made)


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    """A text field; absent and null count as empty."""
    return "" if data.get(key) is None else _clean(data[key], key, where)


def _clean(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise SteerError(f"{where}: {key}: expected text, found {shown(value)}; mend the card")
    # JSON can hold half of a surrogate pair, which no tokenizer and no file takes.
    return _CONTROL.sub("", value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def _own(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What this project keeps in a card."""
    own = _extensions(data, where).get("steer")
    if not isinstance(own, dict | None):
        raise SteerError(f"{where}: data.extensions.steer: expected an object, found {shown(own)}; mend the card")
    return own or {}


def _profile(raw: dict[str, Any], where: str, folder: Path | None) -> Profile | None:
    found = _own(card_fields(raw, where), where).get("profile")
    if found is None:
        return None
    profile = Profile.parse(found, f"{where}: data.extensions.steer.profile", folder)
    _check_files(profile, where)
    return profile


def _check_files(profile: Profile, where: str) -> None:
    """Raise SteerError for a path out of the card's folder: what comes from a stranger has no say in what is read
    there, and on another machine it would not be there."""
    for text in profile.files():
        path = PureWindowsPath(text)  # knows either slash, and drives
        if path.anchor or ".." in path.parts:
            raise SteerError(
                f"{where}: profile {profile.name!r}: expected direction files in the card's folder, "
                f"found {shown(text)}; put the file beside the card, or name the slider"
            )


def _with_profile(raw: dict[str, Any], profile: Profile, where: str) -> dict[str, Any]:
    data = card_fields(raw, where)
    own = _own(data, where) | {"profile": profile.dump()}
    extensions = {"extensions": _extensions(data, where) | {"steer": own}}
    if data is raw:
        return raw | {"spec": "chara_card_v2", "spec_version": "2.0", "data": _V2_EMPTY | raw | extensions}
    return raw | {"data": data | extensions}


@dataclass
class _Macros:
    """Fills macros in, in one pass: what a name holds is text. A short macro can stand for a long name a million
    times, so what all of a card grows by is limited."""

    char: str
    user: str
    original: str
    where: str
    grown: int = 0

    def __call__(self, text: str, prompt: bool = False) -> str:
        """`prompt`: the text may say `{{original}}`."""
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

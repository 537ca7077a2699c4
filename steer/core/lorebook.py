"""Lorebooks: texts that enter the prompt once their keys occur in a chat. Reading a book, and which entries are active.

The rules are those of the Character Card V3 specification (github.com/kwaroran/character-card-spec-v3, SPEC_V3.md,
"Lorebook Fields" and "Decorators"). Where it leaves a choice:

- Keys are found as parts of words, in upper or lower case unless the entry says otherwise, in the last `SCAN_DEPTH`
  messages unless the book says otherwise; contents of entries are scanned only if `recursive_scanning` is true.
- Patterns are RE2's, which takes linear time whatever a stranger writes; one with a lookaround or a backreference is
  invalid, and never matches.
- `@@instruct_depth`, `@@instruct_scan_depth` and the reversed depths are for programs without chats, and are ignored as
  the specification says, and so are `@@is_user_icon` and `@@disable_ui_prompt`.

SillyTavern's files of world info are read too, and what its cards keep in an entry's `extensions`: position, depth,
role and the logic of secondary keys. It writes `use_regex` into every entry; only keys of the form /pattern/ are one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from steer.core.macros import Macros
from steer.core.small_files import read_given, shown
from steer.core.validation import Clean, Cleans, Lenient, from_stranger
from steer.errors import SteerError
from steer.files import one_line, parse_json

FILE_LIMIT = 20_000_000
"""Largest file of a lorebook, in bytes."""
SCAN_DEPTH = 4
"""How many of the last messages are scanned where neither book nor entry says it."""
ENTRY_LIMIT = 5_000
"""Most entries of a book; a thousand are read or scanned in a tenth of a second or so."""
ROUNDS = 10
"""Most times that contents of active entries are scanned for the keys of others."""
PATTERN_LIMIT = 500
"""Longest pattern, in characters."""
PATTERN_TEXT = 10_000
"""How many of the last characters of a text are searched for patterns. RE2 takes up to 0.3 ms for each, with the worst
pattern there is."""
PATTERN_SECONDS = 1.0
"""After so many seconds of a scan no further pattern is searched for."""

Role = Literal["system", "user", "assistant"]
Position = Literal["before_char", "after_char", "before_desc", "after_desc", "personality", "scenario"]
"""Places in the system prompt: before or after the character's definition, its description, and in its sections."""
Logic = Literal["any", "all", "not any", "not all"]


@dataclass(frozen=True)
class Key:
    """Text to look for in a chat."""

    text: str
    pattern: bool = False
    """Whether the text is a regular expression."""
    case_sensitive: bool = False


@dataclass(frozen=True)
class Decorators:
    """What the lines that begin with `@@` in an entry's content say."""

    activate: bool = False
    dont_activate: bool = False
    keep_activate_after_match: bool = False
    dont_activate_after_match: bool = False
    ignore_on_max_context: bool = False
    activate_only_after: int | None = None
    """Least number of the character's messages."""
    activate_only_every: int | None = None
    """The number of the character's messages is a multiple of it."""
    is_greeting: int | None = None
    """Index of the greeting that began the chat."""
    depth: int | None = None
    """How many of the chat's last messages come after the text."""
    scan_depth: int | None = None
    role: Role | None = None
    position: Position | None = None
    additional_keys: tuple[str, ...] = ()
    """One of them must occur as well."""
    exclude_keys: tuple[str, ...] = ()
    """None of them may occur."""


@dataclass(frozen=True)
class Entry:
    """One text of a lorebook and when it is active."""

    name: str
    content: str
    """Without its decorators; macros are not replaced."""
    keys: tuple[Key, ...] = ()
    secondary_keys: tuple[Key, ...] = ()
    logic: Logic = "any"
    """Which of the secondary keys must occur, if there are any."""
    enabled: bool = True
    constant: bool = False
    """Whether it is active without a key."""
    insertion_order: float = 0
    """Entries with a lower number come earlier in the prompt."""
    priority: float | None = None
    """Where tokens are short, entries with the lowest number are left out first; None: the insertion order counts."""
    position: Position = "after_char"
    decorators: Decorators = Decorators()

    @property
    def rank(self) -> tuple[bool, float]:
        """Sort key: entries with a larger one are left out later."""
        return (
            not self.decorators.ignore_on_max_context,
            self.insertion_order if self.priority is None else self.priority,
        )


@dataclass(frozen=True)
class Lorebook:
    """A lorebook: entries, each with a text that goes into the prompt while the chat names one of its keys.

    Example:
        book = steer.load_lorebook("harbour.json")
        print([entry.keys for entry in book.entries])
    """

    name: str = ""
    scan_depth: int | None = None
    """How many of the last messages are scanned for keys."""
    token_budget: int | None = None
    """Most tokens of all active entries."""
    recursive_scanning: bool = False
    """Whether active entries' contents are scanned for the keys of others."""
    entries: tuple[Entry, ...] = ()
    warnings: tuple[str, ...] = ()
    """One line for each kind of mistake that was found in the book."""


@dataclass(frozen=True)
class ActiveEntry:
    """An entry whose text goes into the prompt."""

    entry: Entry
    text: str
    """Its content, macros replaced."""
    tokens: int


@dataclass(frozen=True)
class Scan:
    """The result of scanning a chat's lorebooks for one reply."""

    active: tuple[ActiveEntry, ...] = ()
    """In the order of insertion."""
    left_out: tuple[str, ...] = ()
    """Names of entries that would be active, but for which there are no tokens left."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of all active entries."""
        return sum(a.tokens for a in self.active)

    def describe(self) -> str:
        """Return one line: the active entries, their tokens, and those that were left out."""
        names = ", ".join(a.entry.name for a in self.active) or "no entry is active"
        out = f"; no room for {', '.join(self.left_out)}" if self.left_out else ""
        return f"lorebook: {names}{f' ({self.tokens} tokens)' if self.active else ''}{out}"


def load_lorebook(source: str | Path | bytes, name: str = "") -> Lorebook:
    """Load a lorebook.

    `source`: a JSON file, or the bytes of one: of the V3 specification, of SillyTavern, or a JSON card with a book.
    `name`: what a book without a name is called; by default as its file.

        book = steer.load_lorebook("harbour.json")
        print(book.name, len(book.entries), *book.warnings)

    Errors: SteerError for a file that is missing, too large, no JSON or no lorebook.
    """
    data, where = read_given(source, FILE_LIMIT, "a lorebook", name or "lorebook")
    try:
        raw = parse_json(data)
    except ValueError as e:
        raise SteerError(f"{where}: expected a lorebook in JSON, found {one_line(e)}; fetch it again") from e
    book = raw
    for key in ("data", "character_book"):
        if isinstance(book, dict) and "entries" not in book:
            book = book.get(key, book)
    if not isinstance(book, dict) or not isinstance(book.get("entries"), list | dict):
        raise SteerError(f"{where}: expected a lorebook with `entries`, found {shown(raw)}; is it another JSON file?")
    return read_lorebook(book, where, name or Path(where).stem)


def read_lorebook(raw: Mapping[str, Any], where: str, name: str = "") -> Lorebook:
    """Return the lorebook in a JSON object. What has the wrong kind counts as absent, and `warnings` names it."""
    remarks: dict[str, str] = {}
    book = from_stranger(_Book, raw, where, remarks)
    entries = []
    if len(book.entries) > ENTRY_LIMIT:
        found = f"{len(book.entries):,}; the rest is left out"
        remarks["limit"] = f"{where}: entries: expected at most {ENTRY_LIMIT:,}, found {found}"
    for number, fields in enumerate(book.entries[:ENTRY_LIMIT]):
        if isinstance(fields, dict):
            entries.append(_entry(fields, f"{where}: entries", number, remarks))
        else:
            place = f"{where}: entries"
            remarks.setdefault(place, f"{place}: expected mappings, found {shown(fields)}; it counts as empty")
    return Lorebook(
        book.name.strip() or name, _whole(book.scan_depth), _whole(book.token_budget), book.recursive_scanning,
        tuple(entries), tuple(remarks.values()),
    )  # fmt: skip


def scan(
    book: Lorebook,
    messages: Sequence[Mapping[str, str]],
    macros: Macros,
    *,
    moment: int = 0,
    greeting: int | None = None,
    full: bool = False,
    room: int | None = None,
    count: Callable[[str], int] = len,
) -> Scan:
    """Return which entries of a book are active for the reply that follows the messages.

    `messages`: `role` and `content` of each, without the system prompt. `moment`: as in `Macros.expand`. `greeting`:
    index of the greeting that began the chat; None if unknown. `full`: whether the chat is longer than the context.
    `room`: most tokens of the active entries, besides the book's budget; None for no limit. `count`: returns the number
    of tokens of a text.
    """
    search = _Search(book, messages, macros, greeting, full)
    found: dict[int, str] = {}
    fresh: list[str] = []
    for _ in range(ROUNDS):
        new = [i for i, e in enumerate(book.entries) if i not in found and search.matches(e, len(messages), fresh)]
        if not new:
            break
        for i in new:
            found[i] = macros.expand(book.entries[i].content, moment=moment).strip()
        if not book.recursive_scanning:
            break
        fresh = [macros.expand(book.entries[i].content, moment=moment, hidden=True) for i in new]
    active = [ActiveEntry(book.entries[i], found[i], count(found[i])) for i in sorted(found) if found[i]]
    active.sort(key=lambda a: a.entry.insertion_order)
    limits = [limit for limit in (room, book.token_budget) if limit is not None]
    tokens, left_out = sum(a.tokens for a in active), set[int]()
    for i in sorted(range(len(active)), key=lambda i: (active[i].entry.rank, -i)) if limits else ():
        if tokens <= min(limits):
            break
        tokens -= active[i].tokens
        left_out.add(i)
    return Scan(
        tuple(a for i, a in enumerate(active) if i not in left_out),
        tuple(active[i].entry.name for i in sorted(left_out)),
        tuple(search.warnings),
    )


class _Search:
    """Looks for keys in a chat, and in the contents of active entries."""

    def __init__(
        self,
        book: Lorebook,
        messages: Sequence[Mapping[str, str]],
        macros: Macros,
        greeting: int | None,
        full: bool,
    ) -> None:
        self._messages, self._macros, self._greeting, self._full = messages, macros, greeting, full
        self._depth = SCAN_DEPTH if book.scan_depth is None else book.scan_depth
        self._seconds = 0.0
        self._texts: dict[tuple[int, int], str] = {}
        self._folded: dict[str, str] = {}
        self.warnings: dict[str, None] = {}
        """Lines, as keys, so that none stands there twice."""

    def matches(self, entry: Entry, upto: int, fresh: Sequence[str] = ()) -> bool:
        """Return whether an entry is active for the reply that follows the first `upto` messages.

        `fresh`: contents of entries that have just become active; they are scanned in place of the chat.
        """
        d = entry.decorators
        if not entry.enabled:
            return False
        if d.activate or d.dont_activate:
            return d.activate
        if d.keep_activate_after_match or d.dont_activate_after_match:
            ends = (i + 1 for i in range(upto - 1) if self._messages[i]["role"] == "user")
            if any(self._conditions(entry, end, ()) for end in ends):
                return d.keep_activate_after_match
        return self._conditions(entry, upto, fresh)

    def _conditions(self, entry: Entry, upto: int, fresh: Sequence[str]) -> bool:
        d = entry.decorators
        replies = sum(m["role"] == "assistant" for m in self._messages[:upto])
        if (
            (d.ignore_on_max_context and self._full)
            or (d.is_greeting is not None and self._greeting not in (None, d.is_greeting))
            or (d.activate_only_after is not None and replies < d.activate_only_after)
            or (d.activate_only_every is not None and replies % d.activate_only_every)
        ):
            return False
        depth = self._depth if d.scan_depth is None else d.scan_depth
        texts = [self._text(upto, depth), *fresh]

        def occurs(key: Key) -> bool:
            return any(self._found(key, text, entry.name) for text in texts)

        alike = entry.keys[0] if entry.keys else Key("")
        for keys, wanted in ((d.additional_keys, True), (d.exclude_keys, False)):
            if keys and any(occurs(Key(k, alike.pattern, alike.case_sensitive)) for k in keys) is not wanted:
                return False
        if entry.constant:
            return True
        return any(map(occurs, entry.keys)) and (
            not entry.secondary_keys or _LOGIC[entry.logic](map(occurs, entry.secondary_keys))
        )

    def _text(self, upto: int, depth: int) -> str:
        if (upto, depth) not in self._texts:
            texts = [m["content"] for m in self._messages[max(0, upto - depth) : upto]]
            self._texts[upto, depth] = "\n".join(texts)
        return self._texts[upto, depth]

    def _found(self, key: Key, text: str, name: str) -> bool:
        wanted = self._macros.expand(key.text) if "{{" in key.text else key.text
        if not key.pattern:
            if key.case_sensitive:
                return wanted in text
            if text not in self._folded:
                self._folded[text] = text.casefold()
            return wanted.casefold() in self._folded[text]
        if self._seconds > PATTERN_SECONDS:
            self.warnings[f"lorebook: {name}: the patterns take too long; the rest of them count as not found"] = None
            return False
        began = time.perf_counter()
        try:
            return _search(wanted, text[-PATTERN_TEXT:], key.case_sensitive)
        except ValueError as e:
            self.warnings[
                f"lorebook: {name}: expected a regular expression that RE2 knows, found {shown(key.text)} "
                f"({one_line(e)}); it never matches"
            ] = None
            return False
        finally:
            self._seconds += time.perf_counter() - began


def _search(pattern: str, text: str, case_sensitive: bool) -> bool:
    """Return whether a regular expression matches in a text. Errors: ValueError if it is invalid."""
    # A second to import, and most books have no pattern.
    from pyarrow import array
    from pyarrow.compute import match_substring_regex  # pyright: ignore[reportAttributeAccessIssue]

    if len(pattern) > PATTERN_LIMIT:
        raise ValueError(f"longer than {PATTERN_LIMIT} characters")
    clean = text.encode("utf-8", "replace").decode()
    return match_substring_regex(array([clean]), pattern, ignore_case=not case_sensitive)[0].as_py()


_LOGIC: dict[Logic, Callable[..., bool]] = {
    "any": any,
    "all": all,
    "not any": lambda found: not any(found),
    "not all": lambda found: not all(found),
}


# Reading


def _values(found: Any) -> Any:
    return list(found.values()) if isinstance(found, dict) else found


def _split(found: Any) -> Any:
    return found.split(",") if isinstance(found, str) else found


_Keys = Annotated[Cleans, BeforeValidator(_split)]


class _Book(Lenient):
    name: Clean = ""
    scan_depth: FiniteFloat | None = None
    token_budget: FiniteFloat | None = None
    recursive_scanning: bool = False
    entries: Annotated[list[Any], BeforeValidator(_values)] = Field(default_factory=list)


class _EntryFields(Lenient):
    keys: _Keys = Field(default_factory=list)
    secondary_keys: _Keys = Field(default_factory=list)
    content: Clean = ""
    enabled: bool = True
    disable: bool = False
    insertion_order: FiniteFloat = 0
    case_sensitive: bool = False
    use_regex: bool = False
    constant: bool = False
    selective: bool = False
    selectiveLogic: int = 0
    name: Clean = ""
    comment: Clean = ""
    priority: FiniteFloat | None = None
    position: int | str = "after_char"
    depth: FiniteFloat = 4
    role: int | str = 0
    scan_depth: FiniteFloat | None = None


_SILLYTAVERN = {
    "key": "keys",
    "keysecondary": "secondary_keys",
    "order": "insertion_order",
    "caseSensitive": "case_sensitive",
    "scanDepth": "scan_depth",
}
"""SillyTavern's name of a field -> the specification's."""
_LOGICS: tuple[Logic, ...] = ("any", "not all", "not any", "all")
"""The order in which SillyTavern numbers them."""
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_AT_DEPTH = 4
"""SillyTavern's number of the position in the chat; 0 is before the character, the others come after it."""


def _entry(raw: dict[str, Any], where: str, number: int, remarks: dict[str, str]) -> Entry:
    extensions = raw.get("extensions")
    extra: dict[str, Any] = extensions if isinstance(extensions, dict) else {}
    tavern = "uid" in raw or "selectiveLogic" in extra
    if tavern:
        raw = {_SILLYTAVERN.get(k, k): v for k, v in (raw | extra).items()}
    f = from_stranger(_EntryFields, raw, where, remarks)
    content, d = _undecorated(f.content)

    def keys(texts: Sequence[str]) -> tuple[Key, ...]:
        return tuple(_key(k.strip(), f.use_regex, tavern, f.case_sensitive) for k in texts if k.strip())

    found = keys(f.keys)
    position = f.position
    if tavern:
        if position == _AT_DEPTH and "depth" not in d:
            d = {"role": f.role if f.role in _ROLES else _item(_ROLES, f.role), **d, "depth": _whole(f.depth)}
        if f.scan_depth is not None:
            d = {"scan_depth": _whole(f.scan_depth), **d}
        position = "before_char" if position in (0, "before_char") else "after_char"
    patterns = f.use_regex and not tavern
    return Entry(
        name=" ".join((f.name or f.comment or (found[0].text if found else f"entry {number + 1}")).split())[:80],
        content=content,
        keys=found,
        secondary_keys=keys(f.secondary_keys) if f.selective and not patterns else (),
        logic=_item(_LOGICS, f.selectiveLogic),
        enabled=f.enabled and not f.disable,
        constant=f.constant and not (patterns and found),
        insertion_order=f.insertion_order,
        priority=f.priority,
        position="before_char" if position == "before_char" else "after_char",
        decorators=Decorators(**d),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _item(items: tuple[Any, ...], index: Any) -> Any:
    return items[index] if index in range(len(items)) else items[0]


def _key(text: str, use_regex: bool, tavern: bool, case_sensitive: bool) -> Key:
    slashed = re.fullmatch(r"/(.+)/([a-z]*)", text, re.DOTALL) if use_regex or tavern else None
    if slashed:
        flags = "".join(f for f in "sm" if f in slashed[2])
        return Key(f"(?{flags}){slashed[1]}" if flags else slashed[1], True, "i" not in slashed[2])
    return Key(text, use_regex and not tavern, case_sensitive)


_LINE = re.compile(r"^(@@@?)([a-z_]+)(?:[ \t](.*))?$", re.MULTILINE | re.IGNORECASE)


def _undecorated(content: str) -> tuple[str, dict[str, Any]]:
    """Return a content without its decorators, and those that are known, by name.

    A line with `@@@` counts if the line before it does not.
    """
    found: dict[str, Any] = {}
    taken = False
    for mark, name, text in _LINE.findall(content):
        if mark == "@@@" and taken:
            continue
        name = name.lower()
        value = _DECORATORS[name](text.strip()) if name in _DECORATORS else None
        taken = value is not None
        if taken:
            found.setdefault(name, value)
    parts = (part.strip("\n") for part in _LINE.sub("\x00", content).split("\x00"))
    return "\n".join(filter(None, parts)), found


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"0*[1-9]\d{0,8}", text) else None


def _texts(text: str) -> tuple[str, ...] | None:
    return tuple(t.strip() for t in text.split(",") if t.strip()) or None


def _one_of(*names: str) -> Callable[[str], str | None]:
    return lambda text: text if text in names else None


def _flag(text: str) -> bool | None:
    return True


_DECORATORS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("activate", "dont_activate", "keep_activate_after_match"), _flag),
    **dict.fromkeys(("dont_activate_after_match", "ignore_on_max_context"), _flag),
    **dict.fromkeys(("activate_only_after", "is_greeting", "depth", "scan_depth"), _number),
    "activate_only_every": _count,
    "role": _one_of("system", "user", "assistant"),
    "position": _one_of("before_desc", "after_desc", "personality", "scenario"),
    **dict.fromkeys(("additional_keys", "exclude_keys"), _texts),
}
"""Name -> function that reads the value; it returns None for an invalid one, and the decorator is ignored."""

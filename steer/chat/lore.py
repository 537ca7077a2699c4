"""What lorebooks add to a chat: they are scanned before each reply, and texts of active entries go among the messages.

`steer.core.lorebook` has the rules; here is where the texts go. `BaseChat` holds a `Lore`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steer.chat.writer import Messages, ReplyBackend
from steer.core.lorebook import ActiveEntry, Lorebook, Scan, scan
from steer.core.macros import Macros
from steer.model.chat_template import joined

SHARE = 0.25
"""Largest share of the context that entries of lorebooks may take, whatever the books' budgets are."""


@dataclass(frozen=True)
class Lore:
    """The lorebooks of a chat, and what their texts refer to."""

    character: Lorebook | None = None
    """The book of the character's card."""
    books: tuple[Lorebook, ...] = ()
    """Books that the user added; they stay when another character comes."""
    macros: Macros = field(default_factory=Macros)
    sections: Mapping[str, str] = field(default_factory=dict)
    """As `Card.sections`: parts of the system prompt, before or after which entries may stand."""

    @property
    def all(self) -> tuple[Lorebook, ...]:
        """Every book, the character's first."""
        return (*((self.character,) if self.character is not None else ()), *self.books)


def with_lore(
    lore: Lore, messages: Messages, backend: ReplyBackend, *, moment: int = 0, greeting: int | None = None
) -> tuple[Messages, Scan]:
    """Return a chat's messages with the texts of active entries, and which entries those are.

    Texts of the system prompt stand before or after the card's sections in it, or where the user has taken these out,
    at its beginning or its end. Texts with a depth are separate messages: `@@role assistant` at depth 0 would begin
    the reply, which is not offered, so the role is `system` there. `moment`: the reply's seed. `greeting`: index of the
    greeting that began the chat; None if there is none.
    """
    if not lore.all:
        return messages, Scan()
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    history = messages[bool(system) :]
    room = None if backend.context is None else int(SHARE * backend.context)
    scans: list[Scan] = []
    for book in lore.all:
        left = None if room is None else room - sum(s.tokens for s in scans)
        scans.append(
            scan(
                book, history, lore.macros, moment=moment, greeting=greeting, full=backend.left_out > 0, room=left,
                count=backend.count,
            )
        )  # fmt: skip
    active = sorted((a for s in scans for a in s.active), key=lambda a: a.entry.insertion_order)
    at: dict[int, list[dict[str, str]]] = {}
    in_system: list[ActiveEntry] = []
    for a in active:
        d = a.entry.decorators
        if d.depth is None or _section(a, lore.sections) is not None:
            in_system.append(a)
            continue
        role = d.role if d.role and not (d.role == "assistant" and d.depth < 1) else "system"
        at.setdefault(max(0, len(history) - max(0, d.depth)), []).append({"role": role, "content": a.text})
    system = _around(system, lore.sections, in_system)
    out = [{"role": "system", "content": system}] if system else []
    for i in range(len(history) + 1):
        out += [*at.get(i, ()), *history[i : i + 1]]
    found = Scan(
        tuple(active), tuple(n for s in scans for n in s.left_out), tuple(w for s in scans for w in s.warnings)
    )
    return tuple(joined(out)), found


def _section(a: ActiveEntry, sections: Mapping[str, str]) -> str | None:
    """The place in the system prompt that an entry's `@@position` names, if the card has that section."""
    position = a.entry.decorators.position
    return position if position in ("before_desc", "after_desc", *sections) else None


def _around(system: str, sections: Mapping[str, str], active: Sequence[ActiveEntry]) -> str:
    """A system prompt with the texts of entries before and after its sections."""
    spans = {name: (at, at + len(text)) for name, text in sections.items() if (at := system.find(text)) >= 0}
    before = min((start for start, _ in spans.values()), default=0)
    after = max((end for _, end in spans.values()), default=len(system))
    begin, end = spans.get("description", (before, after))
    places = {"before_char": before, "after_char": after, "before_desc": begin, "after_desc": end}
    places |= {name: spans.get(name, (0, after))[1] for name in ("personality", "scenario")}
    texts: dict[int, list[str]] = {}
    for a in active:
        texts.setdefault(places[_section(a, sections) or a.entry.position], []).append(a.text)
    parts, done = [], 0
    for at in sorted(texts):
        parts += [system[done:at], *texts[at]]
        done = at
    return "\n\n".join(t for part in (*parts, system[done:]) if (t := part.strip("\n")))

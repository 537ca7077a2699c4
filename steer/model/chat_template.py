"""Chats as text: the one place that renders chats by a chat template, for chatting, finding, serving and training.

A chat is rendered as it is sent. Where the template refuses it, or leaves a message out, `ChatTemplate` changes the
chat's form until the template takes all of it, and says what it changed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from steer.checkpoint.chat_templates import shipped_templates
from steer.core.thoughts import MARKS, THINK, ThoughtMarks
from steer.errors import CheckpointError, UsageError
from steer.files import one_line

OPENING = "Hello."
"""The user turn before a greeting, for templates in which the user speaks first."""
THINKING = ("enable_thinking", "thinking")
"""Names that templates give to the option that turns thoughts on and off; the first stands for both."""
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Names that cannot be a template's options, because they mean something else to transformers."""
_PROBE = "steerprobe"
"""Placeholder for a message, looked for in the text that a template writes."""
_MARK = re.compile(r"\s*(<[^<>\s]{2,40}>|\[[^\[\]\s]{2,40}\])")
"""A mark, as templates write them between turns."""
_REFUSALS = (TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What a template that does not take a chat may raise."""
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text, up to where the reply goes on."""

    text: str
    begun: int = 0
    """How many characters at its end are the beginning of the reply."""
    opening: str = ""
    """The beginning of the reply for those who look for thoughts: their mark, if the template wrote it, and the text
    that the reply begins with."""
    notes: tuple[str, ...] = ()
    """What was changed so that the template takes the chat, in sentences."""


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes after a reply, by which the reply ends."""

    token: int | None = None
    """The first special or added token; None where there is none."""
    text: str | None = None
    """A mark such as <|im_end|> that is no token of the tokenizer, so that the model writes it as ordinary text."""


class ChatTemplate:
    """The chat template of a tokenizer, which may be set to another one, or to None, at any time."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """`name`: what messages call the model."""
        self._tokenizer, self._name = tokenizer, name

    def source(self) -> str:
        """Return the template's text. Errors: CheckpointError if there is none."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise CheckpointError(
                f"{self._name}: expected a chat template in the tokenizer, found none; copy chat_template.jinja from "
                f"the tune it was made of, or choose one with --chat-template ({', '.join(shipped_templates())}, or a "
                "file)"
            )
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as e:  # several templates, none of which is the default
            raise CheckpointError(
                f"{self._name}: expected one chat template in the tokenizer, found {one_line(e)}; choose one with "
                "--chat-template"
            ) from e

    def reads(self, option: str) -> bool:
        """Return whether the template has a variable of this name."""
        return re.search(rf"\b{re.escape(option)}\b", self.source()) is not None

    def render(
        self, messages: Sequence[Mapping[str, Any]], reply: str = "", options: Mapping[str, Any] | None = None
    ) -> RenderedChat:
        """Return a chat up to the point where the reply begins, or where `reply`, its beginning, ends.

        A begun reply ends where the template's own rendering of it would, with the spaces that the template adds and
        without an opened thought that it does not write there. `options`: the template's own variables;
        `enable_thinking` false also closes thoughts that the template opens in spite of it.
        Errors: CheckpointError without a template or for a broken one, UsageError for a chat that it refuses in every
        form.
        """
        given = dict(options or {})
        options = {name: value for name, value in self._aliased(given).items() if self.reads(name)}
        ignored = given.keys() - options.keys()
        chat, head, notes = self._taken([dict(m) for m in messages], True, options)
        marks = marks_of(self._tokenizer)
        opened = head.rstrip().endswith(marks.open)
        if opened and given.get(THINKING[0]) is False:
            head, opened = f"{head.rstrip()}\n\n{marks.close}\n\n", False
            ignored -= {THINKING[0]}
        if THINKING[1] in options or (given.get(THINKING[0]) is False and known_marks(self._tokenizer) is None):
            ignored -= {THINKING[0]}
        notes += tuple(f"its chat template has no option {name}, which is ignored" for name in sorted(ignored))
        if not reply:
            return RenderedChat(head, 0, marks.open if opened else "", notes)
        text = self._continued(chat, reply, options)
        if text is not None:
            return RenderedChat(text, len(reply.strip()) + len(text) - len(text.rstrip()), reply, notes)
        if opened:
            reply = reply.lstrip().removeprefix(marks.open)
        return RenderedChat(head + reply, len(reply), (marks.open if opened else "") + reply, notes)

    def whole(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a chat as text, replies and all. Errors: as `render`."""
        return self._taken([dict(m) for m in messages], False, {})[1]

    def turn_end(self) -> TurnEnd:
        """Return what the template writes after a reply."""
        tokenizer = self._tokenizer
        try:
            text = self._apply([_user("a"), {"role": "assistant", "content": _PROBE}], False, {})
        except (CheckpointError, UsageError):
            return TurnEnd()
        _, found, after = text.rpartition(_PROBE)
        if not found:
            return TurnEnd()
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        # The unknown token ends no reply; BOS begins the next chat and ends none, unless it is EOS as well.
        special -= {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}

        def token_in(text: str) -> int | None:
            return next((i for i in tokenizer(text, add_special_tokens=False).input_ids if i in special), None)

        mark = _MARK.match(after)
        return TurnEnd(token_in(after), mark[1] if mark is not None and token_in(mark[1]) is None else None)

    @staticmethod
    def _aliased(options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options with the switch of thoughts under both of its names."""
        one, other = THINKING
        return {other: options[one], **options} if one in options else dict(options)

    def _taken(self, chat: Chat, generate: bool, options: Mapping[str, Any]) -> tuple[Chat, str, tuple[str, ...]]:
        """Return the chat in the first form of which the template writes every message, its text, and what was changed.

        Where it writes no form whole, it is the first form that the template does not refuse.
        """
        refusal: UsageError | None = None
        partial: tuple[Chat, str, tuple[str, ...]] | None = None
        for form, notes in _forms(chat):
            try:
                text = self._apply(form, generate, options)
            except UsageError as e:
                refusal = refusal or e
                continue
            if missing := self._left_out(form, generate, options):
                what = f"its chat template leaves out {', '.join(missing)}, which the model does not read"
                partial = partial or (form, text, (*notes, what))
                continue
            return form, text, notes
        if partial is None:
            assert refusal is not None  # the chat as it was sent is one of its forms
            raise refusal
        return partial

    def _left_out(self, chat: Chat, generate: bool, options: Mapping[str, Any]) -> list[str]:
        """Return which messages the template leaves out, as `message 1 (system)`; it need not refuse what it drops."""
        probes = {i: f"{_PROBE}{i}." for i, m in enumerate(chat) if isinstance(m.get("content"), str) and m["content"]}
        asked = [m | {"content": probes[i]} if i in probes else m for i, m in enumerate(chat)]
        try:
            text = self._apply(asked, generate, options)
        except UsageError:
            return []  # it looks at what the messages say
        return [f"message {i + 1} ({chat[i].get('role')})" for i, probe in probes.items() if probe not in text]

    def _continued(self, chat: Chat, reply: str, options: Mapping[str, Any]) -> str | None:
        """Return the template's own text of the chat with the reply, up to the end of the reply; None where it does not
        write all of the reply, as a template that drops the thoughts of past replies."""
        answer = {"role": "assistant", "content": reply}
        try:
            text_of_all = self._apply([*chat, answer], False, options)
            marked = self._apply([*chat, answer | {"content": reply + _PROBE}], False, options)
        except UsageError:
            return None
        text = marked.rpartition(_PROBE)[0]
        if not text_of_all.startswith(text):  # it strips a reply
            text = text.rstrip()
        whole = text and text_of_all.startswith(text) and text.rstrip().endswith(reply.strip())
        return text if whole else None

    def _apply(self, chat: Chat, generate: bool, options: Mapping[str, Any]) -> str:
        self.source()
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate, **options)
        except TemplateSyntaxError as e:
            raise CheckpointError(
                f"{self._name}: expected a chat template in Jinja, found a mistake in line {e.lineno}: "
                f"{one_line(e)}; choose another with --chat-template"
            ) from e
        except _REFUSALS as e:
            raise UsageError(f"{self._name}: its chat template refuses this chat: {one_line(e)}") from e


def joined(chat: Chat) -> Chat:
    """The chat with neighbouring messages of one role joined by a blank line."""
    out: Chat = []
    for m in chat:
        if out and _plain(m) and _plain(out[-1]) and out[-1]["role"] == m["role"]:
            out[-1] = out[-1] | {"content": "\n\n".join(filter(None, (out[-1]["content"], m["content"])))}
        else:
            out.append(m)
    return out


def _later_as_user(chat: Chat) -> Chat:
    """The chat with system messages after the first one as user messages."""
    return [m if i == 0 or m.get("role") != "system" else m | {"role": "user"} for i, m in enumerate(chat)]


def _opened(chat: Chat) -> Chat:
    """The chat with a user turn before an assistant's greeting."""
    first = next((i for i, m in enumerate(chat) if m.get("role") != "system"), len(chat))
    greets = first < len(chat) and chat[first].get("role") == "assistant"
    return [*chat[:first], _user(OPENING), *chat[first:]] if greets else chat


def _folded(chat: Chat) -> Chat:
    """The chat with its system prompt at the beginning of the first user turn, or as a user turn before a greeting."""
    if not chat or chat[0].get("role") != "system":
        return chat
    first, rest = chat[0] | {"role": "user"}, chat[1:]
    follows = bool(rest) and rest[0].get("role") == "user"
    return [*joined([first, rest[0]]), *rest[1:]] if follows else [first, *rest]


_CHANGES: tuple[tuple[Callable[[Chat], Chat], str], ...] = (
    (joined, "neighbouring messages of one role are joined"),
    (_later_as_user, "system messages after the first are sent as the user's"),
    (_opened, f"a user turn, {OPENING!r}, is put before the greeting"),
    (_folded, "the system prompt is sent in the first user turn"),
)
"""Changes of a chat's form, the smallest first."""
_ORDER = (_later_as_user, _folded, _opened, joined)
"""The order in which several are made."""


def _forms(chat: Chat) -> Iterator[tuple[Chat, tuple[str, ...]]]:
    """Yield a chat as it is, then in other forms of the same text, the least changed first, with what was changed."""
    seen: list[Chat] = []
    for number in range(1 << len(_CHANGES)):
        chosen = {change for i, (change, _) in enumerate(_CHANGES) if number >> i & 1}
        form, made = chat, set()
        for change in (c for c in _ORDER if c in chosen):
            changed = change(form)
            if changed != form:
                form, made = changed, {*made, change}
        if form not in seen:
            seen.append(form)
            yield form, tuple(f"its chat template does not take this chat as it is: {what}"
                              for change, what in _CHANGES if change in made)  # fmt: skip


def _plain(message: Mapping[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def marks_of(tokenizer: Any) -> ThoughtMarks:
    """Return the marks that a model writes around its thoughts: those that are known of it, else <think>."""
    return known_marks(tokenizer) or THINK


def known_marks(tokenizer: Any) -> ThoughtMarks | None:
    """Return the marks of thoughts in a model's template or vocabulary; None where neither has any."""
    template = tokenizer.chat_template
    written = template if isinstance(template, str) else " ".join(map(str, (template or {}).values()))
    tokens = {str(t) for t in tokenizer.added_tokens_decoder.values()}
    known = [(m, [mark for mark in (m.open, m.close, m.answer) if mark]) for m in MARKS]
    return next((m for texts in (written, tokens) for m, marks in known if any(k in texts for k in marks)), None)

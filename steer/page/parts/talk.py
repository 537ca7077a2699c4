"""The part "Chat": the messages, the reply that is being written, and the buttons of each message."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.conversation import Message
from steer.chat.voting import Thumb
from steer.core.thoughts import split_thoughts
from steer.page.drawing import context_bar, folded_thoughts, markdown
from steer.page.guard import button, safely, watch
from steer.plain_text import plain_line

POLL = 0.25
"""Seconds between two redraws of a reply that is being written."""
SHOWN = 30
"""Messages that are drawn at first, so that a chat of hundreds stays fast."""


def draw(chat: Chat) -> None:
    """Draw the messages. A reply that is being written redraws itself, without the rest of the page."""
    running, growing = chat.writer.running, chat.writer.message_id
    path = chat.path()
    written = [m for m in path if not (running and m.id == growing)]
    shown = st.session_state.get("shown", SHOWN)
    if len(written) > shown:
        more = len(written) - shown
        earlier = {"shown": shown + SHOWN}
        button(f"Earlier messages ({more})", lambda: st.session_state.update(earlier), "expand_less", type="tertiary")
    if left_out := chat.backend.left_out:
        st.caption(f"The chat is longer than the model can read: it left out the first {left_out} messages.")
    if chat.used is not None:
        words = chat.used.describe()
        st.html(context_bar(chat.used.parts, chat.used.context, words))
        st.caption(f"Context: {words}")
    if chat.lore.all:
        _lore(chat)
    for message in written[-shown:]:
        _message(chat, message, last=not running and message is path[-1])
    if running:
        watch(_growing, chat, running=lambda: chat.writer.running, every=POLL)
    elif chat.last_error:
        st.error(markdown(chat.last_error))
    if not path:
        st.caption(
            "Say something, and move a slider of the sidebar: the words that follow change. A character card can be "
            "dropped there too."
        )
    elif not running and path[-1].role == "user":
        button("Reply", chat.regenerate, "autorenew")
    if text := st.chat_input("Say something"):
        safely(lambda: chat.say(text))
        st.rerun()


def _lore(chat: Chat) -> None:
    """Draw which entries of the lorebooks were in the last reply's prompt, and how much of the context they took."""
    found, context = chat.scanned, chat.backend.context
    of = "" if context is None else f" of {context:,}"
    label = f"Lorebook: {len(found.active)} active, {found.tokens:,}{of} tokens"
    with st.expander(label, icon=":material/menu_book:"):
        for a in found.active:
            st.markdown(markdown(f"**{plain_line(a.entry.name)}** ({a.tokens} tokens)"), help=markdown(a.text))
        if found.left_out:
            st.caption(markdown(f"No room for: {plain_line(', '.join(found.left_out))}"))
        if not found.active:
            st.caption("The last reply was written without any.")
        for warning in found.warnings:
            st.warning(markdown(plain_line(warning)))


def _growing(chat: Chat) -> None:
    """Draw the reply that is being written."""
    message = next((m for m in chat.path() if m.id == chat.writer.message_id), None)
    if message is not None:
        with st.chat_message(message.role):
            _text(chat, message, " ▍")
    rate = chat.writer.rate
    with st.container(horizontal=True, vertical_alignment="center", key="growing"):
        button("Stop", chat.stop, "stop", key="stop", shortcut="Esc")
        st.caption(f"{chat.writer.tokens} tokens, {rate:.0f} a second" if rate else "reading the chat")


def _message(chat: Chat, message: Message, last: bool) -> None:
    with st.chat_message(message.role):
        if st.session_state.get("editing") == message.id:
            _editor(chat, message)
            return
        _text(chat, message)
        _actions(chat, message, last)


def _text(chat: Chat, message: Message, cursor: str = "") -> None:
    """Draw a message; the thoughts before a reply are folded away."""
    thoughts, text = "", message.text
    if message.role == "assistant":
        thoughts, text = split_thoughts(text, chat.backend.marks)
    folded_thoughts(thoughts)
    st.markdown(f"{markdown(text)}{cursor}")


def _actions(chat: Chat, message: Message, last: bool) -> None:
    index, count = chat.place_of(message.id)
    with st.container(horizontal=True, vertical_alignment="center", key=f"icons {message.id}"):
        if count > 1:
            _act("Previous", "chevron_left", lambda: chat.swipe(message.id, -1), message, index == 0)
            st.markdown(f":small[:gray[{index + 1}/{count}]]", width="content")
            _act("Next", "chevron_right", lambda: chat.swipe(message.id, 1), message, index + 1 == count)
        if last and message.role == "assistant" and message.parent is not None:
            _act("Regenerate", "autorenew", chat.regenerate, message)
            _act("Continue", "east", chat.lengthen, message)
        if message.role == "assistant" and message.parent is not None:
            for thumb, label, icon in _THUMBS:
                given = message.thumb == thumb
                _act(
                    f"{label}: take it back" if given else label, icon, lambda t=thumb: chat.rate(message.id, t),
                    message, pressed=given,
                )  # fmt: skip
        _act("Edit", "edit", lambda: st.session_state.update(editing=message.id), message)
        _act("Delete", "delete", lambda: chat.delete(message.id), message)
        if message.written is not None:
            with st.popover("What the sliders did", icon=":material/receipt_long:", type="tertiary"):
                _receipt(message)


def _act(
    label: str, icon: str, change: Callable[[], object], message: Message, disabled: bool = False, pressed: bool = False
) -> None:
    kind = "primary" if pressed else "tertiary"
    button(label, change, icon, help=label, key=f"{label} {message.id}", type=kind, disabled=disabled)


def _editor(chat: Chat, message: Message) -> None:
    key = f"edit of {message.id}"
    st.text_area("Message", message.text, key=key, height=160)

    def save() -> None:
        chat.edit(message.id, st.session_state[key])
        st.session_state["editing"] = None

    with st.container(horizontal=True):
        button("Save", save, key="save edit", type="primary")
        button("Cancel", lambda: st.session_state.update(editing=None), key="cancel edit")


def _receipt(message: Message) -> None:
    written = message.written
    assert written is not None
    first = "" if written.first_token is None else f", the first after {written.first_token:.1f} s"
    rate = f", {written.rate:.0f} a second" if written.rate else ""
    receipt = written.receipt or {}
    tokens = len(written.ids) or receipt.get("tokens") or "unknown"
    st.caption(markdown(f"seed {written.seed}, tokens {tokens}{first}{rate}; {_ENDINGS[written.ending]}"))
    for slider in receipt.get("sliders") or []:
        share = slider.get("mean_share")
        far = "" if share is None else f", by {share:.2f} of the residual norm"
        what = f"{slider['name']} ({slider['operation']} {slider['amount']:g})"
        st.markdown(f"**{markdown(what)}** moved {markdown(str(slider['tokens']))} tokens{far}")
    if not receipt.get("sliders"):
        st.caption("No slider moved it.")
    if len(written.stretches) > 1:
        starts = ", ".join(str(s.start) for s in written.stretches[1:])
        st.caption(f"The sliders moved during it, at token {starts}.")
    for warning in receipt.get("warnings") or []:
        st.warning(markdown(warning))


_THUMBS: tuple[tuple[Thumb, str, str], ...] = (
    ("good", "To my taste", "thumb_up"),
    ("bad", "Not to my taste", "thumb_down"),
)
_ENDINGS = {
    "ended": "the model ended it",
    "length": "it is as long as replies may get",
    "stopped": "it was stopped",
    "error": "it broke off",
}

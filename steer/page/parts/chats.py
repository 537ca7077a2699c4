"""Which chat: a new one, or one that was kept."""

from __future__ import annotations

import time

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.stored import SavedChat, delete_chat, saved_chats
from steer.page.change import safely
from steer.page.look import markdown

LISTED = 200
BROKEN = 5
"""Files that are no chats and are named, at most."""


def draw(chat: Chat) -> None:
    """The top of the sidebar."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("New chat", icon=":material/add_comment:", on_click=safely, args=(lambda: _new(chat),))
        with st.popover("Old chats", icon=":material/history:"):
            _kept(chat)
    st.caption(markdown(chat.voice.name))


def _new(chat: Chat) -> None:
    chat.clear()
    st.session_state["chats"] = st.session_state.get("chats", 0) + 1
    st.session_state["editing"] = None


def _kept(chat: Chat) -> None:
    chats, broken = saved_chats()
    for line in broken[:BROKEN]:
        st.warning(markdown(line))
    if len(broken) > BROKEN:
        st.caption(f"and {len(broken) - BROKEN} files more that are no chats")
    kept = {str(c.place): c for c in chats[:LISTED]}
    if not kept:
        st.caption("None yet: chats are kept as they go.")
        return
    place = st.selectbox("Chat", list(kept), format_func=lambda p: _told(kept[p]), key="kept chat")
    if place is None:
        return
    at = kept[place].place
    with st.container(horizontal=True):
        st.button("Open", type="primary", on_click=lambda: st.session_state.update(open=at, part="Chat", editing=None))
        st.button(
            "Delete", disabled=at == chat.saved, help="The one that is open can be deleted once another is",
            on_click=safely, args=(lambda: delete_chat(at),),
        )  # fmt: skip


def _told(kept: SavedChat) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(kept.changed))
    return f"{kept.title} · {kept.messages} messages · {when}"

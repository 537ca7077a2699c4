"""The top of the sidebar: start a new chat, or open or delete a saved one."""

from __future__ import annotations

import time

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.stored import SavedChat, delete_chat, saved_chats
from steer.page.drawing import markdown
from steer.page.guard import safely

LISTED = 200
BROKEN = 5
"""How many files that are not chats are named."""


def draw(chat: Chat) -> None:
    """Draw the top of the sidebar."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("New chat", icon=":material/add_comment:", on_click=safely, args=(lambda: _new(chat),))
        with st.popover("Old chats", icon=":material/history:"):
            _saved_chats(chat)
    st.caption(markdown(chat.voice.name))


def _new(chat: Chat) -> None:
    chat.clear()
    st.session_state["chats"] = st.session_state.get("chats", 0) + 1
    st.session_state["editing"] = None


def _saved_chats(chat: Chat) -> None:
    chats, broken = saved_chats()
    for line in broken[:BROKEN]:
        st.warning(markdown(line))
    if len(broken) > BROKEN:
        st.caption(f"and {len(broken) - BROKEN} files more that are no chats")
    chats_by_place = {str(c.place): c for c in chats[:LISTED]}
    if not chats_by_place:
        st.caption("None yet: chats are kept as they go.")
        return
    place = st.selectbox("Chat", list(chats_by_place), format_func=lambda p: _label(chats_by_place[p]), key="kept chat")
    if place is None:
        return
    at = chats_by_place[place].place
    with st.container(horizontal=True):
        st.button("Open", type="primary", on_click=lambda: st.session_state.update(open=at, part="Chat", editing=None))
        st.button(
            "Delete", disabled=at == chat.saved, help="The one that is open can be deleted once another is",
            on_click=safely, args=(lambda: delete_chat(at),),
        )  # fmt: skip


def _label(saved: SavedChat) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(saved.changed))
    return f"{saved.title} · {saved.messages} messages · {when}"

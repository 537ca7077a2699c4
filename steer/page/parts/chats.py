"""The top of the sidebar: start a new chat, or open or delete a saved one."""

from __future__ import annotations

import time

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.stored import SavedChat, saved_chats
from steer.files import delete
from steer.page.drawing import markdown
from steer.page.guard import button, new_chat

LISTED = 200
BROKEN = 5
"""How many files that are not chats are named."""


def draw(chat: Chat) -> None:
    """Draw the top of the sidebar."""
    with st.container(horizontal=True, vertical_alignment="center"):
        button("New chat", lambda: (chat.clear(), new_chat()), "add_comment")
        with st.popover("Old chats", icon=":material/history:"):
            _saved_chats(chat)
    st.caption(markdown(chat.backend.name))


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
        button("Open", lambda: st.session_state.update(open=at, part="Chat", editing=None), type="primary")
        hint = "The one that is open can be deleted once another is"
        button("Delete", lambda: delete(at), disabled=at == chat.saved, help=hint)


def _label(saved: SavedChat) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(saved.changed))
    return f"{saved.title} · {saved.messages} messages · {when}"

"""The part "Compare": one message under two settings side by side, the words that differ, and a vote."""

from __future__ import annotations

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.comparison import Comparison, Side
from steer.chat.profile_store import load_profile, saved_profiles
from steer.chat.votes import read_votes, tally
from steer.page.drawing import markdown, marked
from steer.page.guard import redraw, redraw_if_asked, safely, watch

POLL = 0.3
_PLAIN, _NOW = "without sliders", "with these sliders"


def draw(chat: Chat) -> None:
    """Draw the form, the two replies, and the votes so far."""
    offered = [_PLAIN, _NOW, *saved_profiles()]
    with st.form("compare", border=False):
        text = st.text_area(
            "Message", placeholder="empty: the last message of the chat again", key="compare message", height=80
        )
        left, right = st.columns(2)
        first = left.selectbox("One side", offered, index=0, key="one side")
        second = right.selectbox("The other side", offered, index=1, key="other side")
        blind = st.checkbox("Blind: hide which is which until you have chosen", key="blind")
        if st.form_submit_button("Compare", type="primary", icon=":material/compare_arrows:"):
            safely(lambda: _start(chat, text.strip() or None, first, second, blind))
    duel: Comparison | None = st.session_state.get("duel")
    if duel is not None:
        watch(_pair, duel.running, POLL, chat, duel)
    _votes()


def _start(chat: Chat, text: str | None, first: str, second: str, blind: bool) -> None:
    before: Comparison | None = st.session_state.get("duel")
    if before is not None:
        before.stop()
    st.session_state["duel"] = chat.duel(text, _side(chat, first), _side(chat, second), blind=blind)


def _side(chat: Chat, name: str) -> Side:
    if name in (_PLAIN, _NOW):
        return chat.side("plain" if name == _PLAIN else "now")
    return chat.side_of(load_profile(name))


def _pair(chat: Chat, duel: Comparison) -> None:
    running = duel.running
    for column, place, shown in zip(st.columns(2), ("left", "right"), duel.shown, strict=True):
        with column, st.container(border=True):
            st.markdown(f"**{markdown(shown.title or place.capitalize())}**")
            st.html(marked(shown.spans) if shown.text else "<em>nothing yet</em>")
            st.caption(f"{shown.tokens} tokens")
            if not running and not duel.hidden:
                st.button(
                    "Take it into the chat", key=f"take {place}", on_click=safely,
                    args=(lambda place=place: _take(chat, duel, place),),
                )  # fmt: skip
    if duel.error:
        st.error(markdown(duel.error))
    if running:
        st.button(
            "Stop", icon=":material/stop:", on_click=safely, args=(duel.stop,), key="stop compare", shortcut="Esc"
        )
        st.session_state["comparing"] = True
        return
    if st.session_state.pop("comparing", False):
        redraw()  # the whole page once more, without the timer that redraws this part
    if duel.voted is not None:
        better = {"first": duel.sides[0].title, "second": duel.sides[1].title}.get(duel.voted.better)
        st.success(f"You chose: {markdown(better)}" if better else "You chose neither.")
    elif not duel.error:
        st.write("Which reads better?")
        with st.container(horizontal=True):
            for place, label in (("left", "Left"), ("right", "Right"), ("neither", "Neither")):
                st.button(
                    label, key=f"vote {place}", on_click=safely, args=(lambda place=place: _vote(duel, place),),
                )  # fmt: skip
    redraw_if_asked()


def _take(chat: Chat, duel: Comparison, place) -> None:  # type: ignore[no-untyped-def]
    chat.take(duel, place)
    st.session_state["part"] = "Chat"
    redraw()


def _vote(duel: Comparison, better) -> None:  # type: ignore[no-untyped-def]
    duel.vote(better)
    redraw()


def _votes() -> None:
    votes = read_votes()
    if votes:
        rows = [
            {"setting": title, "better": won, "worse": lost, "neither": neither}
            for title, (won, lost, neither) in tally(votes).items()
        ]
        with st.expander(f"Votes so far: {len(votes)}"):
            st.dataframe(rows, hide_index=True)

"""The part "Compare": one message under two settings side by side, the words that differ, and a vote."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.comparison import Comparison, Place, Side, tally
from steer.chat.profile_store import load_profile, saved_profiles
from steer.chat.voting import kept_votes
from steer.core.votes import LEAST, counted
from steer.page.drawing import folded_thoughts, markdown, marked
from steer.page.guard import button, draw_job, redraw, safely, watch
from steer.page.parts import new_slider

POLL = 0.3
_SETTINGS: dict[str, Literal["plain", "now"]] = {"without sliders": "plain", "with these sliders": "now"}


def draw(chat: Chat) -> None:
    """Draw the form, the two replies, and the votes so far."""
    offered = [*_SETTINGS, *saved_profiles()]
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
    comparison: Comparison | None = st.session_state.get("comparison")
    if comparison is not None:
        watch(_pair, chat, comparison, running=lambda: comparison.running, every=POLL)
    _votes(chat)


def _start(chat: Chat, text: str | None, first: str, second: str, blind: bool) -> None:
    before: Comparison | None = st.session_state.get("comparison")
    if before is not None:
        before.stop()
    st.session_state["comparison"] = chat.compare(text, _side(chat, first), _side(chat, second), blind=blind)


def _side(chat: Chat, name: str) -> Side:
    return chat.side(_SETTINGS[name] if name in _SETTINGS else load_profile(name))


def _pair(chat: Chat, comparison: Comparison) -> None:
    running = comparison.running
    places: tuple[Place, Place] = ("left", "right")
    for column, place, shown in zip(st.columns(2), places, comparison.shown, strict=True):
        with column, st.container(border=True):
            st.markdown(f"**{markdown(shown.title or place.capitalize())}**")
            folded_thoughts(shown.thoughts)
            st.html(marked(shown.spans) if shown.text else "<em>nothing yet</em>")
            st.caption(f"{shown.tokens} tokens")
            if not running and not comparison.hidden:
                button("Take it into the chat", lambda place=place: _take(chat, comparison, place), key=f"take {place}")
    if comparison.error:
        st.error(markdown(comparison.error))
    if running:
        button("Stop", comparison.stop, "stop", key="stop compare", shortcut="Esc")
    elif comparison.voted is not None:
        titles = {"first": comparison.sides[0].title, "second": comparison.sides[1].title}
        better = titles.get(comparison.voted.outcome)
        st.success(f"You chose: {markdown(better)}" if better else "You chose neither.")
    elif not comparison.error:
        st.write("Which reads better?")
        with st.container(horizontal=True):
            choices: tuple[Place | Literal["neither"], ...] = (*places, "neither")
            for choice in choices:
                button(choice.capitalize(), lambda choice=choice: _vote(comparison, choice), key=f"vote {choice}")


def _take(chat: Chat, comparison: Comparison, place: Place) -> None:
    chat.take(comparison, place)
    st.session_state["part"] = "Chat"
    redraw()


def _vote(comparison: Comparison, better: Place | Literal["neither"]) -> None:
    comparison.vote(better)
    redraw()


def _votes(chat: Chat) -> None:
    votes = kept_votes()
    if rows := [
        {"setting": title, "better": won, "worse": lost, "neither": neither}
        for title, (won, lost, neither) in tally(votes).items()
    ]:
        with st.expander(f"Votes so far: {sum(len(v.replies) == 2 for v in votes)}"):
            st.dataframe(rows, hide_index=True)
    job = chat.taste()
    watch(_taste, chat, len(counted(votes)), running=lambda: job is not None and job.running, every=POLL)


def _taste(chat: Chat, votes: int) -> None:
    """Draw the button that makes a slider of all votes, its progress, and what is known of the slider."""
    job = chat.taste()
    if job is not None and draw_job(job, "Making a slider from your votes", "cancel taste"):
        return
    rest = f"; {LEAST - votes} more are needed" if votes < LEAST else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        button("Slider from my votes", lambda: (chat.make_taste(), redraw()), "how_to_vote", disabled=votes < LEAST)
        st.caption(f"{votes} votes, thumbs under replies among them{rest}")
    if job is not None and job.direction is not None and job.direction.name in chat.sliders.known():
        row = chat.panel.row(job.direction.name)
        new_slider.made(row, row.verdict, row.description)

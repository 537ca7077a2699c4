"""The slider chat in a browser: `steer ui MODEL`, or `streamlit run app.py -- MODEL`.

The view alone. What is said and how sliders apply is `steer.live.session`.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing

import streamlit as st

from steer.errors import SteerError
from steer.live.model import SteeredModel, load
from steer.live.session import Session


@st.cache_resource(show_spinner="Loading the model")
def shared(name: str) -> SteeredModel:
    """The one model that every browser session talks to."""
    return load(name)


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="steer", layout="centered")
    name = os.environ.get("STEER_MODEL") or next(iter(sys.argv[1:]), None)
    if name is None:
        st.info("No model was named. Start the page with `steer ui MODEL`.")
        return
    try:
        model = shared(name)
    except SteerError as e:
        st.error(str(e))
        return
    session: Session = st.session_state.setdefault("session", Session(model))
    with st.sidebar:
        sidebar(session)
    conversation(session)


def sidebar(session: Session) -> None:
    """System prompt, one slider a direction, and what starts afresh."""
    session.system = st.text_area("System prompt", key="system", placeholder="none").strip() or None
    known = session.sliders.known()
    if not known:
        name = session.model.name
        st.info(f"No direction is known for this model yet. Find one: `steer find {name} moralizing`")
    for name, slider in known.items():
        # A clamp leaves the model alone only while it is off.
        if slider.neutral is None and not st.toggle(f"{name}: hold", key=f"{_key(name)}: on"):
            session.sliders.pop(name, None)
            continue
        lowest = -2.0 if slider.operation == "add" else 0.0
        amount = st.slider(name, lowest, 2.0, slider.neutral or 0.0, 0.25, key=_key(name))
        session.sliders[name] = amount
        st.caption(f"{slider.share(amount):.2f} of the residual norm after block {slider.site}")
    for warning in session.sliders.warnings():
        st.warning(warning)
    st.button("Reset sliders", on_click=_reset, args=(session,), disabled=not known)
    st.button("New chat", on_click=session.clear)


def conversation(session: Session) -> None:
    """What was said, and the next message with its reply."""
    for message in session.messages:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
    text = st.chat_input("Say something")
    if not text:
        return
    with st.chat_message("user"):
        st.markdown(text)
    try:
        # Closed at once when the page is redrawn midway, so that the session keeps what was said.
        with st.chat_message("assistant"), closing(session.reply(text)) as pieces:
            st.write_stream(pieces)
    except SteerError as e:
        st.error(str(e))


def _reset(session: Session) -> None:
    session.sliders.reset()
    for name, slider in session.sliders.known().items():
        st.session_state[_key(name)] = slider.neutral or 0.0
        if slider.neutral is None:
            st.session_state[f"{_key(name)}: on"] = False


def _key(name: str) -> str:
    return f"amount of {name}"


main()

"""The page without a model: it offers to fetch and merge the default model, and shows the progress."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from steer.chat.jobs import Job, default_place, get_default, ready
from steer.page.drawing import markdown
from steer.page.guard import redraw, redraw_if_asked, safely, watch

POLL = 0.5


def draw() -> None:
    """Draw the first visit: what steer is, and the button that gets the default merge."""
    st.title("steer")
    st.write(
        "A chat whose character you move with sliders. It needs a checkpoint: name one with `steer ui MODEL`, or take "
        "the default merge, a small model (135M) that runs on two CPU cores."
    )
    place = default_place()
    if ready(place):
        st.button("Open the default merge", type="primary", on_click=_open, args=(place,))
        return
    job: Job | None = st.session_state.get("getting")
    if job is None:
        st.button("Get the default merge", type="primary", on_click=safely, args=(_get,))
        return
    watch(_progress, job.running, POLL, job)


def _get() -> None:
    st.session_state["getting"] = get_default()
    redraw()


def _open(place: Path) -> None:
    st.session_state["model"] = str(place)


def _progress(job: Job) -> None:
    if job.running:
        st.progress(job.progress or 0.0, f"Getting the default merge, {job.seconds:.0f} s: about a minute, once")
        st.code("\n".join(job.lines[-4:]) or "starting", language=None)
        st.button("Cancel", on_click=safely, args=(job.cancel,))
        return
    if job.error:
        st.error(markdown(job.error))
        st.button("Try again", on_click=safely, args=(_get,))
        redraw_if_asked()
        return
    st.rerun()

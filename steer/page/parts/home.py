"""The page without a model: it offers to fetch and merge the default model, and shows the progress."""

from __future__ import annotations

import streamlit as st

from steer.chat.jobs import default_place, get_default, ready
from steer.jobs import Job
from steer.page.guard import button, draw_job, redraw, watch

POLL = 0.5


def draw() -> None:
    """Draw the first visit: what steer is, and the button that gets the default merge."""
    st.title("steer")
    st.write(
        "A chat whose character you move with sliders. It needs a checkpoint: name one with `steer ui MODEL`, or take "
        "the default merge, a small model (135M) that runs on two CPU cores."
    )
    job: Job | None = st.session_state.get("getting")
    if ready():
        place = str(default_place())
        button("Open the default merge", lambda: st.session_state.update(model=place), type="primary")
    elif job is None:
        button("Get the default merge", _get, type="primary")
    else:
        watch(_progress, job, running=lambda: job.running, every=POLL)


def _get() -> None:
    st.session_state["getting"] = get_default()
    redraw()


def _progress(job: Job) -> None:
    if not draw_job(job, "Getting the default merge: about a minute, once", lines=4) and job.error:
        button("Try again", _get)

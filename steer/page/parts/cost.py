"""The part "Cost": what profiles and bakes cost, measured by `steer eval --quick` in a separate process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st
import streamlit.components.v1 as components

from steer.chat.chat import Chat
from steer.chat.costs import Cost, bake_cost, costs_of, effects_report, profile_cost
from steer.page.drawing import markdown
from steer.page.guard import button, draw_job, redraw, watch

POLL = 0.5
ASK = "What did this cost?"
_HEIGHT = 800
"""Pixels of the report in its dialog."""


def draw(chat: Chat) -> None:
    """Draw the form, and each evaluation of this model with its progress or its verdict."""
    st.caption(
        "Knowledge, places, consequences, characters, prose: the model answers the same questions with and without the "
        "sliders or the bake, and each difference is compared with noise. It takes some minutes."
    )
    costs, effects = costs_of(chat.model), effects_report(chat.model)
    if effects is not None:
        st.caption("What each slider that ships does to every trait was measured once, on messages that no search saw.")
        if st.button("What the sliders do to each other", icon=":material/grid_on:"):
            _show("What the sliders do to each other", effects)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input("Name for the sliders as they stand", "sliders", key="cost name", max_chars=80)
        button("Measure the sliders", lambda: sliders_cost(chat, name.strip()).start(), type="primary")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        place = st.text_input("Or the folder of a bake", key="cost bake").strip()
        button("Measure the bake", lambda: bake_cost(chat.model, Path(place)).start(), disabled=not place)
    for cost in costs:
        with st.container(border=True):
            job = cost.job
            watch(_cost, cost, running=lambda job=job: job is not None and job.running, every=POLL)


def sliders_cost(chat: Chat, name: str) -> Cost:
    """Return the evaluation of the chat's sliders as they stand, under a name."""
    return profile_cost(chat.model, chat.profile(name or "sliders"))


def ask(cost: Callable[[], Cost], key: str) -> None:
    """Draw the button that starts an evaluation and opens this part."""

    def start() -> None:
        cost().start()
        st.session_state["part"] = "Cost"
        redraw()

    button(ASK, start, "query_stats", key=key)


def _cost(cost: Cost) -> None:
    job, key = cost.job, cost.folder.name
    st.markdown(f"**{markdown(cost.name)}**")
    if job is not None and draw_job(job, "Measuring", f"cancel {key}", lines=3):
        return
    lines, report = cost.lines, cost.report
    st.markdown("\n".join(f"- {markdown(line)}" for line in lines) or "Not measured to its end.")
    with st.container(horizontal=True):
        if lines and report is not None:
            page = report.read_text()
            if st.button("Open the report", key=f"open {key}"):
                _show("What it cost", page)
            st.download_button("Download it", page, "eval.html", "text/html", on_click="ignore", key=f"save {key}")
        if not lines:
            button("Go on", lambda: (cost.start(), redraw()), key=f"start {key}")
        button("Measure again", lambda: (cost.start(fresh=True), redraw()), key=f"again {key}")


def _show(title: str, page: str) -> None:
    st.dialog(title, width="large")(components.html)(page, height=_HEIGHT, scrolling=True)

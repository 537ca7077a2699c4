"""The part "Evolve": a lineage of merges that one or more people breed by choosing the better of two replies."""

from __future__ import annotations

import getpass
from pathlib import Path

import streamlit as st
import streamlit.components.v1 as components

from steer.chat.chat import Chat
from steer.chat.evolving import Evolution, EvolvingJob, last
from steer.lineage.judging import PATIENCE, Choice, Judge
from steer.lineage.lineage import Lineage
from steer.lineage.ratings import standing
from steer.page.drawing import markdown, marked
from steer.page.guard import button, draw_job, guarded, redraw, watch

POLL = 0.3
_HEIGHT = 900
"""Pixels of the family tree."""
_CHOICES: dict[Choice, tuple[str, str]] = {
    "left": ("Left is better", "1"), "right": ("Right is better", "2"), "same": ("Equally good", "3"),
    "bad": ("Both are bad", "4"),
}  # fmt: skip
"""Choice -> (label of its button, key that presses it)."""


def draw(chat: Chat) -> None:
    """Draw the form that starts a lineage, or its standing with the vote and the family tree."""
    default = last() or Path.cwd() / "lineage"
    place = st.text_input("Folder of the lineage", str(default), key="lineage").strip()
    evolution = Evolution(Path(place or default).expanduser().absolute())
    job, lineage = evolution.job, evolution.lineage
    if lineage is not None:
        evolution.remember()
        st.markdown(f"**{markdown(standing(lineage).line)}**")
    if job is not None:
        watch(_job, evolution, job, running=lambda: job.running, every=POLL)
    running = job is not None and job.running
    if lineage is None:
        _start(evolution, running)
        return
    if running:
        _tree(lineage)
        return
    shown = st.segmented_control("View", ["Vote", "Family tree"], default="Vote", required=True, key="evolve view",
                                 label_visibility="collapsed")  # fmt: skip
    if shown == "Vote":
        guarded(_vote)(evolution)
    else:
        guarded(_tree)(lineage)
    _go_on(evolution)


def _start(evolution: Evolution, running: bool) -> None:
    st.caption(
        "Each generation adds a model to the merge, takes one away, or weights it otherwise. You read two replies and "
        "choose; everything else is done for you. It starts with a recipe, and with a pool of models to add."
    )
    recipe = st.text_input("Recipe to start from", placeholder="recipe.yml", key="evolve recipe").strip()
    pool = st.text_area("Models that may be added, one a line", key="evolve pool", height=120)
    models = [line.strip() for line in pool.splitlines() if line.strip()]
    button("Start", lambda: (evolution.start(recipe, models), redraw()), type="primary", disabled=running or not recipe)


def _job(evolution: Evolution, job: EvolvingJob) -> None:
    if not draw_job(job, "At work", "cancel evolving", lines=3) and job.arguments[1] == "export" and job.result:
        st.success(f"Written: {markdown(str(job.result.get('out')))}")


def _vote(evolution: Evolution) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        voter = st.text_input(
            "Vote as", getpass.getuser(), key="voter", max_chars=40, on_change=evolution.close
        ).strip()
        mode = st.segmented_control("Each vote is on", ["One message", "A scene"], default="One message", required=True,
                                    key="evolve mode")  # fmt: skip
    judge = evolution.judge(voter, scene=mode == "A scene")
    watch(_pair, judge, running=lambda: judge.blind_pair(0) is None, every=POLL)


def _pair(judge: Judge) -> None:
    """Draw the pair of replies to vote on, or wait for it."""
    pair = judge.blind_pair(PATIENCE + 0.1)
    if pair is None:
        st.caption("The replies are being written.")
        return
    *before, (_, message) = pair.chat
    if before:
        with st.expander(f"The scene so far: {len(before)} messages"):
            for role, text in before:
                with st.chat_message(role):
                    st.html(marked([(text, False)]))
    with st.chat_message("user"):
        st.html(marked([(message, False)]))
    for column, name, reply in zip(st.columns(2), ("Left", "Right"), (pair.left, pair.right), strict=True):
        with column, st.container(border=True):
            st.caption(name)
            st.html(marked([(reply, False)]) if reply else "<em>an empty reply</em>")
    with st.container(horizontal=True):
        for choice, (label, key) in _CHOICES.items():
            button(
                label, lambda choice=choice: (judge.vote(pair, choice), redraw()), shortcut=key, key=f"vote {choice}"
            )
        button("Take the last vote back", lambda: (judge.undo(), redraw()), type="tertiary", key="undo vote")
    with st.form("say", clear_on_submit=True, border=False):
        hint = judge.suggestion or "the next one is chosen for you"
        text = st.text_input("Your message, in place of this one", placeholder=hint).strip()
        if st.form_submit_button("Ask it") and text:
            judge.say(text)
            st.rerun()


def _tree(lineage: Lineage) -> None:
    from steer.lineage.tree_report import TREE, write_tree  # with matplotlib, which a page without it need not load

    page = write_tree(lineage, standing(lineage), lineage.place / TREE).read_text("utf-8")
    components.html(page, height=_HEIGHT, scrolling=True)
    st.download_button("Download the tree", page, TREE, "text/html", on_click="ignore")


def _go_on(evolution: Evolution) -> None:
    button("Next generation", lambda: (evolution.next(), redraw()), "family_history", key="next generation")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        out = st.text_input("Folder for the best one", str(evolution.place.with_name(f"{evolution.place.name}-best")),
                            key="evolve out").strip()  # fmt: skip
        button("Export", lambda: (evolution.export(out), redraw()), "ios_share", disabled=not out, key="export best")

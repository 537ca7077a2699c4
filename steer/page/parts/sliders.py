"""The sidebar: the sliders by group, the budget of each site, warnings, and below them `setup`."""

from __future__ import annotations

import math

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.slider_panel import GROUPS, SliderRow
from steer.core.schedule import PARTS, Schedule
from steer.page.drawing import budget_bar, ends, markdown, rail, rails
from steer.page.guard import bound, button, safely, tag
from steer.page.parts import new_slider, setup

SEARCHED = 10
"""Number of sliders beyond which they can be searched."""


def draw(chat: Chat) -> None:
    """Draw the sliders, budgets and warnings, and the settings below them."""
    panel = chat.panel
    with st.container(horizontal=True, wrap=False, vertical_alignment="center", horizontal_alignment="distribute"):
        st.toggle("Sliders act", panel.on, **bound(lambda: f"on@{tag(chat)}", lambda on: setattr(panel, "on", on)))
        _buttons(chat)
    # Separate containers, so that an open expander below does not close when a slider or a warning comes or goes.
    with st.container():
        _rows(chat)
    with st.container():
        _budgets(chat)
    st.caption(markdown(chat.backend.slider_note))
    setup.draw(chat)


def _rows(chat: Chat) -> None:
    rows = chat.panel.rows()
    if chat.backend.finds:
        with st.container(horizontal=True):
            button("New slider", new_slider.open_dialog, "add", help="Make one from two sentences that you write")
    if not rows:
        named = chat.backend.name.replace("`", "")
        st.info(f"No trait is known for this model yet. Make your own slider, or `steer find {named} moralizing`.")
    numbered = list(enumerate(rows))
    if len(rows) > SEARCHED:
        words = st.text_input("Find a slider", key="find slider", placeholder="a word of its name or its ends")
        numbered = [(number, row) for number, row in numbered if row.matches(words)]
        if not numbered:
            st.caption("Nothing found.")
    for group, title in GROUPS.items():
        members = [(number, row) for number, row in numbered if row.group == group]
        if members:
            with st.expander(title, expanded=True, key=f"group {group}"):
                for number, row in members:
                    with st.container(key=f"slider{number}"):
                        _row(chat, row)
    rails(rail(f"slider{number}", row.low, row.high, row.safe) for number, row in numbered)


def _budgets(chat: Chat) -> None:
    for budget in chat.panel.budgets():
        if budget.share > 0:
            st.caption(markdown(budget.words), help=markdown(budget.details))
            st.html(budget_bar(budget.share, budget.limit, budget.level))
    for warning in chat.warnings():
        st.warning(markdown(warning))


def _buttons(chat: Chat) -> None:
    panel = chat.panel
    with st.container(horizontal=True, wrap=False, width="content", key="icons of the sliders"):
        button("Undo", panel.undo, "undo", help="Undo the last move of a slider", type="tertiary")
        button("Redo", panel.redo, "redo", help="Redo it", type="tertiary")
        button("Reset all", panel.reset_all, "restart_alt", help="Reset: no slider moves anything", type="tertiary")
        if chat.backend.local:
            hint = "Read the whole chat again under the sliders of now. Without it they act from here on."
            button("Re-read", chat.reread, "refresh", help=hint, type="tertiary")


def _row(chat: Chat, row: SliderRow) -> None:
    label = row.title if row.operation == "add" else f"{row.title} ({row.operation})"
    with st.container(horizontal=True, wrap=False, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"**{markdown(label)}** :small[{_words(row)}]", help=markdown(_hint(row)))
        with (
            st.container(width="content", key=f"icons of {row.name}"),
            st.popover(f"More on {markdown(label)}", icon=":material/more_horiz:", type="tertiary"),
        ):
            _details(chat, row)
    stands = row.neutral if math.isnan(row.amount) else row.amount
    start = min(row.high, max(row.low, 0.0 if stands is None else stands))
    step = _step(row)
    st.slider(
        markdown(label), float(row.low), float(row.high), float(start), step, label_visibility="collapsed",
        format="%.2f" if step >= 0.01 else "%.3f", disabled=row.fixed is not None,
        **bound(lambda: f"amount of {row.name}@{tag(chat)}", lambda amount: chat.panel.set(row.name, float(amount))),
    )  # fmt: skip
    if row.fixed is not None:
        st.caption(f"Moves only when the server starts again: {markdown(row.fixed)}")
    st.html(ends(*row.ends))
    if row.verdict is not None and not row.verdict.works:
        st.markdown(f":small[:orange[{row.verdict.short}]]", help=markdown(row.verdict.sentence))


def _step(row: SliderRow) -> float:
    """Return the step of a slider: 0.05, 0.01 or 0.001, so that the track has roughly a hundred steps."""
    width = row.high - row.low
    return 0.05 if width >= 1 else 0.01 if width >= 0.2 else 0.001


def _words(row: SliderRow) -> str:
    """Return the text beside a slider's name: whether it is off or too far."""
    if math.isnan(row.amount):
        return ":gray[off]"
    if row.red:
        return ":red[too far]"
    return ""


def _hint(row: SliderRow) -> str:
    """Return what the page says when the mouse is over a slider's name."""
    measured = "as measured" if row.calibrated else "not measured for this slider"
    share = "an unknown share" if math.isnan(row.share) else f"{row.share:.2f}"
    return (
        f"It moves the model's inner state (the residual stream) by {share} of its usual length (norm). In the green "
        f"part, {row.safe[0]:g} to {row.safe[1]:g} ({measured}), replies hold together; in the red they fall apart."
    )


def _details(chat: Chat, row: SliderRow) -> None:
    panel, when = chat.panel, row.when
    at = f"{row.name}@{tag(chat)}"
    if row.description:
        st.write(markdown(row.description))
    if row.verdict is not None:
        st.write(markdown(row.verdict.sentence))
        if row.verdict.auroc is not None:
            st.caption(
                f"Of two replies that it never saw, one of each kind, it picks the right one in "
                f"{row.verdict.auroc:.0%} of cases (held-out AUROC {row.verdict.auroc:.2f})."
            )
    measured = "calibrated" if row.calibrated else "not calibrated"
    st.caption(f"Replies hold together from {row.safe[0]:g} to {row.safe[1]:g} ({measured}).")
    with st.container(horizontal=True):
        button("Reset", lambda: panel.off(row.name), key=f"reset {at}")
        if row.neutral is None and not math.isnan(row.amount):
            button("Off", lambda: panel.off(row.name), key=f"off {at}")
        if row.pinned:
            button("Unpin", lambda: panel.unpin(row.name), key=f"unpin {at}")
        if row.deletable:
            button("Delete for good", lambda: panel.delete(row.name), "delete", key=f"delete {at}")
    if not chat.backend.local:
        return

    def reshape() -> None:
        operation, part, first, after, ramp = (
            st.session_state[f"{field} {at}"] for field in ("operation", "part", "first", "after", "ramp")
        )
        panel.reshape(row.name, operation, Schedule(part, first or None, after or None, ramp or None, when.gate))

    with st.form(f"shape of {at}", border=False):
        st.selectbox("Operation", row.operations, row.operations.index(row.operation), key=f"operation {at}")
        st.selectbox(
            "Acts on", PARTS, PARTS.index(when.part), key=f"part {at}",
            format_func=dict(zip(PARTS, ("the whole text", "the reply alone", "its thoughts", "its answer"),
                                 strict=True)).__getitem__,
        )  # fmt: skip
        st.number_input(
            "Only the first tokens of the reply or part (0: all)", 0, 4096, when.first or 0, key=f"first {at}"
        )
        st.number_input("After so many tokens of it", 0, 4096, when.after or 0, key=f"after {at}")
        st.number_input("Grows over so many tokens (0: at once)", 0, 4096, when.ramp or 0, key=f"ramp {at}")
        if when.gate is not None:
            st.caption(f"Acts while {markdown(when.gate.on.name)} reads as its gate wants it, which a profile sets.")
        st.form_submit_button("Apply", on_click=safely, args=(reshape,))

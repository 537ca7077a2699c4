"""The part "Inside": each token of a reply coloured by a trait or feature, a chart, and KL to the unsteered model."""

from __future__ import annotations

import altair as alt
import pandas as pd
import streamlit as st

from steer.chat.chat import Chat
from steer.chat.readout import TokenReadout
from steer.page.drawing import heat, legend, markdown


def draw(chat: Chat) -> None:
    """Draw the choice of a reply and of sliders to read it by, and the readings."""
    replies = [m for m in chat.path() if m.role == "assistant" and m.parent is not None and m.text]
    if chat.writer.running:
        replies = replies[:-1]
    rows = chat.panel.rows()
    readable = {r.name: r.title for r in rows}
    if not replies or not readable:
        st.info("Nothing to look into yet: get a reply first, and have a trait or pin a feature.")
        return
    texts = {m.id: " ".join(m.text.split())[:70] for m in replies}
    message = st.selectbox("Reply", list(texts), len(texts) - 1, format_func=texts.__getitem__, key="inside reply")
    first = [r.name for r in sorted(rows, key=lambda r: not r.moves)][:2]
    names = st.multiselect("Read it by", list(readable), first, format_func=readable.__getitem__, key="inside names")
    if not names:
        st.caption("Choose what to read it by.")
        return
    with st.spinner("Reading the reply"):
        look = chat.inside(message, names)
    colour_by = st.segmented_control(
        "Colour by", names, default=names[0], required=True, key=f"colour by {' '.join(names)}",
        format_func=lambda name: markdown(readable[name]),
    )  # fmt: skip
    _heat(look, colour_by or names[0])
    _charts(look)


def _heat(look: TokenReadout, name: str) -> None:
    read = zip(look.steered[name], look.plain[name], look.kl, strict=True)
    hints = [f"{a:.2f} ({b:.2f} without sliders); the sliders changed this word by {kl:.2f} nats" for a, b, kl in read]
    st.html(legend(look.scale(name), f"amounts of {look.titles[name]}; hover a word for its value"))
    st.html(heat(look.pieces, look.heat(name), hints))


def _charts(look: TokenReadout) -> None:
    rows = pd.DataFrame(look.chart())
    along = alt.Scale(domain=[-1, len(look.pieces)], nice=False)
    tip = ["token", "text", "title", "under", alt.Tooltip("amount", format=".2f")]
    strip = (
        alt.Chart(rows, height=280)
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X("token:Q", title="token of the reply", scale=along),
            y=alt.Y("amount:Q", title="amount"),
            color=alt.Color("title:N", title=None, legend=alt.Legend(orient="top")),
            strokeDash=alt.StrokeDash(
                # At the bottom, because two legends side by side are wider than a phone.
                "under:N",
                title=None,
                sort=["sliders", "no sliders"],
                legend=alt.Legend(orient="bottom"),
            ),
            tooltip=tip,
        )
    )
    st.altair_chart(strip)
    if not any(look.kl):
        st.caption("No slider moved this reply: it is the unsteered model's.")
        return
    kl = pd.DataFrame({"token": range(len(look.kl)), "text": look.pieces, "KL": look.kl})
    bars = (
        alt.Chart(kl, height=200)
        .mark_bar()
        .encode(
            x=alt.X("token:Q", title="token of the reply", scale=along),
            y=alt.Y("KL:Q", title="change by the sliders, nats"),
            tooltip=["token", "text", alt.Tooltip("KL", format=".3f")],
        )
    )
    st.altair_chart(bars)
    mean = sum(look.kl) / len(look.kl)
    st.caption(f"The sliders changed the choice of words by {mean:.3f} nats a token on average (KL divergence).")

"""The part "Features": search a dictionary's features by words, trait or message, and pin one as a slider."""

from __future__ import annotations

import math

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.feature_index import FeatureCard, FeatureIndex
from steer.page.drawing import heat, markdown
from steer.page.guard import button

BEGIN = 8
"""Features of traits, and of the chat, that are listed before anything is searched."""
_WAYS = {"words": "By words", "trait": "By trait", "message": "What fires on a message"}


def draw(chat: Chat) -> None:
    """Draw the search and its results."""
    index = chat.features
    for line in index.problems:
        st.warning(markdown(line))
    if not index.dictionaries:
        st.info("No dictionary is known for this model. Train one: `steer train`, then `steer features --label`.")
        return
    way = st.segmented_control(
        "Search", list(_WAYS), default="words", required=True, key="search way", label_visibility="collapsed",
        format_func=_WAYS.__getitem__,
    )  # fmt: skip
    if way == "trait":
        traits = index.traits()
        if not traits:
            st.info(
                f"No trait was looked for in it yet: `steer find {_plain(chat.backend.name)} TRAIT --dictionary DIR`"
            )
            return
        trait = st.selectbox("Trait", traits, key="search trait")
        _cards(chat, index.search(trait=trait))
    elif way == "message":
        _firing(chat, index)
    else:
        words = st.text_input("Words", placeholder="lighthouse, apology, duke", key="search words").strip()
        if words:
            _cards(chat, index.search(words))
        else:
            _useful(chat, index)


def _useful(chat: Chat, index: FeatureIndex) -> None:
    """Draw the features to begin with: those of traits, and those that fire on the chat's last reply."""
    texts = [m.text for m in chat.path() if m.text.strip()]
    st.caption("Features that go with a trait" + (", and below those of this chat's last message" if texts else ""))
    of_traits = index.search(limit=BEGIN)
    _cards(chat, of_traits)
    if texts:
        with st.spinner("Reading the last message"):
            found = index.fires_on(texts[-1], limit=BEGIN)
        shown = {card.name for card in of_traits}
        st.caption("What fires on the last message")
        _cards(chat, [f.card for f in found if f.card.name not in shown])


def _firing(chat: Chat, index: FeatureIndex) -> None:
    texts = [m.text for m in chat.path() if m.text]
    key = f"search message {st.session_state.get('chats', 0)}.{len(texts)}"
    text = st.text_area("Message", texts[-1] if texts else "", key=key).strip()
    if not text:
        return
    with st.spinner("Reading the message"):
        found = index.fires_on(text)
    for firing in found:
        with st.container(border=True):
            _card(chat, firing.card)
            strongest = max((s for _, s in firing.marks), default=0.0) or 1.0
            pieces, strengths = [p for p, _ in firing.marks], [s for _, s in firing.marks]
            st.html(heat(pieces, [s / strongest for s in strengths], [f"{s:.2f}" for s in strengths]))
            st.caption(f"strength {firing.strength:.2f} at most, where 1 is strong for this feature")


def _cards(chat: Chat, cards: list[FeatureCard]) -> None:
    if not cards:
        st.caption("Nothing found.")
    for card in cards:
        with st.container(border=True):
            _card(chat, card)


def _card(chat: Chat, card: FeatureCard) -> None:
    pinned = card.name in chat.panel.pinned
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.markdown(f"**{markdown(card.title)}**")
        change = chat.panel.unpin if pinned else chat.panel.pin
        button("Unpin" if pinned else "Pin", lambda: change(card.name), "push_pin", key=f"pin {card.name}")
    st.write(markdown(card.description))
    record = card.record
    with st.expander(f"{markdown(card.name)}: tokens, contexts, scores"):
        moved = "" if math.isnan(card.share) else f"; amount 1 moves the stream by {card.share:.2f} of its norm"
        st.caption(f"fires on {record.rate:.2%} of tokens{moved}")
        for does, tokens in (("raises", record.top_tokens), ("lowers", record.bottom_tokens)):
            if tokens:
                st.markdown(f"{does} " + ", ".join(f"`{_plain(t)}`" for t, _ in tokens[:8]))
        if card.nearest:
            st.caption("nearest: " + "; ".join(f"{markdown(t)} ({c:.2f})" for _, t, c in card.nearest[:3]))
        for trait, found in record.traits.items():
            score = card.output_score.get(trait)
            steers = "" if score is None else f", output score {score:.2f}"
            st.caption(f"{markdown(trait)}: held-out AUROC {found.auroc:.2f}, q {found.q:.2g}{steers}")
        strongest = max((c.activation for c in record.contexts), default=0.0) or 1.0
        for context in record.contexts[:5]:
            pieces, hint = [context.before, context.token, context.after], f"{context.activation:.2f}"
            st.html(heat(pieces, [0.0, context.activation / strongest, 0.0], ["", hint, ""]))


def _plain(text: str) -> str:
    """Return a token for display as code, with white space made visible."""
    return "".join("↵" if c in "\n\r\u2028" else "␣" if c.isspace() else c for c in text).replace("`", "'") or "␣"

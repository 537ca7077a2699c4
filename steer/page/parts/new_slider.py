"""The dialog "New slider": two sentences and a preview, then a search that the sidebar shows, with how it ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.descriptions import PlainVerdict, plain_verdict
from steer.chat.preview import Preview
from steer.chat.slider_panel import SliderRow
from steer.core.trait import Trait
from steer.finding.new_slider import LONGEST, FailedSearch, NewSliderJob
from steer.page.drawing import markdown
from steer.page.guard import button, guarded, redraw, watch

if TYPE_CHECKING:  # openai takes long to import
    from steer.chat.remote_search import RemoteSearch

POLL = 1.0
_PREVIEW_POLL = 0.25
_FIELDS = ("new sentence", "new opposite", "new name")
"""Keys of the dialog's fields."""


def draw(chat: Chat) -> None:
    """Draw the search that runs, or how the last one ended, and the searches that failed."""
    watch(_search, chat, running=lambda: (job := chat.searching) is not None and job.running, every=POLL)


def open_dialog(sentence: str = "", opposite: str = "", name: str = "") -> None:
    """Open the dialog at the next drawing of the page, with its fields filled in."""
    st.session_state.update(zip(_FIELDS, (sentence, opposite, name), strict=True))
    st.session_state["new slider"] = True
    redraw()


def dialog(chat: Chat) -> None:
    """Draw the dialog if it is open. It stays open when the page is drawn again, until it is closed."""
    if st.session_state.get("new slider"):
        st.dialog("New slider", width="large", on_dismiss=_close)(guarded(_fields))(chat)


def _close() -> None:
    st.session_state["new slider"] = False
    preview: Preview | None = st.session_state.pop("preview", None)
    if preview is not None:
        preview.stop(0)


def _fields(chat: Chat) -> None:
    st.caption("Tell the model who to be at each end of the slider. Start with “You”, and name some words to use.")
    sentence = st.text_area(
        "Instruction at the high end", placeholder="You answer in rhyming couplets.", key=_FIELDS[0], height=70,
        max_chars=LONGEST,
    )  # fmt: skip
    opposite = st.text_area(
        "Instruction at the low end (may be empty)", placeholder="You answer in plain prose.", key=_FIELDS[1],
        height=70, max_chars=LONGEST,
    )  # fmt: skip
    name = st.text_input("Name (may be empty)", placeholder="rhymes", key=_FIELDS[2], max_chars=64).strip()
    if st.button("Preview", icon=":material/visibility:", type="primary"):
        _begin(chat, _trait(sentence, opposite, name))
    preview: Preview | None = st.session_state.get("preview")
    if preview is None:
        return
    _show(preview)
    st.caption(
        "If the two sides differ as you want, make the slider: the model answers some hundred messages and is measured "
        "on others, a minute or two on two CPU cores. You can go on chatting."
    )
    if st.button("Make the slider", icon=":material/tune:", type="primary"):
        if _trait(sentence, opposite, name) != preview.trait:
            st.warning("The sentences have changed: preview them first.")
            return
        chat.new_slider(preview.trait)
        _close()
        st.rerun()


def _trait(sentence: str, opposite: str, name: str) -> Trait:
    return Trait.from_sentences(sentence, opposite.strip() or None, name or None)


def _begin(chat: Chat, trait: Trait) -> None:
    before: Preview | None = st.session_state.pop("preview", None)
    if before is not None:
        before.stop()
    st.session_state["preview"] = chat.preview(trait)


def _show(preview: Preview) -> None:
    """Draw the replies as they grow. The loop ends when somebody touches the dialog, as every run of a page does."""
    place = st.empty()
    while True:
        running = preview.running
        with place.container():
            for reply in preview.replies:
                st.markdown(f"**{markdown(reply.message)}**")
                for column, title, text in zip(
                    st.columns(2), ("High end", "Low end"), (reply.high, reply.low), strict=True
                ):
                    with column, st.container(border=True):
                        st.caption(title)
                        st.markdown(markdown(text) or ("…" if running else "*an empty reply*"))
        if not running:
            break
        time.sleep(_PREVIEW_POLL)
    if preview.error:
        st.error(markdown(preview.error))


def _search(chat: Chat) -> None:
    job = chat.searching
    if job is not None and job.running:
        st.progress(job.progress or 0.0, markdown(f"Making “{job.trait.name}”, {job.seconds:.0f} s"))
        button("Cancel", lambda: (job.cancel(), chat.forget_search()), key="cancel new slider")
    elif job is not None and job.done:
        _result(chat, job)
    for failed in chat.failed_searches():
        _failed(failed)


def _result(chat: Chat, job: NewSliderJob | RemoteSearch) -> None:
    row = chat.panel.row(job.trait.name)
    made(row, row.verdict or plain_verdict((job.result or {}).get("verdict")))
    button("OK", lambda: (chat.forget_search(), redraw()), key="seen new slider")


def made(row: SliderRow, verdict: PlainVerdict | None, more: str = "") -> None:
    """Draw what was measured of a slider that was made, and a sentence `more`."""
    text = f"**“{row.title}” is among your sliders.** Replies hold together from {row.safe[0]:g} to {row.safe[1]:g}."
    if verdict is not None:
        auroc = "" if verdict.auroc is None else f" (held-out AUROC {verdict.auroc:.2f})"
        text = f"{text} {verdict.sentence}{auroc}"
    (st.success if verdict is not None and verdict.works else st.warning)(markdown(f"{text} {more}".rstrip()))


def _failed(failed: FailedSearch | RemoteSearch) -> None:
    st.error(markdown(f"“{failed.name}” was not found: {failed.error}"))
    with st.container(horizontal=True):
        again = (failed.sentence, failed.opposite or "", failed.name)
        button("Try again", lambda: open_dialog(*again), key=f"again {failed.name}")
        button("Delete", lambda: (failed.delete(), redraw()), key=f"forget {failed.name}")

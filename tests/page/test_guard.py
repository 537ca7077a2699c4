"""Drawing a part again never cuts the page short."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest


def page() -> None:
    import streamlit as st

    from steer.page.guard import watch

    st.session_state["begun"] = st.session_state.get("begun", 0) + 1
    waiting = iter([True])  # what is watched ends while the page is drawn
    watch(lambda: st.write("watched"), running=lambda: next(waiting, False), every=60)
    st.write("below")
    st.session_state["ended"] = st.session_state.get("ended", 0) + 1


def test_what_ends_while_the_page_is_drawn_leaves_nothing_out():
    at = AppTest.from_function(page).run()
    assert not at.exception
    assert [text.value for text in at.markdown] == ["watched", "below"]
    assert at.session_state["ended"] == at.session_state["begun"]

"""Changes and drawings that may go wrong: a mistake is one line on the page, never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import streamlit as st

from steer.chat.chat import Chat
from steer.errors import SteerError
from steer.page.look import markdown

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def safely(change: Callable[[], object]) -> None:
    """Make a change, or say in one line why not."""
    try:
        change()
    except Exception as e:
        tell(_line(e), "error")


def tell(text: str, icon: str = "check") -> None:
    """A line to be shown in passing. Not at once: what a callback draws would stand in place of something else."""
    st.session_state.setdefault("told", []).append((text, icon))


def guarded(draw: Callable[_P, None]) -> Callable[_P, None]:
    """A part of the page that says in one line what keeps it from being drawn."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for text, icon in st.session_state.pop("told", []):
            st.toast(markdown(text), icon=f":material/{icon}:", duration="long" if icon == "error" else "short")
        try:
            draw(*args, **kwargs)
        except Exception as e:
            st.error(markdown(_line(e)))

    return drawn


def watch(draw: Callable[..., None], running: bool, every: float, *args: Any) -> None:
    """Draw a part of the page by itself, again and again while something is running."""
    st.fragment(guarded(draw), run_every=every if running else None)(*args)


def tag(chat: Chat) -> str:
    """For the keys of widgets: another chat, or another set of amounts, is shown anew."""
    return f"{st.session_state.get('chats', 0)}.{chat.board.revision}"


def redraw() -> None:
    """Have the whole page drawn anew after a change that was made in a part which draws by itself."""
    st.session_state["redraw"] = True


def redraw_if_asked() -> None:
    """At the end of such a part."""
    if st.session_state.pop("redraw", False):
        st.rerun()


def _line(e: Exception) -> str:
    if isinstance(e, SteerError):
        return str(e)
    _log.exception("the page", exc_info=e)
    return f"that did not work: {type(e).__name__}: {' '.join(str(e).split())}"[:400]

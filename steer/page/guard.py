"""Error handling of the page, and drawing a part again: an error is one line on the page, never a traceback.

Parts use `safely` for changes (a widget's callback), `watch` to redraw themselves while something runs, and `redraw` to
redraw the whole page from inside such a part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import streamlit as st

from steer.chat.chat import Chat
from steer.errors import SteerError
from steer.page.drawing import markdown

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def safely(change: Callable[[], object]) -> None:
    """Call a function, and show an error in one line if it fails."""
    try:
        change()
    except Exception as e:
        tell(_line(e), "error")


def tell(text: str, icon: str = "check") -> None:
    """Show a line as a toast at the next drawing.

    Not at once: an element that a callback draws would replace another element of the page.
    """
    st.session_state.setdefault("told", []).append((text, icon))


def guarded(draw: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a function that draws a part of the page, so that an error is shown in one line."""

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
    """Draw a part of the page as a fragment, and draw it again every `every` seconds while `running`."""
    st.fragment(guarded(draw), run_every=every if running else None)(*args)


def tag(chat: Chat) -> str:
    """Return a suffix for widget keys. It changes with the chat and the amounts, so that widgets are made anew."""
    return f"{st.session_state.get('chats', 0)}.{chat.board.revision}"


def redraw() -> None:
    """Ask for the whole page to be drawn again, from a part that draws itself; see `redraw_if_asked`."""
    st.session_state["redraw"] = True


def redraw_if_asked() -> None:
    """Draw the whole page again if `redraw` was called. Such a part calls this at its end."""
    if st.session_state.pop("redraw", False):
        st.rerun()


def _line(e: Exception) -> str:
    if isinstance(e, SteerError):
        return str(e)
    _log.exception("the page", exc_info=e)
    return f"that did not work: {type(e).__name__}: {' '.join(str(e).split())}"[:400]

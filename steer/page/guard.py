"""Error handling of the page, and drawing a part again: an error is one line on the page, never a traceback.

Parts use `button`, `bound` and `safely` for changes, `draw_job` for a command that runs, `watch` to draw themselves
again while something runs, and `redraw` to have the whole page drawn again after a change in such a part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import streamlit as st

from steer.chat.chat import Chat
from steer.errors import SteerError
from steer.files import one_line
from steer.jobs import Job
from steer.page.drawing import markdown

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def safely(change: Callable[[], object]) -> None:
    """Call a function, and show an error in one line if it fails."""
    try:
        change()
    except Exception as e:
        toast(_line(e), "error")


def button(label: str, change: Callable[[], object], icon: str | None = None, **options: Any) -> None:
    """Draw a button that calls `change` safely. `icon`: the name of a Material symbol. `options`: as `st.button`."""
    st.button(
        label, icon=None if icon is None else f":material/{icon}:", on_click=safely, args=(change,), **options
    )  # fmt: skip


def bound(key: Callable[[], str], change: Callable[[Any], object]) -> dict[str, Any]:
    """Return the key and the `on_change` of a widget whose key changes when its value is set from elsewhere.

    `change` is called safely with a new value, unless `key` returns another key than when the widget was drawn. For
    until a browser hears that a run has ended, it sends the values of widgets that the run took away along with the
    next click. To Streamlit, which has forgotten these widgets by then, each such value is a change.
    """
    drawn = key()

    def changed() -> None:
        if key() == drawn:
            safely(lambda: change(st.session_state[drawn]))

    return {"key": drawn, "on_change": changed}


def draw_job(job: Job, words: str, key: str | None = None, lines: int = 0) -> bool:
    """Draw a running job, what it does in `words`, its last lines and a button to cancel it; or its error. Return
    whether it runs."""
    running = job.running
    if running:
        st.progress(job.progress or 0.0, markdown(f"{words}, {job.seconds:.0f} s"))
        if lines:
            st.code("\n".join(list(job.lines)[-lines:]) or "starting", language=None)
        button("Cancel", job.cancel, key=key)
    elif job.error:
        st.error(markdown(job.error))
    return running


def toast(text: str, icon: str = "check") -> None:
    """Show a line as a toast at the next drawing.

    Not at once: an element that a callback draws would replace another element of the page.
    """
    st.session_state.setdefault("toasts", []).append((text, icon))


def guarded(draw: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a function that draws a part of the page, so that an error is shown in one line."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for text, icon in st.session_state.pop("toasts", []):
            st.toast(markdown(text), icon=f":material/{icon}:", duration="long" if icon == "error" else "short")
        try:
            draw(*args, **kwargs)
        except Exception as e:
            st.error(markdown(_line(e)))

    return drawn


def watch(
    draw: Callable[..., None], *args: Any, running: Callable[[], bool] = lambda: False, every: float | None = None
) -> None:
    """Draw a part of the page as a fragment, which is drawn again without the rest of the page.

    While `running` returns true, that happens every `every` seconds, and once it does not any more, the whole page is
    drawn again, without the timer. The first drawing is part of the page's: to break it off for another would leave out
    all that is below.
    """
    ran, first = running(), True

    @wraps(draw)
    def drawn() -> None:
        nonlocal first
        within_page, first = first, False
        draw(*args)
        if not within_page and (st.session_state.pop("redraw", False) or (ran and not running())):
            st.rerun()

    st.fragment(guarded(drawn), run_every=every if ran else None)()


def redraw() -> None:
    """Ask for the whole page to be drawn again, from a button in a part that `watch` draws."""
    st.session_state["redraw"] = True


def tag(chat: Chat) -> str:
    """Return a suffix for widget keys. It changes with the chat and the amounts, so that widgets are made anew."""
    return f"{st.session_state.get('chats', 0)}.{chat.panel.revision}"


def new_chat() -> None:
    """Count a chat that was begun or opened, see `tag`, and draw the whole page again."""
    st.session_state["chats"] = st.session_state.get("chats", 0) + 1
    st.session_state["editing"] = None
    redraw()


def _line(e: Exception) -> str:
    if isinstance(e, SteerError):
        return str(e)
    _log.exception("the page", exc_info=e)
    return f"that did not work: {type(e).__name__}: {one_line(e)}"

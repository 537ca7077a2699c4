"""The page as a whole: it loads the model, keeps the chat of the browser tab, and draws the chosen part.

`steer ui` runs `steer/cli/page.py` with streamlit, and that calls `main` for every change on the page.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.local import LocalBackend
from steer.chat.writer import ReplyBackend
from steer.checkpoint.chat_templates import VARIABLE as CHAT_TEMPLATE
from steer.checkpoint.dtypes import DTYPES, VARIABLE
from steer.model.compile_limits import keep_few_shapes
from steer.model.steered import SteeredModel, load
from steer.page.drawing import keep_focus, style
from steer.page.guard import guarded, tag, watch
from steer.page.parts import bake, chats, compare, cost, evolve, features, home, inside, new_slider, sliders, talk
from steer.serve.limits import host_name

PARTS: dict[str, tuple[str, Callable[[Chat], None]]] = {
    "Chat": (":material/chat:", talk.draw),
    "Compare": (":material/compare_arrows:", compare.draw),
    "Inside": (":material/visibility:", inside.draw),
    "Features": (":material/search:", features.draw),
    "Bake": (":material/bakery_dining:", bake.draw),
    "Cost": (":material/query_stats:", cost.draw),
    "Evolve": (":material/family_history:", evolve.draw),
}
"""Parts of the page: name -> (icon, function that draws it). A server offers only the first."""
_SWITCH = 0.0005
"""Seconds that a thread waits before it asks another for Python's interpreter lock. The thread that writes a reply
releases the lock at every operation. At Python's default of 0.005 it might wait that long each time for the thread that
draws the page, hundreds of times per token."""
_SIDEBAR = 340
"""Width of the sidebar in pixels; on a phone it is closed at first."""


def main() -> None:
    """Draw the page. An error is shown as one line, never as a traceback."""
    st.set_page_config(page_title="steer", page_icon=":material/tune:", layout="wide", initial_sidebar_state=_SIDEBAR)
    st.set_option("client.showErrorDetails", "none")
    sys.setswitchinterval(_SWITCH)
    style()
    if not _known_host():
        st.error("This page answers at localhost and 127.0.0.1 alone; name other hosts with --server.allowedHosts")
        return
    guarded(_page)()


def _known_host() -> bool:
    """Return whether the Host header is one of this machine's names.

    Against DNS rebinding: a page of another site can make its own host name point to this machine, and Streamlit
    accepts that. `steer ui` makes Streamlit refuse it; this check also works for `streamlit run`.
    """
    host = st.context.headers.get("Host")
    allowed = ("localhost", "127.0.0.1", "::1", *(st.get_option("server.allowedHosts") or ()))
    return host is None or host_name(host) in allowed


def _page() -> None:
    st.session_state.pop("redraw", None)
    chat = _chat(_arguments())
    if chat is None:
        home.draw()
        return
    chosen = _part(chat)
    with st.sidebar:
        guarded(chats.draw)(chat)
        new_slider.draw(chat)
        # In these parts only the sidebar shows the sliders, so a move redraws only the sidebar, not a growing reply.
        if chosen in ("Chat", "Compare", "Inside"):
            watch(sliders.draw, chat)
        else:
            guarded(sliders.draw)(chat)
    new_slider.dialog(chat)
    drawn = tag(chat)
    guarded(PARTS[chosen][1])(chat)
    if tag(chat) != drawn:  # the part has set sliders, as one that is made of votes
        st.rerun()


def _part(chat: Chat) -> str:
    """Return the chosen part, of those that the chat's backend offers."""
    if not chat.backend.local:
        return "Chat"
    chosen = st.segmented_control(
        "Part of the page", list(PARTS), default="Chat", required=True, key="part", label_visibility="collapsed",
        format_func=lambda p: f"{PARTS[p][0]} {p}",
    )  # fmt: skip
    keep_focus()
    return chosen or "Chat"


def _chat(arguments: argparse.Namespace) -> Chat | None:
    """Return the chat of this browser tab; None if no model is chosen yet."""
    chat: Chat | None = st.session_state.get("chat")
    opened: Path | None = st.session_state.pop("open", None)
    if chat is None or opened is not None:
        backend = _backend(arguments)
        if backend is None:
            return None
        new = Chat(backend, place=opened)
        if chat is not None:
            chat.close()
        chat = st.session_state["chat"] = new
        st.session_state["chats"] = st.session_state.get("chats", 0) + 1
    return chat


def _backend(arguments: argparse.Namespace) -> ReplyBackend | None:
    if arguments.server is not None:
        from steer.chat.remote import RemoteBackend

        return RemoteBackend(arguments.server, os.environ.get("STEER_API_KEY"))
    model = arguments.model or st.session_state.get("model")
    return None if model is None else LocalBackend(_shared(model, arguments.device_map, arguments.four_bit))


@st.cache_resource(show_spinner="Loading the model")
def _shared(model: str, device_map: str | None, four_bit: bool) -> SteeredModel:
    """Load a checkpoint once for all tabs. What belongs to one tab, such as its sliders, is in its `LocalBackend`."""
    keep_few_shapes()
    loaded = load(model, device_map=device_map, four_bit=four_bit)
    loaded.sketch()  # computed now, because every lookup of a slider's name needs it
    # Streamlit collects garbage after every redraw of a reply. With the objects of these libraries that holds the
    # interpreter lock for a second or more; after gc.freeze they are not visited any more.
    gc.collect()
    gc.freeze()
    return loaded


def _arguments() -> argparse.Namespace:
    """Parse what follows `--` on streamlit's command line, which streamlit passes on unchanged."""
    parser = argparse.ArgumentParser(prog="app.py", add_help=False)
    parser.add_argument("model", nargs="?", default=os.environ.get("STEER_MODEL"))
    parser.add_argument("--server")
    parser.add_argument("--device-map")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--chat-template")
    named = parser.parse_known_args(sys.argv[1:])[0]
    if named.dtype is not None:
        os.environ[VARIABLE] = named.dtype
    if named.chat_template is not None:
        os.environ[CHAT_TEMPLATE] = named.chat_template
    return named

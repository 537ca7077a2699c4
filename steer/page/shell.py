"""The page as a whole: which model, which chat, and the part of it that is shown."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.local import LocalVoice
from steer.chat.voice import Voice
from steer.live.dtypes import DTYPES, VARIABLE
from steer.live.model import SteeredModel, load
from steer.live.serve.limits import host_name
from steer.live.shapes import keep_few_shapes
from steer.page.change import guarded, watch
from steer.page.look import style
from steer.page.parts import bake, chats, compare, features, home, inside, sliders, talk

PARTS: dict[str, tuple[str, Callable[[Chat], None]]] = {
    "Chat": (":material/chat:", talk.draw),
    "Compare": (":material/compare_arrows:", compare.draw),
    "Inside": (":material/visibility:", inside.draw),
    "Features": (":material/search:", features.draw),
    "Bake": (":material/bakery_dining:", bake.draw),
}
"""What the page shows, by name: an icon, and what draws it."""
_NEEDS = {"Compare": "duel", "Inside": "inside", "Features": "features", "Bake": "bake"}
_SWITCH = 0.0005
"""Seconds that a thread waits before it asks another for the interpreter. The one that writes a reply lets go of it at
every operation; at Python's 0.005 each might wait so long for whatever draws the page, hundreds of times a token."""
_SIDEBAR = 340
"""Its width in pixels; on a phone it is closed at first."""


def main() -> None:
    """Draw the page. No traceback is ever shown: what goes wrong is one line."""
    st.set_page_config(page_title="steer", page_icon=":material/tune:", layout="wide", initial_sidebar_state=_SIDEBAR)
    st.set_option("client.showErrorDetails", "none")
    sys.setswitchinterval(_SWITCH)
    style()
    if not _known_host():
        st.error("This page answers at localhost and 127.0.0.1 alone; name other hosts with --server.allowedHosts")
        return
    guarded(_page)()


def _known_host() -> bool:
    """Whether the browser asked for this machine by a name of its own: a page of another site can have its name point
    here, and Streamlit takes that for its own. `steer ui` has Streamlit refuse it; this holds for `streamlit run` too.
    """
    host = st.context.headers.get("Host")
    allowed = ("localhost", "127.0.0.1", "::1", *(st.get_option("server.allowedHosts") or ()))
    return host is None or host_name(host) in allowed


def _page() -> None:
    named = _arguments()
    chat = _chat(named)
    if chat is None:
        home.draw()
        return
    chosen = _part(chat)
    with st.sidebar:
        guarded(chats.draw)(chat)
        # Where nothing else shows the sliders, a move draws them alone, and the reply that grows is left in peace.
        if chosen in ("Chat", "Compare", "Inside"):
            watch(sliders.draw, False, 0.0, chat)
        else:
            guarded(sliders.draw)(chat)
    guarded(PARTS[chosen][1])(chat)


def _part(chat: Chat) -> str:
    """The part that was chosen, of those that the model's place offers."""
    offered = [p for p in PARTS if p not in _NEEDS or _NEEDS[p] in chat.voice.can]
    if len(offered) == 1:
        return offered[0]
    chosen = st.segmented_control(
        "Part of the page", offered, default=offered[0], required=True, key="part", label_visibility="collapsed",
        format_func=lambda p: f"{PARTS[p][0]} {p}",
    )  # fmt: skip
    return chosen or offered[0]


def _chat(named: argparse.Namespace) -> Chat | None:
    """The chat of this browser tab; None where no model is known yet."""
    chat: Chat | None = st.session_state.get("chat")
    opened: Path | None = st.session_state.pop("open", None)
    if chat is None or opened is not None:
        voice = _voice(named)
        if voice is None:
            return None
        new = Chat(voice, place=opened)
        if chat is not None:
            chat.close()
        chat = st.session_state["chat"] = new
        st.session_state["chats"] = st.session_state.get("chats", 0) + 1
    return chat


def _voice(named: argparse.Namespace) -> Voice | None:
    if named.server is not None:
        from steer.chat.remote import RemoteVoice

        return RemoteVoice(named.server, os.environ.get("STEER_API_KEY"))
    model = named.model or st.session_state.get("model")
    return None if model is None else LocalVoice(_shared(model, named.device_map, named.four_bit))


@st.cache_resource(show_spinner="Loading the model")
def _shared(model: str, device_map: str | None, four_bit: bool) -> SteeredModel:
    """One copy of a checkpoint for all tabs; what is a tab's own, its sliders first of all, is in its voice."""
    keep_few_shapes()
    loaded = load(model, device_map=device_map, four_bit=four_bit)
    loaded.sketch()  # what the sliders' names are looked up by
    # Streamlit collects garbage after every look at a reply, which takes the interpreter for as long as there are
    # objects to go through: a second or more with these libraries, or nothing once they are known to stay.
    gc.collect()
    gc.freeze()
    return loaded


def _arguments() -> argparse.Namespace:
    """What follows `--` on streamlit's command line; streamlit passes it through as it is."""
    parser = argparse.ArgumentParser(prog="app.py", add_help=False)
    parser.add_argument("model", nargs="?", default=os.environ.get("STEER_MODEL"))
    parser.add_argument("--server")
    parser.add_argument("--device-map")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES)
    named = parser.parse_known_args(sys.argv[1:])[0]
    if named.dtype is not None:
        os.environ[VARIABLE] = named.dtype
    return named

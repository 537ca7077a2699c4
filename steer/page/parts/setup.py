"""The sidebar below the sliders: profiles, the character and its system prompt, lorebooks, and the sampler."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from steer.chat.chat import Chat
from steer.chat.profile_store import (
    file_name,
    forget_profile,
    keep_profile,
    load_profile,
    profile_bytes,
    saved_profiles,
    uploaded_profile,
)
from steer.core.cards import load_card
from steer.core.lorebook import load_lorebook
from steer.core.profile import Profile
from steer.core.sampler import PRESETS, Sampler, preset
from steer.errors import SteerError
from steer.page.drawing import markdown
from steer.page.guard import bound, button, new_chat, safely, toast
from steer.page.parts import cost
from steer.plain_text import plain_line

_CUSTOM = "as set below"
_WARNED = 5
"""How many warnings of one file are shown."""
_FIELDS: dict[str, tuple[str, float, float, float]] = {
    "temperature": ("Temperature (0: greedy)", 0.0, 10.0, 0.1),
    "min_p": ("Min-p", 0.0, 1.0, 0.05),
    "top_p": ("Top-p (1: all)", 0.01, 1.0, 0.05),
    "top_k": ("Top-k (0: all)", 0, 100_000, 1),
    "typical_p": ("Typical (1: all)", 0.01, 1.0, 0.05),
    "repetition_penalty": ("Repetition penalty (1: off)", 0.5, 3.0, 0.01),
    "dry_multiplier": ("DRY (0: off)", 0.0, 5.0, 0.1),
    "xtc_probability": ("XTC probability (0: off)", 0.0, 1.0, 0.05),
    "max_new_tokens": ("Tokens of a reply at most", 1, 4096, 16),
    "seed": ("Seed of the first reply", 0, 2**31 - 1, 1),
}
"""Field of the sampler -> (label, least value, largest value, step)."""


def draw(chat: Chat) -> None:
    """Draw four expanders: profiles, character, lorebooks, sampler."""
    for title, icon, part in (
        ("Profiles", "library_books", _profiles),
        ("Character and system prompt", "theater_comedy", _character),
        ("Lorebooks", "menu_book", _lorebooks),
        ("Sampler", "casino", _sampler),
    ):
        with st.expander(title, icon=f":material/{icon}:"):
            part(chat)


def _profiles(chat: Chat) -> None:
    profiles = saved_profiles()
    if profiles:
        saved = st.selectbox("Saved", list(profiles), key="saved profile")
        with st.container(horizontal=True):
            button("Load", lambda: _use(chat, load_profile(saved)))
            button("Delete", lambda: forget_profile(saved), key="delete profile")
    name = st.text_input("Save as", "my character", key="profile name", max_chars=80).strip()
    with st.container(horizontal=True):
        button("Save", lambda: _keep(chat, name), disabled=not name)
        try:
            data = profile_bytes(chat.profile(name or "profile"))
        except SteerError as e:
            st.caption(markdown(str(e)))
        else:
            st.download_button("Download", data, f"{file_name(name)}.yaml", "application/yaml", on_click="ignore")
    if chat.backend.local:
        cost.ask(lambda: cost.sliders_cost(chat, name), "cost of profile")
    file = st.file_uploader("Upload a profile", ["yaml", "yml"], key="profile upload", max_upload_size=1)
    if file is not None:
        data, uploaded = file.getvalue(), file.name
        button("Use it", lambda: _use(chat, uploaded_profile(data, uploaded)), type="primary", key="use upload")


def _use(chat: Chat, profile: Profile) -> None:
    chat.use(profile)
    toast(f"{profile.name}: {len(profile.sliders)} sliders and a sampler")


def _keep(chat: Chat, name: str) -> None:
    keep_profile(chat.profile(name))
    toast(f"kept: {name}")


def _character(chat: Chat) -> None:
    with st.container(horizontal=True):
        user = st.text_input("Your name", "You", key="user name", max_chars=80).strip() or "You"
        persona = st.text_input("Who you are", key="persona", placeholder="for cards that ask", max_chars=2000)
    kinds = ["png", "webp", "json"]
    file = st.file_uploader("Character card (PNG, WEBP or JSON)", kinds, key="card", max_upload_size=20)
    if file is not None:
        seed = chat.sampler.seed + st.session_state.get("chats", 0)
        try:
            card = load_card(file.getvalue(), user=user, persona=persona, seed=seed, filename=file.name)
        except SteerError as e:
            st.error(markdown(str(e)))
        else:
            _warn(card.warnings)
            label, hint = markdown(f"Play {card.name}"[:60]), "A new chat; this one stays among the old ones"
            button(label, lambda: (chat.play(card), new_chat()), type="primary", key="play", help=hint)
    st.text_area(
        "System prompt", chat.system or "", placeholder="none",
        **bound(
            lambda: f"system@{st.session_state.get('chats', 0)}",
            lambda text: setattr(chat, "system", text.strip() or None),
        ),
    )  # fmt: skip


def _lorebooks(chat: Chat) -> None:
    if (book := chat.lore.character) is not None:
        st.markdown(markdown(f"{book.name}: {len(book.entries)} entries, of the card"))
    for book in chat.lore.books:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(markdown(f"{book.name}: {len(book.entries)} entries"))
            button("Remove", lambda name=book.name: chat.remove_lorebook(name), key=f"remove {book.name}")
        _warn(book.warnings)
    file = st.file_uploader("Lorebook (JSON)", ["json"], key="lorebook", max_upload_size=20)
    if file is not None:
        data, name = file.getvalue(), file.name
        add = lambda: chat.add_lorebook(load_lorebook(data, name.removesuffix(".json")))  # noqa: E731
        button("Add it", add, type="primary", key="add lorebook")


def _warn(warnings: tuple[str, ...]) -> None:
    for line in warnings[:_WARNED]:
        st.warning(markdown(plain_line(line)))
    if len(warnings) > _WARNED:
        st.caption(f"and {len(warnings) - _WARNED} warnings more")


def _sampler(chat: Chat) -> None:
    now = chat.sampler
    named = next((n for n, s in PRESETS.items() if _with_length(s, now) == now), None)
    options = [*PRESETS] if named else [_CUSTOM, *PRESETS]
    st.selectbox(
        "Preset", options, options.index(named or _CUSTOM),
        **bound(lambda: f"preset@{hash(chat.sampler)}", lambda name: _preset(chat, name)),
    )  # fmt: skip
    with st.expander("Fields"), st.form(f"sampler {hash(now)}", border=False):
        for name, (label, least, most, step) in _FIELDS.items():
            value = getattr(now, name)
            low, high = min(least, value), max(most, value)
            st.number_input(label, low, high, value, step, key=f"{name}@{hash(now)}", help=None)
        st.form_submit_button("Apply", on_click=safely, args=(lambda: _apply(chat, now),), key="apply sampler")


def _apply(chat: Chat, now: Sampler) -> None:
    chat.sampler = replace(now, **{name: st.session_state[f"{name}@{hash(now)}"] for name in _FIELDS})


def _preset(chat: Chat, name: str) -> None:
    if name != _CUSTOM:
        chat.sampler = _with_length(preset(name), chat.sampler)


def _with_length(sampler: Sampler, now: Sampler) -> Sampler:
    return replace(sampler, max_new_tokens=now.max_new_tokens, seed=now.seed)

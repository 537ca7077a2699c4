"""The page fetches nothing from elsewhere, whatever a stranger's name, card, label or reply holds: in Chromium."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from test_browser import Page
from tiny_chat import ENDLESS, keep_direction, save_tiny_chat

from steer.chat.conversation import Conversation
from steer.chat.stored import Stored, save_chat
from steer.checkpoint.library import dictionaries_of
from steer.core.dictionary_files import FEATURES
from steer.model.steered import load

pytestmark = pytest.mark.alone


@contextmanager
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server of somebody else's, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def pictures(url: str, place: str) -> str:
    """Everything that could make a browser fetch something, with the place where it stood."""
    at = f"{url}/{place}"
    return (
        f"![a]({at}/inline) [![a]({at}/linked)](x) !\\[a]({at}/escaped) ![b][r] <img src='{at}/html'> "
        f"<style>@import '{at}/style';</style> <link rel=stylesheet href='{at}/link'> "
        f"<iframe src='{at}/frame'></iframe> "
        f"<svg><image href='{at}/svg'/></svg> <p style=\"background:url('{at}/css')\">x</p> "
        f"<script src='{at}/script'></script> $\\includegraphics{{{at}/tex}}$\n\n[r]: {at}/reference\n"
    )


@pytest.fixture
def hostile(tmp_path, tiny_llama, make_direction, tiny_dictionary, monkeypatch) -> Callable[[str], Path]:
    """Makes a model and a STEER_HOME whose labels, traits, old chats and files hold pictures at an address."""

    def make(url: str) -> Path:
        monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
        checkpoint = save_tiny_chat(tiny_llama, tmp_path / "chat", **ENDLESS, max_position_embeddings=4096)
        keep_direction(checkpoint, make_direction("moral"))
        tiny_dictionary(checkpoint)
        (place,) = dictionaries_of(load(checkpoint).sketch()).values()
        rows = [json.loads(line) for line in (place / FEATURES).read_text().splitlines()]
        for row in rows:
            row["top_tokens"] = [[pictures(url, "raised"), 1.0], ["word8", 0.5]]
            row["bottom_tokens"] = [[pictures(url, "lowered"), 1.0]]
            row["contexts"] = [
                {"before": pictures(url, "before"), "token": t, "after": pictures(url, "after"), "activation": 1.0}
                for t in (pictures(url, "token"), f"![t]({url}/short)")
            ]
            row["traits"] = {pictures(url, "trait"): dict.fromkeys(("auroc", "auroc_max", "auroc_mean", "q"), 0.9)}
        (place / FEATURES).write_text("".join(json.dumps(row) + "\n" for row in rows))
        slider = {"name": "several", "latents": [2, 4], "units": [1.0, 1.0], "trait": pictures(url, "slider")}
        (place / "sliders.yaml").write_text(yaml.safe_dump([slider]))
        talk = Conversation()
        said = talk.add("user", pictures(url, "message"), None)
        talk.add("assistant", pictures(url, "reply"), said.id)
        save_chat(tmp_path / "home" / "chats" / "old.json", Stored(talk, "tiny", system=pictures(url, "system")))
        broken = json.dumps({"steer_chat": f"![a]({url}/version)"})
        (tmp_path / "home" / "chats" / "![a](broken).json").write_text(broken)
        return checkpoint

    return make


def test_no_picture_is_fetched_whatever_a_strangers_text_holds(chromium, hostile, served_page, tmp_path):
    with elsewhere() as (url, asked):
        checkpoint = hostile(url)
        control = tmp_path / "control.html"
        control.write_text(f"<img src='{url}/control'>")
        chromium.get(control.as_uri())
        end = time.monotonic() + 20
        while "/control" not in asked and time.monotonic() < end:
            time.sleep(0.05)
        assert "/control" in asked  # what is fetched is heard of
        asked.clear()
        with served_page(tmp_path, str(checkpoint)) as page_url:
            page = Page(chromium, page_url)
            everywhere(page, url, tmp_path)
            time.sleep(1)
        assert asked == []


def everywhere(page: Page, url: str, folder: Path) -> None:
    """Go through the page until each of the texts was shown."""
    shown: set[str] = set()

    def look(*places: str) -> None:
        page.settled()
        seen = page.browser.execute_script("return document.body.textContent + document.body.innerHTML")
        shown.update(p for p in places if f"{url}/{p}/" in seen)
        assert shown >= set(places), set(places) - shown

    page.click("Old chats")
    page.until(lambda: "expected a chat that this program saved" in page.all("body")[0].text)
    page.click("Open")
    page.until(lambda: len(page.texts()) == 2)
    look("message", "reply")
    page.click("Continue")
    page.until(page.growing)
    page.stop()
    page.say(pictures(url, "typed").replace("\n", " "))
    page.stop()
    look("typed")

    profile = folder / "strange.yaml"
    sliders = [{"slider": f"![a]({url}/unknown)", "amount": 1}]
    profile.write_text(yaml.safe_dump({"name": pictures(url, "profile"), "sliders": sliders}))
    page.click("Profiles")
    page.upload(profile)
    page.until(lambda: page.all("[data-testid=stToast]"))
    card = folder / "card.json"
    texts = {f: pictures(url, f) for f in ("description", "personality", "scenario", "mes_example", "first_mes")}
    data = {"name": f"![a]({url}/name)", **texts, "alternate_greetings": [pictures(url, "greeting")]}
    entry = {"keys": ["e"], "constant": True, "content": pictures(url, "lore"), "name": pictures(url, "entry")}
    data["character_book"] = {"name": pictures(url, "book"), "entries": [entry], "scan_depth": [pictures(url, "depth")]}
    card.write_text(json.dumps({"spec": "chara_card_v2", "spec_version": "2.0", "data": data}))
    page.click("Character and system prompt")
    page.until(lambda: page.all("[data-testid=stSidebar] input[type=file]")[1].send_keys(str(card)) is None)
    page.click("Play ")
    page.until(lambda: len(page.texts()) == 1)
    look("first_mes")

    page.part("Features")
    page.until(lambda: "word8" in page.all(".stMain")[0].text)
    for which in range(2):
        page.press(".stMain summary", which)
    look("raised", "lowered", "before", "token", "after", "trait")
    page.click("Pin")
    page.until(lambda: len(page.all("[data-testid=stSidebar] input[type=range]")) >= 2)
    page.click("By trait")
    look("trait")
    for part in ("Inside", "Bake", "Compare", "Chat"):
        page.part(part)

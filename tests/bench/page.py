"""The slider chat in a real browser on a real model: how long until the first word, and does memory stay flat?

    python tests/bench/page.py [--model demo/merged] [--messages 100] [--json]

`steer ui` runs as a separate process, and a headless Chromium types messages into it, half of the number: the other
half are the replies. What is timed is from the Enter key to the first word on the screen, beside the same model's first
token of the same chat in this process, while nobody else writes. Memory is the server's, once a fifth of the messages
is there and at the end; what a chat must keep, the keys and values of its tokens, is reported beside it. A slider is
moved by a key while a reply streams, and the time is from that key until the page shows the new amount, which it does
after the sliders have it: the next token is written under it. Ends with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from selenium import webdriver

import steer
from steer.core.sampler import CHAT
from steer.model.decode import decode
from steer.model.steered import SteeredModel

WAIT = 1.0
"""Seconds by which the page's first word may be later than the model's first token."""
GROWTH = 100e6
"""Bytes that the server may grow by in four fifths of the messages, besides the chat's own keys and values."""
FELT = 2.0
"""Tokens written until a slider is felt."""
LONGEST = 40
"""Tokens of a reply at most, so that all the messages fit the model's context."""
SELECT_ALL, TAB, ENTER, PAGE_DOWN = "\ue009a\ue000", "\ue004", "\ue007", "\ue00f"
SLIDER, MOVES = "[data-testid=stSidebar] input[type=range]", 4
WORDS = ["stone", "river", "lamp", "winter", "bread", "garden", "letter", "island", "clock", "window"]
WATCH = """
    const mine = arguments[0];
    window.waited = null;
    document.addEventListener('keydown', () => { window.pressed = performance.now(); }, {capture: true, once: true});
    const text = m => m.querySelector('[data-testid=stMarkdownContainer]')?.innerText.replace('▍', '').trim();
    const observer = new MutationObserver(() => {
        const [asked, reply] = [...document.querySelectorAll('[data-testid=stChatMessage]')].slice(-2).map(text);
        if (asked !== mine || !reply) return;
        window.waited = performance.now() - window.pressed;
        observer.disconnect();
    });
    observer.observe(document.body, {childList: true, subtree: true, characterData: true});"""
"""Has the page note the milliseconds from the next key to the first word of a reply. By what was asked, as a long chat
shows its last messages alone."""
MOVED = """
    const place = document.querySelector('[class*=st-key-slider]');
    const text = () => place.querySelector('[data-testid=stMarkdown]').innerText;
    const before = text();
    window.moved = null;
    place.addEventListener('keydown', () => { window.pressed = performance.now(); }, {capture: true, once: true});
    const observer = new MutationObserver(() => {
        if (text() === before) return;
        window.moved = performance.now() - window.pressed;
        observer.disconnect();
    });
    observer.observe(place, {childList: true, subtree: true, characterData: true});"""
"""Has the page note the milliseconds from the next key on the first slider until the text below it has changed."""


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    messages: Annotated[int, typer.Option(min=20, help="Yours and the model's.")] = 100,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print each figure beside its bar."""
    with served(model) as (url, server), chromium() as browser:
        browser.get(url)
        until(lambda: boxes(browser), 240)
        shorten(browser)
        waits: list[float] = []
        sizes: list[int] = []
        for n in range(messages // 2):
            waits.append(say(browser, f"Tell me something about a {WORDS[n % 10]} and the number {n}."))
            sizes.append(server.memory_info().rss)
        moves, rate = move(browser)
    live = steer.load(model)
    alone = statistics.median(first_token(live, n) for n in range(5))
    early = len(sizes) // 5
    grown = sizes[-1] - sizes[early]
    kept = len(sizes[early:]) * (LONGEST + 30) * bytes_a_token(live)
    later = statistics.median(waits[:10]) / 1000 - alone
    figures = {
        "first word on the page, median of the first ten, s": (statistics.median(waits[:10]) / 1000, None),
        "first word on the page, median of the last ten, s": (statistics.median(waits[-10:]) / 1000, None),
        "the model's first token, s": (alone, None),
        "the page later by, s": (later, WAIT),
        "a slider's key to its answer while a reply streams, s": (statistics.median(moves) / 1000, None),
        "  in which the reply goes on by tokens": (statistics.median(moves) / 1000 * rate, FELT),
        "memory after a fifth of the messages, MB": (sizes[early] / 1e6, None),
        "grown by the end, MB": (grown / 1e6, None),
        "  of it the chat's keys and values, MB, at most": (kept / 1e6, None),
        "  besides them, MB": (max(0.0, grown - kept) / 1e6, GROWTH / 1e6),
    }
    if as_json:
        print(json.dumps({name.strip(): {"value": v, "bar": bar} for name, (v, bar) in figures.items()}, indent=2))
    else:
        for name, (value, bar) in figures.items():
            print(f"{name:55}{value:>10.3g}" + ("" if bar is None else f"   bar {bar:g}"))
    raise typer.Exit(any(bar is not None and value > bar for value, bar in figures.values()))


@contextmanager
def served(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """The page, as a user starts it, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("steer")), "ui", model, "--headless", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).close()
        except OSError:
            return False
        return True

    try:
        until(healthy, 60)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    options = webdriver.ChromeOptions()
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit("expected chromium and its driver, found none; apt-get install chromium chromium-driver")
    options.binary_location = binary
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,860"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(120)
    try:
        yield browser
    finally:
        browser.quit()


def until(condition: Callable[[], object], patience: float = 120) -> None:
    """Wait for something that holds. Errors: RuntimeError when it does not."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {patience} s in vain")
        time.sleep(0.25)  # looking at a page takes its time from the model


def boxes(browser: Any) -> list[Any]:
    """Where messages are typed."""
    return browser.find_elements("css selector", "textarea[data-testid=stChatInputTextArea]")


def shorten(browser: Any) -> None:
    """Ask for short replies, in the field of the page that is for it."""
    press = """const [css, title] = arguments;
        const found = [...document.querySelectorAll(css)].find(e => e.textContent.includes(title));
        if (found) found.click();
        return Boolean(found);"""
    for title in ("Sampler", "Fields"):
        until(lambda title=title: browser.execute_script(press, "summary", title))
        time.sleep(1)
    field = "[aria-label='Tokens of a reply at most']"
    until(lambda: [f for f in browser.find_elements("css selector", field) if f.is_displayed()])
    browser.find_element("css selector", field).send_keys(SELECT_ALL + str(LONGEST) + TAB)
    until(lambda: browser.execute_script(press, "button", "Apply"))
    time.sleep(2)


def say(browser: Any, text: str) -> float:
    """Milliseconds from the Enter key to the first word of the reply, once the reply is whole."""
    waited = begin(browser, text)
    whole(browser)
    return waited


def begin(browser: Any, text: str) -> float:
    """The same, once the first word is there."""
    boxes(browser)[0].send_keys(text)
    browser.execute_script(WATCH, text)
    boxes(browser)[0].send_keys(ENTER)
    until(lambda: browser.execute_script("return window.waited"))
    return browser.execute_script("return window.waited")


def whole(browser: Any) -> None:
    """Wait for the end of the reply."""
    until(lambda: not growing(browser))
    time.sleep(0.5)


def growing(browser: Any) -> list[Any]:
    """What stands below a reply that is being written."""
    return browser.find_elements("css selector", ".st-key-growing")


def move(browser: Any) -> tuple[list[float], float]:
    """Milliseconds from a key on the first slider to its answer, while a reply is being written, and the tokens a
    second of that reply."""
    moves: list[float] = []
    rate = 0.0
    for n in range(MOVES):
        begin(browser, f"And what of the {WORDS[n]} in the end?")
        time.sleep(0.7)
        browser.execute_script(MOVED)
        browser.find_element("css selector", SLIDER).send_keys(PAGE_DOWN)
        until(lambda: browser.execute_script("return window.moved"))
        shown = growing(browser)
        if shown:  # it was felt by what follows
            moves.append(browser.execute_script("return window.moved"))
            rate = max(rate, float(shown[0].text.split(", ")[-1].split()[0]))
        whole(browser)
    if not moves:
        raise RuntimeError("every reply had ended before the page showed the slider's move")
    return moves, rate


def first_token(live: SteeredModel, n: int) -> float:
    """Seconds that the model takes for the first token of a chat that begins."""
    prompt = live.prompt_ids([{"role": "user", "content": f"Tell me something about a lamp and the number {n}."}])
    start = time.perf_counter()
    next(iter(decode(live, [prompt], replace(CHAT, max_new_tokens=2))))
    return time.perf_counter() - start


def bytes_a_token(live: SteeredModel) -> int:
    """Of keys and values."""
    config = live.hf.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * live.hf.dtype.itemsize


if __name__ == "__main__":
    typer.run(main)

"""Take the README's screenshots: the real app in a real browser, answering on the default merge.

pip install selenium          # and Chromium with its driver: apt-get install chromium chromium-driver
steer features dictionaries/smollm2-135m-default-merge/14 --html demo/features.html
python examples/screenshots.py demo/merged demo/report.html demo/features.html
"""

# pyright: reportMissingImports=false
# selenium is wanted here and in one test alone, so it is no dependency.
from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from os import environ
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

OUT = Path(__file__).parent / "screenshots"
PORT = 8599
MESSAGE = "I told my friend that I was ill, and went to the beach instead."
PATIENCE = 240


def main(model: str, *pages: str) -> None:
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as chats:
        # Directions stay where they are; chats and votes of somebody else do not get into the picture.
        home = Path(environ.get("STEER_HOME") or Path.home() / ".cache" / "steer")
        for there in ("directions", "dictionaries"):
            if (home / there).is_dir():
                (Path(chats) / there).symlink_to((home / there).resolve())
        server = subprocess.Popen(
            [Path(sys.executable).with_name("steer"), "ui", model, "--port", str(PORT), "--headless"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ | {"STEER_HOME": chats},
        )  # fmt: skip
        options = webdriver.ChromeOptions()
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,860", "--hide-scrollbars"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            wait_for(f"http://127.0.0.1:{PORT}/_stcore/health")
            take(browser)
            for page in pages:
                size(browser, 1120, 1500)
                browser.get(Path(page).resolve().as_uri())
                time.sleep(1)
                browser.save_screenshot(str(OUT / f"{Path(page).stem}.png"))
        finally:
            browser.quit()
            server.terminate()
            server.wait()


def take(browser: webdriver.Chrome) -> None:
    """The app's parts, one after the other."""
    size(browser, 1280, 860)
    open_page(browser)
    ask(browser, replies=1)
    slide(browser, "moralizing", Keys.ARROW_LEFT * 20)  # twenty steps of 0.05: amount -1
    ask(browser, replies=2)
    shoot(browser, "app")
    press(browser, "Inside")
    time.sleep(3)
    shoot(browser, "inside")
    press(browser, "Features")
    press(browser, "What fires on a message")
    time.sleep(3)
    shoot(browser, "search")
    press(browser, "Compare")
    find(browser, ".stMain [data-testid=stFormSubmitButton] button")[0].click()
    until(lambda: find(browser, "[class*=st-key-vote]"))
    shoot(browser, "compare")
    size(browser, 390, 844)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    open_page(browser)
    ask(browser, replies=1)
    shoot(browser, "phone")


def size(browser: webdriver.Chrome, width: int, height: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def find(browser: webdriver.Chrome, css: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, css)


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something that holds; what is being redrawn meanwhile does not yet."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except WebDriverException:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the page did not do what was asked of it within {PATIENCE} seconds")


def settle(browser: webdriver.Chrome) -> None:
    time.sleep(1)
    until(lambda: find(browser, "[data-testid=stApp][data-test-script-state=notRunning]"))


def open_page(browser: webdriver.Chrome) -> None:
    browser.get(f"http://127.0.0.1:{PORT}")
    until(lambda: find(browser, "textarea[data-testid=stChatInputTextArea]"))
    settle(browser)


def ask(browser: webdriver.Chrome, replies: int) -> None:
    """Send the message and wait until its reply is whole."""
    find(browser, "textarea[data-testid=stChatInputTextArea]")[0].send_keys(MESSAGE + Keys.ENTER)
    until(
        lambda: (
            len(find(browser, "[data-testid=stChatMessage]")) == 2 * replies
            and find(browser, "[class*=st-key-Regenerate]")
            and not find(browser, ".st-key-growing")
        )
    )
    settle(browser)


def slide(browser: webdriver.Chrome, name: str, keys: str) -> None:
    find(browser, f"[data-testid=stSidebar] input[type=range][aria-label={name}]")[0].send_keys(keys)
    settle(browser)


def press(browser: webdriver.Chrome, label: str) -> None:
    buttons = f"//button[contains(., '{label}')]"
    until(lambda: browser.find_elements(By.XPATH, buttons)[0].click() is None)
    settle(browser)


def shoot(browser: webdriver.Chrome, name: str) -> None:
    time.sleep(1)
    browser.save_screenshot(str(OUT / f"{name}.png"))


def wait_for(url: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url}: the app did not start within two minutes")


if __name__ == "__main__":
    main(*sys.argv[1:])

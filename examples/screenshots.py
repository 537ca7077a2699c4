"""Take the README's screenshots: the real app in a real browser, answering on the default merge.

pip install selenium          # and Chromium with its driver: apt-get install chromium chromium-driver
steer features dictionaries/smollm2-135m-default-merge/14 --html demo/features.html
python examples/screenshots.py demo/merged demo/report.html demo/features.html
"""

# pyright: reportMissingImports=false
# selenium is wanted here alone, so it is no dependency.
from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

OUT = Path(__file__).parent / "screenshots"
PORT = 8599
MESSAGE = "I told my friend that I was ill, and went to the beach instead."


def main(model: str, report: str, features: str) -> None:
    OUT.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [Path(sys.executable).with_name("steer"), "ui", model, "--port", str(PORT), "--headless"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,860", "--hide-scrollbars"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/_stcore/health")
        browser.get(f"http://127.0.0.1:{PORT}")
        box = "textarea[data-testid='stChatInputTextArea']"
        WebDriverWait(browser, 120).until(lambda b: b.find_elements(By.CSS_SELECTOR, box))
        ask(browser, box, replies=1)
        browser.save_screenshot(str(OUT / "app.png"))
        moralizing = "//div[@data-testid='stSlider'][.//p[text()='moralizing']]//input[@type='range']"
        thumb = browser.find_element(By.XPATH, moralizing)
        thumb.send_keys(Keys.ARROW_LEFT * 4)  # four steps of 0.25: amount -1
        time.sleep(2)
        ask(browser, box, replies=2)
        browser.save_screenshot(str(OUT / "app.png"))
        browser.set_window_size(1120, 1500)
        browser.get(Path(report).resolve().as_uri())
        time.sleep(1)
        browser.save_screenshot(str(OUT / "report.png"))
        browser.set_window_size(1280, 1400)
        browser.get(Path(features).resolve().as_uri())
        time.sleep(1)
        browser.save_screenshot(str(OUT / "features.png"))
    finally:
        browser.quit()
        server.terminate()
        server.wait()


def ask(browser: webdriver.Chrome, box: str, replies: int) -> None:
    """Send the message and wait until its reply has stopped growing."""
    field = browser.find_element(By.CSS_SELECTOR, box)
    field.send_keys(MESSAGE)
    field.send_keys(Keys.ENTER)
    said = ""
    for _ in range(120):
        time.sleep(2)
        found = browser.find_elements(By.CSS_SELECTOR, "[data-testid='stChatMessage']")
        now = found[-1].text if len(found) == 2 * replies else ""
        if now and now == said:
            return
        said = now
    raise SystemExit("the reply did not end within four minutes")


def wait_for(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url}: the app did not start within a minute")


if __name__ == "__main__":
    main(*sys.argv[1:])

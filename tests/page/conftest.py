"""The page in a real browser, on a tiny checkpoint: a server in a separate process, and Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import ENDLESS, keep_direction, save_tiny_chat

from steer.checkpoint.library import register_dictionary
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import FEATURES, save_dictionary
from steer.core.direction import Direction
from steer.model.steered import load
from steer.sae.records import Context, FeatureRecord

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDTH, LATENTS = 32, 80
DEPTH = 40
"""Blocks: enough that somebody can move a slider while a reply of 256 tokens is being written."""


def keep_dictionary(checkpoint: Path) -> None:
    """A random dictionary where the library finds it; its latents are labelled by their number."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dictionary = Dictionary(
        "jumprelu", rand(WIDTH, LATENTS) / WIDTH**0.5, rand(LATENTS) * 0.1, rand(LATENTS, WIDTH) / WIDTH**0.5,
        rand(WIDTH) * 0.1, site=1, norm=5.0, threshold=rand(LATENTS).abs() * 0.3,
    )  # fmt: skip
    sketch = load(checkpoint).sketch()
    place = checkpoint.parent / "trained"
    save_dictionary(dictionary, place)
    rows = [
        FeatureRecord(
            i, 1 / (i + 2), 1.0 + i / 10, 2.0 + i / 5, [(f"word{i}", 1.0)], [("less", -1.0)],
            [Context("what stood ", f"here{i}", " and after", 1.0)], [],
        ).to_json()
        for i in range(0, LATENTS, 2)
    ]  # fmt: skip
    (place / FEATURES).write_text("".join(json.dumps(r) + "\n" for r in rows))
    header = {"name": "tiny", "site": 1, "norm": 5.0, "sketch": sketch.to_header()}
    (place / "manifest.json").write_text(json.dumps(header))
    register_dictionary(place, "tiny", sketch)


@pytest.fixture(scope="session")
def tiny_dictionary() -> Callable[[Path], None]:
    """See `keep_dictionary`."""
    return keep_dictionary


@pytest.fixture(scope="session")
def served_page() -> Callable[..., AbstractContextManager[str]]:
    """See `served`."""
    return served


@pytest.fixture(scope="session")
def tiny_page_home(
    tiny_llama: Callable[..., Path],
    make_direction: Callable[..., Direction],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """A folder with a checkpoint `chat` that can chat and never ends a reply itself, and a STEER_HOME `home` that knows
    a direction and a dictionary of it."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_HOME", str(folder / "home"))
        checkpoint = save_tiny_chat(
            tiny_llama, folder / "chat", **ENDLESS, max_position_embeddings=4096, num_hidden_layers=DEPTH
        )
        keep_direction(checkpoint, make_direction("moral"))
        keep_dictionary(checkpoint)
        yield folder


@contextmanager
def served(folder: Path, *model: str) -> Iterator[str]:
    """The page, started as a user starts it on a machine that never ran Streamlit: a home directory with nothing but
    the folder of an agent tool, which Streamlit looks for, and an input that is open and says nothing. `folder`/home is
    its STEER_HOME."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = folder / "user"
    (user / ".cursor").mkdir(parents=True, exist_ok=True)
    quiet = {"OMP_NUM_THREADS": "1", "STEER_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    quiet |= {"HOME": str(user), "BROWSER": "true"}  # what it opens the page with
    server = subprocess.Popen(
        [sys.executable, "-c", "from steer.cli.main import main; main()", "ui", *model, "--port", str(port)],
        cwd=folder, env=os.environ | quiet, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, "the page's server has ended"
                time.sleep(0.1)
        else:
            pytest.fail("the page's server did not start within a minute")
        yield url
    finally:
        server.terminate()
        server.wait(10)


# Of a module, as the one below: an open page is drawn again and again, which takes most of a core from what follows.
@pytest.fixture(scope="module")
def page_url(tiny_page_home: Path) -> Iterator[str]:
    """The page on that checkpoint."""
    with served(tiny_page_home, str(tiny_page_home / "chat")) as url:
        yield url


@pytest.fixture
def empty_page_url(tmp_path: Path) -> Iterator[str]:
    """The page of somebody who has no model yet."""
    with served(tmp_path) as url:
        yield url


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that saves downloads into its `downloads`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its driver on this machine: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,860"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.downloads = tmp_path_factory.mktemp("downloads")
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(browser.downloads)}
    )
    yield browser
    browser.quit()

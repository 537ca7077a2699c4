"""The page answers to this machine's own names alone: a page of another site may have its name point here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit
from streamlit.runtime.context import ContextProxy
from streamlit.testing.v1 import AppTest

from steer.cli import live as cli_live
from steer.serve.server import listen

UPGRADE = (
    "GET /_stcore/stream HTTP/1.1\r\nHost: {0}\r\nOrigin: http://{0}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
GET = "GET / HTTP/1.1\r\nHost: {0}\r\nOrigin: http://{0}\r\nConnection: close\r\n\r\n"


SETTINGS = Path(__file__).parents[2] / ".streamlit"


def command_of_ui(port: int) -> list[str]:
    """The command that `steer ui` becomes."""
    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execv", lambda program, command: started.append(command))
        cli_live.ui(None, None, port, headless=True)
    return started[0]


@pytest.fixture(scope="module", params=["steer ui", "streamlit run app.py"])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Streamlit as it is started, over a script of one line, which starts sooner."""
    folder = tmp_path_factory.mktemp("page")
    script = folder / "app.py"
    script.write_text("import streamlit as st\nst.write('secret')\n")
    with listen("127.0.0.1", 0) as free:
        number = free.getsockname()[1]
    command = [str(script) if part.endswith("page.py") else part for part in command_of_ui(number)]
    if request.param != "steer ui":
        shutil.copytree(SETTINGS, folder / SETTINGS.name)
        command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(number)]
    home = {"HOME": str(folder), "PATH": os.environ["PATH"], "BROWSER": "true"}
    process = subprocess.Popen(command, cwd="/", env=home, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", number), timeout=20).close()
                break
            except OSError:
                assert process.poll() is None, "streamlit has ended"
                time.sleep(0.1)
        yield number
    finally:
        process.terminate()
        process.wait(20)


def status(port: int, request: str, host: str) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(request.format(host).encode())
        return int(raw.recv(4096).split()[1])


FOREIGN = ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "[::2]"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_gets_no_socket_through_which_all_of_the_page_comes(port, name):
    assert 400 <= status(port, UPGRADE, f"{name}:{port}") < 500


@pytest.mark.parametrize(("allowed", "more"), [([], False), (["my.host"], True)])
def test_however_it_was_started_nothing_is_drawn_for_a_foreign_name(monkeypatch, allowed, more):
    monkeypatch.setattr(sys, "argv", ["app.py"])  # without a model, for which the page has a title
    monkeypatch.delenv("STEER_MODEL", raising=False)
    option = streamlit.get_option
    monkeypatch.setattr(streamlit, "get_option", lambda n: allowed if n == "server.allowedHosts" else option(n))

    def drawn(host: str | None) -> bool:
        monkeypatch.setattr(ContextProxy, "headers", {} if host is None else {"Host": host})
        page = AppTest.from_file(str(cli_live.PAGE), default_timeout=60).run()
        assert ["answers at localhost" in e.value for e in page.error] == ([] if page.title else [True])
        return bool(page.title)

    assert not any(drawn(f"{name}:8501") for name in FOREIGN)
    assert all(drawn(f"{name}:8501") for name in ("localhost", "127.0.0.1", "[::1]"))
    assert drawn(None)  # no browser: the tests of the page
    assert drawn("my.host:1") is more


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_its_own_names_are_served(port, name):
    assert status(port, GET, f"{name}:{port}") == 200
    assert status(port, UPGRADE, f"{name}:{port}") == 101


def test_its_address_is_printed_before_streamlit_takes_over(monkeypatch, capsys):
    printed: list[str] = []
    monkeypatch.setattr(os, "execv", lambda *_: printed.append(capsys.readouterr().err))
    cli_live.ui(None, None, 8765, headless=True)
    assert "http://127.0.0.1:8765 " in printed[0]


def test_streamlit_run_app_has_every_option_of_steer_ui_from_the_settings_beside_it():
    command = command_of_ui(8501)
    options = command[command.index("run") + 2 : command.index("--")]
    said = defaultdict(set)
    for name, value in zip(options[::2], options[1::2], strict=True):
        said[name.removeprefix("--")].add(value)
    del said["server.port"], said["server.headless"]

    def flat(table: dict, place: str = "") -> dict[str, set[str]]:
        found = {}
        for key, value in table.items():
            if isinstance(value, dict):
                found |= flat(value, f"{place}{key}.")
            else:
                found[f"{place}{key}"] = set(value) if isinstance(value, list) else {str(value)}
        return found

    settings = flat(tomllib.loads((SETTINGS / "config.toml").read_text()))
    assert {k: {v.lower() for v in values} for k, values in settings.items()} == said

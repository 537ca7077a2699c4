"""The command line in this process, which has torch loaded already, and in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from steer.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """What --json printed."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


def command_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command's entry point in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["steer", *map(str, arguments)])
        monkeypatch.setattr(os, "environ", os.environ.copy())  # which the command changes
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    return run


def command_outside(*arguments: object, timeout: float = 60) -> Outcome:
    """Runs the installed command in a separate process."""
    command = [str(Path(sys.executable).with_name("steer")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


def fork(forkserver: ForkServerContext, function: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Starts a separate process, which calls a function of a module in this process's environment."""
    process = forkserver.Process(target=_in_environment, args=(dict(os.environ), function, *arguments))
    # The process would run what is the main program here, and Streamlit's tests leave a page in its place.
    with patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
        process.start()
    return process


def _in_environment(environment: dict[str, str], function: Callable[..., object], *arguments: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)

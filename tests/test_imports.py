"""What is imported when: the command answers at once, the package loads nothing that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import typer

import steer
from steer.cli.main import app

COMMAND = str(Path(sys.executable).with_name("steer"))
VERBS = list(cast(Any, typer.main.get_command(app)).commands)
HEAVY = ["torch", "transformers", "sae_lens", "transformer_lens", "streamlit", "mergekit", "sklearn", "matplotlib"]
NEVER = ["sae_lens", "transformer_lens", "streamlit", "mergekit"]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def imported(code: str, names: list[str]) -> list[str]:
    """Which of `names` a fresh interpreter has imported after running `code`."""
    show = f"import sys; print(*[n for n in {names!r} if n in sys.modules])"
    return run(sys.executable, "-c", f"{code}; {show}").split()


def test_help_lists_every_verb() -> None:
    text = run(COMMAND, "--help")
    assert len(VERBS) > 10
    assert all(f" {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steer.cli.main import main

    monkeypatch.setattr(sys, "argv", ["steer", verb, "--help"])
    monkeypatch.setattr(os, "environ", os.environ | {"COLUMNS": "200"})
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"steer {verb} " in text.split("Example", 1)[1]


def test_the_package_and_its_errors_import_nothing_heavy() -> None:
    assert imported("import steer; steer.__version__; steer.SteerError; steer.Trait; dir(steer)", HEAVY) == []
    assert imported("import steer.cli.main", HEAVY) == []


@pytest.mark.slow
def test_no_public_name_imports_dictionaries_or_the_page() -> None:
    code = (
        "import sys, steer\n"
        "[getattr(steer, name) for name in steer.__all__]\n"
        f"print(*[name for name in {NEVER!r} if name in sys.modules])"
    )
    assert run(sys.executable, "-c", code).strip() == ""


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(steer, name) is not None for name in steer.__all__)
    assert set(steer.__all__) <= set(dir(steer))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = steer.laod

"""SIGTERM in the middle of any verb: one line, the exit code of shells, and no half-written file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat import save_tiny_chat


@pytest.mark.slow
def test_sigterm_ends_any_verb_with_one_line_and_leaves_no_temporary_file(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_tiny_chat(tiny_llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text("ba be bi bo bu\n\n" * 200_000)
    command = [str(Path(sys.executable).with_name("steer")), "harvest", "model", "out", "--text", "text.txt"]
    with subprocess.Popen(
        [*command, "--site", "1", "--tokens", "1000000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"STEER_HOME": str(tmp_path / "home")},
    ) as process:  # fmt: skip
        while process.poll() is None and not any(tmp_path.glob("out*/*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1].startswith("steer: stopped by SIGTERM; what is finished is kept")
    assert model.exists()

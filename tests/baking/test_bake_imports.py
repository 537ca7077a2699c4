"""A small bake is mostly imports: `steer bake` and `steer verify` import no more than they compute with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steer.checkpoint.reader import SINGLE
from steer.core.edit import Edit

RUN = """
import sys
from steer.cli.main import main
try:
    main()
except SystemExit as e:
    print("exit", e.code)
print("imported", *sorted(sys.modules), sep=" ")
"""
NEVER = {"transformers", "huggingface_hub", "peft", "accelerate", "gguf", "sklearn", "scipy", "pandas", "datasets",
         "matplotlib", "streamlit", "sae_lens", "transformer_lens", "mergekit"}  # fmt: skip


def run(*arguments: str | Path) -> tuple[str, set[str]]:
    """(exit code, top-level modules) of the command in a separate process."""
    code = [sys.executable, "-c", RUN, *map(str, arguments)]
    lines = subprocess.run(code, capture_output=True, text=True, check=True).stdout.splitlines()
    modules = next(line for line in lines if line.startswith("imported ")).split()[1:]
    return next(line for line in lines if line.startswith("exit ")).split()[1], {m.split(".")[0] for m in modules}


@pytest.mark.slow
def test_baking_and_verifying_import_torch_and_nothing_else_that_is_large(
    source: Path, ablation: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    direction = ablation.ablate[0].save(tmp_path / "direction.safetensors")
    for command in (["bake", source, tmp_path / "out", "--ablate", direction], ["verify", tmp_path / "out"]):
        code, modules = run(*command)
        assert code == "0"
        assert "torch" in modules
        assert not modules & NEVER


def test_what_is_refused_before_anything_is_computed_needs_no_torch(baked: Path, tmp_path: Path) -> None:
    flipped = Path(shutil.copytree(baked, tmp_path / "flipped"))
    data = bytearray((flipped / SINGLE).read_bytes())
    data[-1] ^= 1
    (flipped / SINGLE).write_bytes(data)
    for command in (["verify", tmp_path / "none"], ["verify", flipped], ["bake", baked, baked, "--ablate", "moral"]):
        code, modules = run(*command)
        assert code == "1"
        assert not modules & (NEVER | {"torch"})

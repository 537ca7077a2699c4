"""Every example runs as it stands, and what it prints is true of the default model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.model


def run(name: str, *args: str) -> str:
    """What `python examples/NAME` prints. Without arguments it takes the default merge, or the default model."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def furthest(printed: str) -> float:
    """How far the logits were from those of the sliders."""
    found = re.search(r"logits: at most (\S+) from those of model.sliders", printed)
    assert found is not None, printed
    return float(found[1])


@pytest.mark.slow
def test_residuals_distinguish_a_lecture_from_an_answer() -> None:
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(-?[\d.]+) +(\d+)/(\d+)", run("record_residuals.py"), re.MULTILINE)
    assert [int(block) for block, *_ in rows] == list(range(30))
    assert max(int(right) / int(of) for *_, right, of in rows) == 1.0
    assert all(float(norm) > 0 for _, norm, *_ in rows)
    assert max(float(gap) for _, _, gap, *_ in rows) > 0.1


@pytest.mark.slow
def test_a_plain_model_is_steered_by_a_profile_as_the_sliders_steer() -> None:
    printed = run("plain_hooks.py")
    assert "hooks on: model.embed_tokens, model.layers.15" in printed
    plain, steered = (re.search(rf"\[{label}\] +(.+)", printed) for label in ("plain", "steered"))
    assert plain is not None
    assert steered is not None
    assert plain[1] != steered[1]
    assert furthest(printed) < 1e-2


@pytest.mark.slow
def test_a_bridge_is_steered_by_a_profile_as_the_sliders_steer() -> None:
    printed = run("transformer_lens_hooks.py")
    assert "fwd_hooks on: hook_embed, blocks.15.hook_resid_post" in printed
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) ", printed, re.MULTILINE)
    # Nothing moves before the site, and there the stream moves by itself.
    assert [int(block) for block, *_ in rows] == list(range(15, 30))
    assert [float(part) > 0 for part in rows[0][1:]] == [True, False, False]
    assert furthest(printed) < 1e-2

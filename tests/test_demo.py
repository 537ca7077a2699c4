"""The whole line on the real default model: what the project claims, measured again on held-out topics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llama_server import llama_server

from steer.baking.certificate import server_command
from steer.checkpoint.gguf_file import write_gguf
from steer.finding.directions import NEAR_BEST
from steer.serve.llama_cpp.fit import FAR
from steer.verbs.bake import bake

pytestmark = [pytest.mark.model, pytest.mark.alone]

STEER = Path(sys.executable).with_name("steer")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def demo(out: Path) -> dict[str, Any]:
    """`steer demo --json` as a user runs it. The model comes from the cache when it is there."""
    subprocess.run([STEER, "fetch"], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([STEER, "demo", "--out", out, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def by_amount(demo: dict[str, Any], trait: str) -> dict[float, dict[str, Any]]:
    return {p["amount"]: p for p in demo["dose"][trait] if p["amount"] is not None}


def labelled(demo: dict[str, Any], trait: str, label: str) -> dict[str, Any]:
    return next(p for p in demo["dose"][trait] if p["label"] == label)


def test_the_merge_is_worth_treating(demo: dict[str, Any]) -> None:
    assert by_amount(demo, "moralizing")[0.0]["rate"] >= 1 / 3


@pytest.mark.parametrize("trait", ["moralizing", "compliance"])
def test_the_scorer_and_the_direction_read_held_out_replies(demo: dict[str, Any], trait: str) -> None:
    found = demo["found"][trait]
    assert found["scorer_auroc"] > 0.85
    per_site = found["auroc_per_site"]
    assert len(per_site) == 30
    # Of 24 replies a side, so with a standard error of 0.045: 0.9 may come out as this in other arithmetic.
    assert max(per_site) > 0.81
    # The site is chosen by what it does, among those that read the trait as well as the best.
    assert found["auroc"] >= max(per_site) - NEAR_BEST


@pytest.mark.parametrize("trait", ["moralizing", "compliance"])
def test_the_rate_is_monotone_in_the_amount(demo: dict[str, Any], trait: str) -> None:
    points = by_amount(demo, trait)
    assert sorted(points) == [-2, -1, 0, 1, 2]
    assert all(points[a]["rate"] <= points[b]["rate"] for a, b in pairwise(sorted(points))), points


def test_moralizing_falls_to_a_third_and_rises_by_half(demo: dict[str, Any]) -> None:
    points = by_amount(demo, "moralizing")
    assert points[-1]["rate"] <= points[0]["rate"] / 3
    assert points[1]["rate"] >= min(0.9, 1.5 * points[0]["rate"])


def test_compliance_falls_by_a_third(demo: dict[str, Any]) -> None:
    points = by_amount(demo, "compliance")
    assert points[-1]["rate"] <= points[0]["rate"] * 2 / 3


@pytest.mark.parametrize("amount", [-1.0, 1.0])
def test_steered_replies_stay_fluent(demo: dict[str, Any], amount: float) -> None:
    points = by_amount(demo, "moralizing")
    # Below three trigrams in a hundred a ratio is that of two chances: replies that nobody steered have one or two.
    assert points[amount]["repetition"] <= max(2 * points[0]["repetition"], 0.03)
    assert points[amount]["perplexity"] <= 3 * points[0]["perplexity"]


def test_a_random_direction_does_not_do_it(demo: dict[str, Any]) -> None:
    points = by_amount(demo, "moralizing")
    control = labelled(demo, "moralizing", "random direction, -1")
    assert control["probability"] > (points[0]["probability"] + points[-1]["probability"]) / 2


def test_the_baked_checkpoint_keeps_what_it_was_asked_to(demo: dict[str, Any]) -> None:
    bake = demo["bake"]
    assert bake["rate_ratio"] <= 0.5
    assert bake["kl"] <= 0.2
    assert bake["perplexity_ratio"] <= 1.1


def test_the_report_shows_what_was_measured_and_needs_no_other_file(demo: dict[str, Any]) -> None:
    page = Path(demo["report"]).read_text()
    assert page.count("<svg") == 7
    assert demo["search"]["chosen"]["label"] in page
    for outside in ("src=", "<link", "http://localhost", "@import"):
        assert outside not in page


def test_a_second_demo_measures_nothing_again_and_prints_the_same(demo: dict[str, Any], out: Path) -> None:
    written = Path(demo["report"]).stat().st_mtime_ns
    again = subprocess.run([STEER, "demo", "--out", out, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == demo
    assert Path(demo["report"]).stat().st_mtime_ns == written


def test_the_baked_checkpoint_verifies_and_loads_in_plain_transformers(demo: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    assert subprocess.run([STEER, "verify", demo["baked"]], capture_output=True).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(demo["baked"])
    assert model.config.num_hidden_layers == 30


def test_the_terminal_chat_steers_on_the_directions_that_ship(demo: dict[str, Any], tmp_path: Path) -> None:
    """An empty STEER_HOME: only what ships in dictionaries/ is at hand."""
    done = subprocess.run(
        [STEER, "chat", demo["merged"], "--slider", "moralizing=-1", "--max-new-tokens", "40"],
        input="My friend lied to me.\n/sliders\n/moralizing 0.5\n/quit\n",
        capture_output=True,
        text=True,
        env={**os.environ, "STEER_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "moralizing" in done.stdout


def test_the_example_runs_as_it_stands(demo: dict[str, Any]) -> None:
    example = Path(__file__).parents[1] / "examples" / "steer_in_python.py"
    done = subprocess.run([sys.executable, example, demo["merged"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|moved|" in done.stdout


def test_a_plain_bake_of_the_merge_equals_ablate_hooks_at_every_writer(
    demo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the shipped direction; what differs is the rounding of the edited weights to bf16."""
    import torch

    import steer

    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    out = tmp_path / "plain"
    certificate = steer.bake(demo["merged"], out, ablate=["moralizing"])
    assert certificate.writers_edited == certificate.writers_found == 61
    source, baked = steer.load(demo["merged"], dtype=torch.float32), steer.load(out, dtype=torch.float32)
    moral = source.sliders.slider("moralizing").target
    ids = torch.tensor([source.prompt_ids([{"role": "user", "content": "Describe a harbour at dawn."}])])
    with torch.inference_mode(), source.steered({steer.Slider(moral, "ablate"): 1.0}):
        hooked = source.hf(ids).logits.log_softmax(-1)
    with torch.inference_mode():
        written = baked.hf(ids).logits.log_softmax(-1)
        untouched = source.hf(ids).logits.log_softmax(-1)
    rounding = float((hooked.exp() * (hooked - written)).sum(-1).mean())
    effect = float((untouched.exp() * (untouched - hooked)).sum(-1).mean())
    assert rounding < 0.002
    assert rounding < effect / 50


def test_fit_trusts_the_slider_on_the_merge_at_8_bits(demo: dict[str, Any], tmp_path: Path) -> None:
    """Found on the unquantised merge, slid in llama-server on its Q8_0."""
    gguf, baked = tmp_path / "merged.gguf", tmp_path / "baked"
    certificate = bake(demo["merged"], baked, ablate="moralizing", form="gguf")
    write_gguf(Path(demo["merged"]), gguf, "Q8_0")
    with llama_server(server_command(certificate, str(baked)).replace("MODEL.gguf", str(gguf)), threads=2) as running:
        found = [STEER, "fit", gguf, demo["merged"], "--server", running.url, "--json"]
        done = subprocess.run(found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)["sliders"]
    assert (row["slider"], row["warning"]) == ("moralizing:ablate", None)
    assert row["change"] > 0.2
    assert row["slope"] == pytest.approx(1, abs=FAR)
    assert 0 < row["distance"] < FAR

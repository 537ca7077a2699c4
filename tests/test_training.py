"""`steer harvest`, `steer train` and `steer features` as a user runs them, on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Outcome, command_here
from tiny_chat import WORDS, save_tiny_chat

from steer.core.dictionary_files import load_dictionary
from steer.files import locked
from steer.model.steered import load
from steer.sae.harvest import harvest
from steer.sae.shards import Harvest
from steer.sae.train import training_place

STEER = str(Path(sys.executable).with_name("steer"))
SMALL = ["--latents", "64", "--k", "4", "--batch", "64", "--dead-tokens", "2000"]


Run = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new STEER_HOME, as the library remembers every dictionary that is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; it ends with `code`."""
    command = command_here(monkeypatch, capfd)

    def checked(*arguments: object, code: int = 0) -> Outcome:
        done = command(*arguments)
        assert done.code == code, done.err
        return done

    return checked


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama) -> Path:
    """A folder with a tiny model, a text, and its harvest."""
    root = tmp_path_factory.mktemp("train")
    save_tiny_chat(tiny_llama, root / "model")
    g = torch.Generator().manual_seed(0)
    lines = []
    for n in range(400):
        picks = torch.randint(0, len(WORDS), (30,), generator=g).tolist()
        said = " ".join(WORDS[p] for p in picks)
        row = {"text": said} if n % 2 else {"messages": [{"role": "user", "content": said}]}
        lines.append(json.dumps(row))
    (root / "text.jsonl").write_text("\n".join(lines))
    harvest(load(root / "model"), root / "harvest", sites=[1], sources=str(root / "text.jsonl"))
    return root


def test_a_harvest_becomes_a_dictionary_that_sae_lens_loads(run, place, tmp_path):
    import sae_lens

    out = tmp_path / "dictionary"
    harvested = run("harvest", place / "model", tmp_path / "h", "--site", 1, "--text", place / "text.jsonl")
    assert f"Train on it: steer train {tmp_path / 'h'} dictionary" in harvested.out
    done = run("train", tmp_path / "h", out, *SMALL, "--tokens", 64 * 150, "--json")
    result = json.loads(done.out)
    assert 0 < result["fit"]["fvu"] < 1
    assert result["spliced"]["tokens"] > 0
    assert result["tokens_per_second"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["site"] == 1
    assert manifest["fit"] == result["fit"]
    assert (out / "training.csv").read_text().count("\n") > 15
    ours = load_dictionary(out)
    x = Harvest.open(place / "harvest").held_out_rows(1).float()
    theirs = sae_lens.SAE.load_from_disk(out)
    assert torch.allclose(theirs.encode(x), ours.encode(x), atol=1e-4)
    assert torch.allclose(theirs(x), ours.reconstruct(x), atol=1e-4)
    assert not out.with_name("dictionary.training").exists()


def test_two_trainings_never_share_a_state(run, place, tmp_path):
    out = tmp_path / "dictionary"
    with locked(training_place(out), "taken"):  # as a training holds it
        done = run("train", place / "harvest", out, *SMALL, "--tokens", 640, code=1)
    assert "another training is at work in it" in done.err
    assert not out.exists()


@pytest.mark.slow
def test_a_model_is_trained_on_while_it_reads(run, place, tmp_path):
    out = tmp_path / "dictionary"
    run("train", place / "model", out, "--site", 1, "--text", place / "text.jsonl", *SMALL, "--tokens", 64 * 60,
        "--buffer", 1024, "--architecture", "topk")  # fmt: skip
    assert load_dictionary(out).site == 1


@pytest.mark.slow
def test_a_parent_s_fit_is_measured_before_training_starts_from_it(run, place, tmp_path):
    run("train", place / "harvest", tmp_path / "parent", *SMALL, "--tokens", 64 * 150)
    parent = json.loads((tmp_path / "parent" / "manifest.json").read_text())["fit"]
    child = tmp_path / "child"
    done = run("train", place / "harvest", child, "--from", tmp_path / "parent", *SMALL, "--tokens", 64 * 20, "--json")
    result = json.loads(done.out)
    assert result["parent"]["fvu"] == pytest.approx(parent["fvu"], rel=0.02)
    assert result["fit"]["fvu"] < parent["fvu"] * 1.2
    text = run(
        "train", place / "harvest", tmp_path / "again", "--from", tmp_path / "parent", *SMALL, "--tokens", 640
    ).out
    assert "parent, before training" in text
    run("train", place / "harvest", tmp_path / "no", "--from", tmp_path / "parent", *SMALL[2:], "--tokens", 640, code=1)


@pytest.mark.slow
def test_sigterm_leaves_a_state_that_resume_goes_on_from(run, place, tmp_path):
    out = tmp_path / "dictionary"
    command = ["train", place / "harvest", out, *SMALL, "--tokens", 64 * 3000, "--every", "0.2"]
    process = subprocess.Popen([STEER, *map(str, command)], stderr=subprocess.PIPE, text=True)
    state = tmp_path / "dictionary.training" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume" in error.splitlines()[-1]
    assert not out.exists()
    assert "--resume" in run(*command, code=1).err
    run(*command, "--resume")
    assert load_dictionary(out).latents == 64


@pytest.mark.slow
def test_labels_are_made_listed_searched_and_shown_on_a_page(run, place, tmp_path):
    out = tmp_path / "dictionary"
    run("train", place / "harvest", out, *SMALL, "--tokens", 64 * 150)
    assert "label" in run("features", out, code=1).err
    run("features", out, "--label", place / "harvest", "--limit", 3)
    found = json.loads(run("features", out, "--search", WORDS[3], "--html", tmp_path / "page.html", "--json").out)
    assert found["labelled"] > 0
    assert all(WORDS[3] in json.dumps(f) for f in found["features"])
    page = (tmp_path / "page.html").read_text()
    assert "<script" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "trait" in run("features", out, "--trait", "moralizing", code=2).err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "{place}/harvest", "{tmp}/d", "--k", "0"], "k: expected a number above 0, found 0"),
        (["train", "{place}/harvest", "{tmp}/d", "--site", "2"], "expected one of its sites 1, found 2"),
        (["train", "{place}/harvest", "{tmp}/d", "--widths", "a,b"], "widths: expected numbers"),
        (["train", "{place}/model", "{tmp}/d"], "--site"),
        (["train", "{place}/nowhere", "{tmp}/d"], "nowhere"),
        (["train", "{place}/harvest", "{tmp}/d", "--from", "{place}/model"], "model"),
        (["harvest", "{place}/model", "{tmp}/h", "--site", "1", "--text", "{tmp}/none.txt"], "none.txt"),
        (["harvest", "{place}/model", "{tmp}/h", "--site", "9", "--text", "{place}/text.jsonl"], "9"),
        (["features", "{place}/model"], "model"),
        (["find", "{place}/model", "moralizing", "--dictionary", "{place}/model"], "model"),
    ],
)
def test_a_mistake_gets_one_line(place, tmp_path, monkeypatch, capfd, arguments, word):
    words = [a.format(place=place, tmp=tmp_path) for a in arguments]
    done = command_here(monkeypatch, capfd)(*words)
    assert done.code in (1, 2)
    lines = done.err.strip().splitlines()
    assert word in lines[-1]
    assert lines[-1].startswith("steer: ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "d").exists()

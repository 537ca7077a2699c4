"""`--dtype` on the command line: every verb that loads a model takes it, and says in one line what it computes in."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny_chat import ENDLESS, WORDS, save_tiny_chat

from steer.cli import common as cli_common
from steer.cli.main import app, main
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import save_dictionary
from steer.errors import SteerError
from steer.model import loading
from steer.model.steered import load
from steer.sae.harvest import harvest

COMMANDS = {c.name or (c.callback and c.callback.__name__): c.callback for c in app.registered_commands}
ARGUMENTS = {
    "find": ["m", "moralizing"],
    "harvest": ["m", "out", "--site", "1", "--text", "x.jsonl"],
    "train": ["m", "out", "--site", "1", "--text", "x.jsonl"],
    "features": ["d", "--label", "h", "--model", "m"],
    "bake": ["m", "out", "--ablate", "moralizing"],
    "chat": ["m"],
    "calibrate": ["m", "--profile", "p.yaml"],
    "eval": ["m", "--probes", "capability"],
    "serve": ["m", "--port", "0"],
}
"""What has each verb load the model `m`."""
ELSEWHERE = {"ui": ["m"], "demo": []}
"""Verbs whose models are loaded in other processes, or are not at hand: the variable holds for these."""


@pytest.fixture(scope="module")
def made(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bf16 checkpoint `m`, a harvest `h` and a dictionary `d` of it, a text and a profile."""
    folder = tmp_path_factory.mktemp("dtypes")
    save_tiny_chat(tiny_llama, folder / "m", dtype=torch.bfloat16, **ENDLESS)
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS[i : i + 20])}) for i in range(20)))
    (folder / "p.yaml").write_text(yaml.safe_dump({"name": "p", "sliders": []}))
    harvest(load(folder / "m"), folder / "h", sites=[1], sources=str(folder / "x.jsonl"))
    rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_dictionary(
        Dictionary("standard", rows.T.contiguous(), torch.zeros(8), rows, torch.zeros(32), site=1), folder / "d"
    )
    return folder


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command until a model is loaded, or another process would load it; what it says on stderr."""

    def stop(*_: object, **__: object) -> None:
        raise SteerError("loaded")

    monkeypatch.chdir(made)
    monkeypatch.setattr(loading, "use_fast_products", stop)
    monkeypatch.setattr(os, "execv", stop)
    monkeypatch.setattr("steer.verbs.demo.run", stop)

    def attempt(*arguments: str) -> str:
        monkeypatch.setattr(os, "environ", os.environ.copy() | {"STEER_HOME": str(made / "home")})
        monkeypatch.setattr(sys, "argv", ["steer", *arguments])
        monkeypatch.setattr(cli_common._NOTICES, "_printed", set())  # a process says a line once
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out) == (1, "")
        return err

    return attempt


def test_every_verb_that_loads_a_model_takes_a_dtype():
    taken = {name: set(inspect.signature(verb).parameters) for name, verb in COMMANDS.items() if verb is not None}
    assert {name for name, options in taken.items() if "dtype" in options} == {
        *ARGUMENTS,
        *ELSEWHERE,
        "fit",
    }  # needs a server
    assert not [n for n, options in taken.items() if {"device_map", "four_bit"} & options and "dtype" not in options]


@pytest.mark.parametrize("verb", ARGUMENTS)
@pytest.mark.parametrize(
    ("dtype", "says"),
    [("float32", "computing in float32, as asked (stored: bfloat16)"), ("stored", "computing in bfloat16, as stored")],
)
def test_what_it_computes_in_is_one_line_on_stderr(run, verb, dtype, says):
    said = [line for line in run(verb, *ARGUMENTS[verb], "--dtype", dtype).splitlines() if "computing in" in line]
    assert len(said) == 1
    assert said[0].endswith(f"m: {says}")


@pytest.mark.parametrize("verb", ELSEWHERE)
def test_models_that_others_load_are_reported(run, verb):
    assert run(verb, *ELSEWHERE[verb], "--dtype", "stored").endswith("steer: loaded\n")
    assert os.environ["STEER_DTYPE"] == "stored"


def test_a_dtype_that_there_is_not_is_bad_usage(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["steer", "chat", "m", "--dtype", "int8"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capfd.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert "'--dtype'" in err


def test_a_harvest_goes_on_in_its_own_dtype_alone(made, tmp_path, monkeypatch, capfd):
    def harvests(dtype: str) -> tuple[int, str]:
        arguments = ["harvest", str(made / "m"), str(tmp_path / "h"), "--site", "1", "--text", str(made / "x.jsonl")]
        monkeypatch.setattr(os, "environ", os.environ.copy() | {"STEER_HOME": str(tmp_path / "home")})
        monkeypatch.setattr(sys, "argv", ["steer", *arguments, "--dtype", dtype])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capfd.readouterr().err

    assert harvests("float32")[0] == 0
    assert harvests("float32")[0] == 0
    code, err = harvests("bfloat16")
    (line,) = [line for line in err.splitlines() if line.startswith("steer: ")]
    assert code == 1
    assert "expected dtype float32 as it began with, found bfloat16; give what it began with, or another output" in line

"""Train a dictionary, find a trait in it, and use its sliders by name: nothing is copied by hand."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tiny_chat import ENDLESS, WORDS, save_tiny_chat

import steer
from steer.chat.chat import Chat
from steer.chat.feature_index import FeatureIndex
from steer.chat.local import LocalBackend
from steer.chat.session import Session
from steer.checkpoint.library import Library, OnDisk, dictionaries_of, dictionary_at, register_dictionary
from steer.checkpoint.sketch import sketch_files
from steer.core.dictionary_files import FEATURES, SLIDERS
from steer.core.profile import Profile, ProfileSlider
from steer.core.trait import Trait
from steer.errors import SkippedWarning
from steer.finding.features import find_features
from steer.model.steered import load
from steer.model.steering.low_rank import encoder_rows
from steer.sae.options import TrainOptions
from steer.sae.records import FeatureRecord, write_records
from steer.sae.train import train_dictionary
from steer.serve.batching import BatchingEngine
from steer.serve.server import create_app

TRAIT = Trait(
    "lying", "s", "lie lie lie", "truth truth truth", ("lie",),
    tuple(f"{w} hello" for w in WORDS[:8]), tuple(f"{w} well" for w in WORDS[8:12]),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `m` and the dictionary `d` trained on it, under a separate STEER_HOME."""
    folder = tmp_path_factory.mktemp("journey")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_HOME", str(folder / "home"))
        save_tiny_chat(tiny_llama, folder / "m", **ENDLESS)
        draw = random.Random(0)
        rows = [json.dumps({"text": " ".join(draw.choices(WORDS, k=20))}) for _ in range(60)]
        (folder / "x.jsonl").write_text("\n".join(rows))
        harvested = steer.harvest(load(folder / "m"), folder / "h", sites=[1], sources=str(folder / "x.jsonl"))
        options = TrainOptions("topk", latents=32, k=4, batch=64, tokens=640, held_out=0.2)
        train_dictionary(harvested.place, folder / "d", options, quiet=True)
    return folder


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_HOME", str(folder / "home"))


@pytest.mark.slow
def test_a_trained_dictionary_and_its_sliders_are_found_by_name(folder: Path, tmp_path: Path) -> None:
    checkpoint, place = folder / "m", folder / "d"
    sketch = sketch_files(checkpoint)
    assert dictionaries_of(sketch) == {"m-L1-topk": place}
    model = load(checkpoint)
    write_records(place / FEATURES, [FeatureRecord(i, 0.1, 1.0, 2.0, [], [], [], []) for i in range(32)])
    find_features(model, TRAIT, place, check=False)
    (place / SLIDERS).write_text("- {name: lying-latent, latents: [3], units: [1.0], operation: add, trait: lying}\n")

    session = Session(load(checkpoint))
    session.sliders["lying-latent"] = 0.5
    session.sliders["L1/7"] = 0.5
    assert "".join(session.reply("hello"))
    assert {s.name for s in session.receipts[-1].sliders} == {"lying-latent", "L1/7"}
    assert FeatureIndex(model).dictionaries == ["m-L1-topk"]
    assert "lying-latent" in Library(OnDisk(str(checkpoint), sketch)).sliders()
    with closing(Chat(LocalBackend(load(checkpoint)), keep=False)) as page:
        assert "lying-latent" in page.sliders.known()
        assert page.panel.pin("L1/7").name == "L1/7"
    served = load(checkpoint)
    with closing(BatchingEngine(served)) as engine:
        client = TestClient(create_app(served, engine), base_url="http://localhost")
        assert "lying-latent" in {row["name"] for row in client.get("/v1/steering").json()["sliders"]}
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        steering = {"sliders": {"lying-latent": 0.5, "L1/7": 0.5}}
        reply = client.post("/v1/chat/completions", json=chat | {"steering": steering}).json()
        assert {s["name"] for s in reply["steering"]["receipt"]["sliders"]} == {"lying-latent", "L1/7"}
    profile = Profile("p", sliders=(ProfileSlider("lying-latent", 0.5),))
    steer.bake(checkpoint, tmp_path / "out", profile=profile)
    assert steer.verify(tmp_path / "out")


def test_a_dictionary_that_was_moved_is_passed_over_with_a_warning_and_comes_back_by_its_new_place(
    folder: Path, tmp_path: Path
) -> None:
    sketch, place = sketch_files(folder / "m"), folder / "d"
    moved = place.rename(tmp_path / "moved")
    try:
        with pytest.warns(SkippedWarning, match=f"{place}: expected a dictionary that was used here, found none"):
            assert dictionaries_of(sketch) == {}
        find_features(load(folder / "m"), TRAIT, moved, check=False)
        assert dictionaries_of(sketch) == {"m-L1-topk": moved}
    finally:
        moved.rename(place)
        register_dictionary(place, "m-L1-topk", sketch)


def test_a_dictionary_goes_from_memory_when_nobody_uses_it(folder: Path) -> None:
    dictionary = dictionary_at(folder / "d")
    assert dictionary_at(folder / "d") is dictionary
    rows = encoder_rows(dictionary, (1, 2), torch.device("cpu"), torch.float64)
    assert encoder_rows(dictionary, (1, 2), torch.device("cpu"), torch.float64) is rows
    gone = weakref.ref(dictionary)
    del dictionary, rows
    gc.collect()
    assert gone() is None

"""Weights that are not where, or not what, the files hold: spread by `device_map`, offloaded, in 4 bits.

What a machine without a GPU has of devices are memory and disk; accelerate's hooks bring each block's weights to where
it runs, as they do between GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_chat import hooks_on, keep_direction, save_tiny_chat

from steer.checkpoint.sketch import sketch_files
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.core.schedule import Schedule
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.model import loading
from steer.model.steered import SteeredModel, load
from steer.model.steering.receipts import Tally

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
SPREADS = {
    "the last block on disk": {**dict.fromkeys(PARTS, "cpu"), **{f"model.layers.{i}": "cpu" for i in range(2)},
                               "model.layers.2": "disk"},
    "all but the first block on disk, the embedding too": {**dict.fromkeys(PARTS, "disk"), "model.layers.0": "cpu",
                                                           "model.layers.1": "disk", "model.layers.2": "disk"},
}  # fmt: skip
GREEDY = Sampler(temperature=0.0, max_new_tokens=12)


@pytest.fixture(params=SPREADS)
def spread(request: pytest.FixtureRequest, chat_checkpoint: Path, tmp_path: Path) -> SteeredModel:
    """The tiny model in fp64, parts of it on disk."""
    place = {"device_map": SPREADS[request.param], "offload_folder": str(tmp_path / "offload")}
    model = load(chat_checkpoint, dtype=torch.float64, **place)
    assert any(p.device.type == "meta" for p in model.hf.parameters())
    return model


@pytest.mark.parametrize("operation", ["add", "ablate", "clamp", "cap", "scale"])
def test_sliders_do_the_same_on_offloaded_weights(spread, model64, moral, ids, operation):
    amount = {"add": 0.8, "ablate": 0.7, "clamp": -0.4, "cap": 0.1, "scale": -1.5}[operation]
    whole, later = Slider(moral, operation), Slider(moral.at(2), operation, when=Schedule("reply"))
    with torch.inference_mode():
        for sliders in ({whole: amount}, {later: amount}) if operation != "ablate" else ({whole: amount},):
            found = []
            for model in (spread, model64):
                assert model.device == torch.device("cpu")
                with model.steered(sliders):
                    found.append(model.hf(ids).logits)
            torch.testing.assert_close(*found, rtol=0, atol=1e-12)
            assert not torch.equal(found[0], spread.hf(ids).logits)


def test_an_offloaded_model_knows_its_sliders_and_writes_the_same_replies(chat_checkpoint, tmp_path, known_moral):
    kept = load(chat_checkpoint, dtype=torch.float64)
    map_ = SPREADS["the last block on disk"]
    moved = load(chat_checkpoint, dtype=torch.float64, device_map=map_, offload_folder=str(tmp_path / "offload"))
    assert moved.sketch().same_as(kept.sketch())
    of_accelerate = hooks_on(moved)
    said, receipts = [], []
    for model in (kept, moved):
        model.sliders["moral"] = -0.8
        tally = Tally()
        said.append("".join(model.stream("abab", sampler=GREEDY, tally=tally)))
        receipts.append(tally.receipt().describe())
        model.sliders.clear()
    assert said[0] == said[1]
    assert receipts[0] == receipts[1]
    assert hooks_on(moved) == of_accelerate


WIDE = 128
"""Of the tiny model that is quantised: bitsandbytes shares a scale between 64 weights."""


@pytest.fixture
def wide(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that is wide enough to quantise."""
    return save_tiny_chat(tiny_llama, tmp_path / "wide", hidden_size=WIDE, intermediate_size=2 * WIDE, head_dim=32)


@pytest.fixture
def in_four_bits(wide: Path) -> SteeredModel:
    """It as bitsandbytes quantises it."""
    pytest.importorskip("bitsandbytes")
    model = load(wide, four_bit=True)
    assert any(p.dtype == torch.uint8 for p in model.hf.parameters())
    return model


def test_sliders_hold_on_four_bit_weights(in_four_bits, make_direction, ids):
    # The fixture's norm is that of a narrower stream, beyond ten times which tokens are left alone.
    moral = replace(make_direction(width=WIDE), residual_norm=50.0)
    r = (moral.vector / moral.vector.norm()).double()

    def readings(site: int, sliders: dict[Slider, float]) -> torch.Tensor:
        with torch.inference_mode(), in_four_bits.steered(sliders), in_four_bits.record([site]) as seen:
            in_four_bits.hf(ids)
        return seen[site].double() @ r

    plain = readings(1, {})
    clamped = readings(1, {Slider(moral, "clamp"): -0.5})
    added = readings(1, {Slider(moral): 0.5})
    ablated = readings(2, {Slider(moral, "ablate"): 1.0})
    scale = float(plain.abs().max())
    wanted = moral.without_mean - 0.5 * moral.gap
    torch.testing.assert_close(clamped, torch.full_like(clamped, wanted), rtol=0, atol=1e-4)
    torch.testing.assert_close(added, plain + 0.5 * moral.gap, rtol=0, atol=1e-4)
    assert float(ablated.abs().max()) < 1e-4 * scale
    assert hooks_on(in_four_bits) == 0


def test_four_bit_weights_are_still_their_checkpoint(in_four_bits, wide, make_direction, tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    keep_direction(wide, make_direction("moral", width=WIDE))
    # So a direction that was found in 4 bits is baked into the weights that were not.
    assert in_four_bits.sketch().same_as(sketch_files(wide))
    in_four_bits.sliders["moral"] = -0.8
    tally = Tally()
    assert "".join(in_four_bits.stream("abab", sampler=GREEDY, tally=tally))
    assert [s.name for s in tally.receipt().sliders] == ["moral"]
    assert not tally.receipt().warnings


def test_each_row_of_four_bit_weights_has_its_own(in_four_bits, make_direction, ids):
    moral = make_direction(width=WIDE)
    edits = [None, Edit(add=((moral, 0.7),)), Edit(ablate=(moral,))]
    rows = ids[:1].expand(3, -1)
    with torch.inference_mode():
        with in_four_bits.steering.applied(edits):
            together = in_four_bits.hf(rows).logits
        for edit, row in zip(edits, together, strict=True):
            with in_four_bits.steering.applied([edit]):
                alone = in_four_bits.hf(rows).logits[0]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_four_bits_without_the_package_say_what_to_install(chat_checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="expected the package bitsandbytes, found none; pip install bitsandbytes"):
        load(chat_checkpoint, four_bit=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_one_line(chat_checkpoint):
    with pytest.raises(UsageError, match="device map cuda:1: expected a GPU that torch can use, found none"):
        load(chat_checkpoint, device_map="cuda:1")

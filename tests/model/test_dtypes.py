"""What a model computes in: fast on this CPU where that fits, as stored otherwise, and said in one line."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat

from steer.checkpoint import dtypes
from steer.checkpoint.dtypes import DTYPES, computing_in, is_fast, slowdown
from steer.cli import common as cli_common
from steer.errors import UsageError
from steer.model.steered import load
from steer.sae.objectives import settled
from steer.sae.options import TrainOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def narrow(request, tiny_llama, tmp_path_factory) -> tuple[str, torch.dtype]:
    """A tiny checkpoint of 16 bits a weight."""
    place = save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("narrow") / "model", dtype=request.param)
    return str(place), request.param


@pytest.fixture
def slow(monkeypatch):
    """A CPU that multiplies 16 bits forty times slower than 32, whatever this one does."""
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: 40.0)
    monkeypatch.delenv(dtypes.VARIABLE, raising=False)


@pytest.fixture
def fast(monkeypatch):
    """A CPU with instructions for 16 bits that are twice as fast."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "amx_fp16": True})
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: 0.5)
    monkeypatch.delenv(dtypes.VARIABLE, raising=False)


@pytest.mark.usefixtures("slow")
def test_a_model_runs_in_float32_where_its_own_dtype_is_slow(narrow, caplog):
    place, stored = narrow
    caplog.set_level(logging.INFO, "steer")
    model = load(place, device_map="cpu")
    assert model.hf.dtype == model.hf.config.dtype == torch.float32
    name = dtypes.dtype_name(stored)
    assert f"{place}: computing in float32: this CPU has no fast {name} (stored: {name})" in caplog.messages


@pytest.mark.usefixtures("fast")
def test_a_model_keeps_its_dtype_where_that_is_fast(narrow):
    place, stored = narrow
    assert load(place, device_map="cpu").hf.dtype == stored


@pytest.mark.usefixtures("slow")
def test_the_dtype_asked_for_goes_before_the_rule(narrow, monkeypatch):
    place, stored = narrow
    assert load(place, device_map="cpu", dtype="stored").hf.dtype == stored
    assert load(place, device_map="cpu", dtype="bfloat16").hf.dtype == torch.bfloat16
    assert load(place, device_map="cpu", dtype=torch.float64).hf.dtype == torch.float64
    monkeypatch.setenv(dtypes.VARIABLE, "float16")
    assert load(place, device_map="cpu").hf.dtype == torch.float16
    assert load(place, device_map="cpu", dtype="auto").hf.dtype == torch.float32


@pytest.mark.usefixtures("slow")
def test_without_room_for_float32_the_stored_dtype_stays_and_its_cost_is_said(narrow, monkeypatch, caplog):
    place, stored = narrow
    weights = sum(p.numel() for p in load(place, device_map="cpu").hf.parameters())
    for free, expected in ((4 * weights * 1.05, stored), (4 * weights * 1.2, torch.float32)):
        monkeypatch.setattr(dtypes.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert load(place, device_map="cpu").hf.dtype == expected
    (line,) = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "float32 needs" in r.msg % r.args
    ]
    assert "40 times as long as float32's on this CPU" in line


@pytest.mark.usefixtures("slow")
def test_what_a_gpu_runs_keeps_its_dtype(narrow):
    place, stored = narrow
    for there in ("cuda:0", 0, {"": torch.device("cuda")}, {"model.embed_tokens": "cpu", "model.layers": 0}):
        assert computing_in(place, device_map=there).dtype == stored
    for here in ("cpu", torch.device("cpu"), {"": "cpu"}, {"model.embed_tokens": "disk", "model.layers": "cpu"}):
        assert computing_in(place, device_map=here).dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "which"),
    [(torch.float8_e4m3fn, "proj.weight"), (torch.float8_e4m3fn, "weight"), (torch.bfloat16, "weight")],
)
@pytest.mark.usefixtures("fast")
def test_fp8_in_the_config_is_computed_in_what_holds_its_numbers(tiny_llama, tmp_path, change_config, stored, which):
    """`stored`: the dtype in the file, of the tensors whose names end in `which`."""
    place = save_tiny_chat(tiny_llama, tmp_path / "m", dtype=torch.bfloat16)
    tensors = load_file(place / "model.safetensors")
    changed = {n: t.to(stored) for n, t in tensors.items() if n.endswith(which)}
    save_file(tensors | changed, place / "model.safetensors", metadata={"format": "pt"})
    change_config(place, dtype="float8_e4m3fn")
    hf = load(place, device_map="cpu").hf
    assert hf.dtype == torch.bfloat16
    for name, tensor in changed.items():
        assert torch.equal(hf.get_parameter(name), tensor.bfloat16())
    assert hf(input_ids=torch.tensor([[1, 5, 7]])).logits.isfinite().all()


@pytest.mark.usefixtures("slow")
def test_the_dtype_of_files_whose_config_names_none_is_that_of_their_weights(narrow, tmp_path):
    place, stored = narrow
    for file in Path(place).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    assert computing_in(str(tmp_path), "stored").dtype == stored
    assert computing_in(str(tmp_path), device_map="cpu").dtype == torch.float32


@pytest.mark.usefixtures("slow")
def test_four_bit_weights_are_widened_to_what_is_fast(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    place = save_tiny_chat(
        tiny_llama, tmp_path / "wide", hidden_size=128, intermediate_size=256, head_dim=32, dtype=torch.bfloat16
    )
    model = load(place, device_map="cpu", four_bit=True)
    assert model.hf.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    assert model.hf.dtype == torch.float32


def test_an_unknown_dtype_is_one_line(narrow):
    for wrong in ("int8", "bf16", "load", torch.int32):
        with pytest.raises(UsageError, match="dtype: expected one of auto, float32, bfloat16, float16, stored, found"):
            load(narrow[0], dtype=wrong)


def test_training_goes_by_the_same_rule_and_keeps_what_it_began_with(monkeypatch):
    options = TrainOptions()
    for fast, products in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("steer.sae.objectives.is_fast", lambda dtype, device, fast=fast: fast)
        assert settled(options, CPU).products == products
        assert settled(settled(options, CPU), CPU).products == products


@pytest.mark.slow
def test_instructions_that_libraries_are_kept_from_do_not_count():
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    probe = (
        "import torch; from steer.checkpoint import dtypes; able = {'amx_bf16': True}; "
        "torch.cpu.get_capabilities = lambda: able; print(dtypes.is_fast(torch.bfloat16, torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_gpu_and_wide_dtypes_are_never_timed(monkeypatch):
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: pytest.fail("was timed"))
    assert is_fast(torch.bfloat16, torch.device("cuda"))
    assert is_fast(torch.float32, CPU)
    assert is_fast(torch.float64, CPU)


def test_a_product_is_timed_once():
    assert slowdown(torch.bfloat16) > 0
    before = slowdown.cache_info().misses
    slowdown(torch.bfloat16)
    assert slowdown.cache_info().misses == before


def test_the_command_line_takes_the_dtypes_that_loading_takes():
    assert get_args(get_args(get_args(cli_common.Dtype)[0])[0]) == DTYPES

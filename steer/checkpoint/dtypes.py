"""Chooses the dtype a model computes in: the stored one, or fp32 if the CPU is slow at the stored one.

A CPU without instructions for bf16 or fp16 converts every number in software: with AVX2 alone, a matrix product takes
nine times as long as in fp32 on one thread, and ninety times on two. `steer.model` asks `computing_in` before it loads
a checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from steer.checkpoint.reader import INDEX, SINGLE, Shard
from steer.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16", "stored")
"""Values of `--dtype`; `auto` is the rule of this file."""
VARIABLE = "STEER_DTYPE"
"""Environment variable with the dtype of models that are loaded without one; `--dtype` sets it."""
NO_SLOWER = 1.25
"""A dtype counts as fast if its product takes at most this many times as long as in fp32, because it moves half the
bytes."""
ROOM = 1.1
"""Free memory needed to load weights in fp32, as a multiple of their size: activations need some too."""

_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "avx10_2", "avx_ne_convert", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "avx10_1", "avx10_2", "fp16_arith"),
}
"""Names in `torch.cpu.get_capabilities`. A CPU that multiplies the dtype fast has at least one of them."""
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_FP8 = ("F8_E4M3", "F8_E5M2")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computing:
    """The dtype that a checkpoint computes in, and why."""

    dtype: torch.dtype | None
    """None if the files do not name one; transformers then decides."""
    reason: str
    """One line for the user."""
    costly: bool = False
    """Whether the model computes slowly because fp32 weights do not fit into memory."""


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in `dtype` are no slower than fp32 ones on `device`. Every GPU counts as fast.

    A CPU must have the instructions, and a product is timed once per process, because libraries can be kept from using
    instructions that the CPU has, as with ONEDNN_MAX_CPU_ISA.
    """
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    # Versions of torch before 2.11 do not list the instructions; the time alone decides there.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    able = not known or any(known.get(name) for name in _INSTRUCTIONS[dtype])
    return able and slowdown(dtype) <= NO_SLOWER


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in `dtype` on this CPU, divided by the time of the same product in fp32. Measuring takes
    some 30 ms.

    Measured as one thread's CPU time: on a busy machine two threads wait 8 ms for each other in a product of 0.4 ms,
    and wall-clock time would include other processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {}
    try:
        for t in (torch.float32, dtype):
            product = partial(F.linear, torch.ones(64, 512, dtype=t), torch.ones(512, 512, dtype=t))
            best[t] = min(timeit.repeat(product, timer=time.thread_time, number=1, repeat=7))
    finally:
        torch.set_num_threads(threads)
    return best[dtype] / best[torch.float32]


def computing_in(
    place: str,
    dtype: str | torch.dtype | None = None,
    *,
    device_map: Any = None,
    quantised: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> Computing:
    """The dtype in which the checkpoint at `place` (a directory or hub id) computes.

    `dtype` is a torch dtype, its name, `stored`, or `auto`: on a CPU the stored dtype if that is fast, else fp32 if
    that fits into memory. None means $STEER_DTYPE, or `auto` without it. `quantised` weights are not converted, so
    memory is not checked for them. `hub` holds transformers' options for finding a hub id's files (revision, token,
    ...).
    Errors: UsageError for an unknown name.
    """
    asked = parse_dtype(os.environ.get(VARIABLE) or "auto" if dtype is None else dtype)
    files = cache(lambda: _shards(place, hub or {}))
    stored = _stored_dtype(place, files, hub or {})
    if isinstance(asked, torch.dtype):
        return Computing(asked, f"computing in {dtype_name(asked)}, as asked (stored: {dtype_name(stored)})")
    if asked == "stored" or stored is None or not _on_cpu(device_map) or is_fast(stored, torch.device("cpu")):
        return Computing(stored, f"computing in {dtype_name(stored)}, as stored")
    shards = [] if quantised else files()
    # fp8 weights are floating point once loaded; their few scales hardly matter.
    counted = [t for s in shards for t in s.tensors if t.dtype in (*_STORED, *_FP8)]
    needed = sum(math.prod(t.shape) for t in counted) * torch.float32.itemsize * ROOM
    free = psutil.virtual_memory().available
    if needed > free:
        return Computing(
            stored,
            f"computing in {dtype_name(stored)}, whose products take {slowdown(stored):.0f} times as long as float32's "
            f"on this CPU: float32 needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or try "
            "--four-bit",
            costly=True,
        )
    return Computing(
        torch.float32, f"computing in float32: this CPU has no fast {dtype_name(stored)} (stored: {dtype_name(stored)})"
    )


def announce(computing: Computing, name: str) -> None:
    """Log the reason in one line: as a warning if the choice makes the model slow, else as information, which the
    command line prints."""
    _log.log(logging.WARNING if computing.costly else logging.INFO, "%s: %s", name, computing.reason)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A floating dtype, or `auto` or `stored`. Errors: UsageError for anything else."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if dtype in ("auto", "stored"):
        return dtype
    raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")


def dtype_name(dtype: torch.dtype | None) -> str:
    """The dtype's name in messages and records, e.g. `bfloat16`."""
    return "the stored dtype" if dtype is None else str(dtype).removeprefix("torch.")


def _on_cpu(device_map: Any) -> bool:
    """Whether the CPU computes under this device map. Weights offloaded to the CPU or the disk are computed by a
    GPU."""
    if device_map is None:
        return not torch.cuda.is_available()
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if any(p in ("auto", "balanced", "balanced_low_0", "sequential") for p in places):
        return not torch.accelerator.is_available()
    return all(str(p).partition(":")[0] in ("cpu", "disk") for p in places)


def _shards(place: str, hub: Mapping[str, Any]) -> list[Shard]:
    """The weight files. Those of a hub id are downloaded, as loading would do next. Empty for files of other
    formats."""
    single, index = (cached_file(place, f, _raise_exceptions_for_missing_entries=False, **hub) for f in (SINGLE, INDEX))
    files = [single] if single else get_checkpoint_shard_files(place, index, **hub)[0] if index else []
    return [Shard.open(Path(str(f))) for f in files or ()]


def _stored_dtype(place: str, files: Callable[[], list[Shard]], hub: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that transformers would find: the one in config.json, else that of the first floating tensor. Nothing
    computes in fp8, all of whose numbers bf16 holds."""
    config = json.loads(Path(str(cached_file(place, "config.json", **hub))).read_text(encoding="utf-8"))
    named = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if found in _STORED.values():
        return found
    dtypes = {t.dtype for s in files() for t in s.tensors}
    first = next((_STORED[t.dtype] for s in files() for t in s.tensors if t.dtype in _STORED), None)
    return torch.bfloat16 if first is None and not dtypes.isdisjoint(_FP8) else first

"""Which dtype a model computes in: the stored one, or fp32 on a CPU that multiplies the stored one slowly.

A CPU without instructions for bf16 or fp16 widens every number in software: with AVX2 alone a matrix product takes
nine times as long as in fp32 on one thread, ninety on two.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from steer.errors import UsageError
from steer.weights.stream import INDEX, SINGLE, Shard

DTYPES = ("auto", "float32", "bfloat16", "float16", "stored")
"""What `--dtype` takes; `auto` is the rule of this file."""
VARIABLE = "STEER_DTYPE"
"""The environment variable that decides for models that are loaded without a dtype; `--dtype` sets it."""
NO_SLOWER = 1.25
"""A dtype is fast if its product takes at most so many times as long as in fp32: it moves half the bytes."""
ROOM = 1.1
"""Free memory that fp32 weights must leave, as a multiple of their size: what is computed needs some too."""

_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "avx10_2", "avx_ne_convert", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "avx10_1", "avx10_2", "fp16_arith"),
}
"""Names in `torch.cpu.get_capabilities`, of which a CPU that multiplies a dtype fast has one."""
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computing:
    """What a checkpoint computes in once it is loaded."""

    dtype: torch.dtype | None
    """None where the files do not say; transformers decides then."""
    reason: str
    """One line for the user."""
    costly: bool = False
    """Whether it is slow for want of memory."""


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in `dtype` are no slower than fp32 ones on `device`. Every GPU counts as fast.

    On a CPU its instructions must allow it, and a product is timed, once a process: libraries can be kept from
    instructions that the CPU has, as by ONEDNN_MAX_CPU_ISA.
    """
    if device.type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    # Versions of torch before 2.11 do not list them; the time decides alone there.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    able = not known or any(known.get(name) for name in _INSTRUCTIONS[dtype])
    return able and slowdown(dtype) <= NO_SLOWER


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in `dtype` on this CPU, as a multiple of the same product in fp32; takes some 30 ms.

    One thread, and its own time: on a busy machine two wait for each other 8 ms in a product of 0.4, and the clock
    on the wall counts other processes.
    """
    pairs = {t: (torch.ones(64, 512, dtype=t), torch.ones(512, 512, dtype=t)) for t in (torch.float32, dtype)}
    best = dict.fromkeys(pairs, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(7):
                for t, (x, weight) in pairs.items():
                    start = time.thread_time()
                    F.linear(x, weight)
                    best[t] = min(best[t], time.thread_time() - start)
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
    """What the checkpoint at `place` (a directory or hub id) computes in when `dtype` is asked for.

    `dtype` is a torch dtype, its name, `stored`, or `auto`: on a CPU the stored dtype where that is fast, else fp32
    where that fits into memory. None is what $STEER_DTYPE says, else `auto`. `quantised` weights stay as small as
    they are. `hub` are options of transformers that find a hub id's files (revision, token, ...).
    Errors: UsageError for an unknown name.
    """
    asked = parse_dtype(os.environ.get(VARIABLE) or "auto" if dtype is None else dtype)
    files = cache(lambda: _shards(place, hub or {}))
    stored = _stored_dtype(place, files, hub or {})
    if isinstance(asked, torch.dtype):
        return Computing(asked, f"computing in {dtype_name(asked)}, as asked (stored: {dtype_name(stored)})")
    if asked == "stored" or stored is None or not _on_cpu(device_map) or is_fast(stored, torch.device("cpu")):
        return Computing(stored, f"computing in {dtype_name(stored)}, as stored")
    needed = 0 if quantised else sum(map(_elements, files())) * torch.float32.itemsize * ROOM
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
    """Log the one line: the verbs print it, Python shows it where it costs time, or where logging is set up."""
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
    """As in messages and records, e.g. `bfloat16`."""
    return "the stored dtype" if dtype is None else str(dtype).removeprefix("torch.")


def _on_cpu(device_map: Any) -> bool:
    """Whether a device map has the CPU compute; what is offloaded to it, or to the disk, a GPU computes."""
    if device_map is None:
        return not torch.cuda.is_available()
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if any(p in ("auto", "balanced", "balanced_low_0", "sequential") for p in places):
        return not torch.accelerator.is_available()
    return all(str(p).partition(":")[0] in ("cpu", "disk") for p in places)


def _shards(place: str, hub: Mapping[str, Any]) -> list[Shard]:
    """The weight files; those of a hub id are fetched, which loading would do next. Empty for files of other kinds."""
    if cached_file(place, SINGLE, _raise_exceptions_for_missing_entries=False, **hub) is not None:
        files = [cached_file(place, SINGLE, **hub)]
    elif (index := cached_file(place, INDEX, _raise_exceptions_for_missing_entries=False, **hub)) is not None:
        files, _ = get_checkpoint_shard_files(place, index, **hub)
    else:
        return []
    return [Shard.open(Path(str(f))) for f in files or ()]


def _stored_dtype(place: str, files: Callable[[], list[Shard]], hub: Mapping[str, Any]) -> torch.dtype | None:
    """As transformers finds it: what config.json says, else the first floating tensor."""
    config = json.loads(Path(str(cached_file(place, "config.json", **hub))).read_text(encoding="utf-8"))
    named = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    return next((_STORED[t.dtype] for s in files() for t in s.tensors if t.dtype in _STORED), None)


def _elements(shard: Shard) -> int:
    """Numbers that are floating once they are loaded; fp8 is, its scales are few."""
    return sum(math.prod(t.shape) for t in shard.tensors if t.dtype in (*_STORED, "F8_E4M3", "F8_E5M2"))

"""How fast `steer kin` compares tunes, beside reading the same files; and its memory.

    python tests/bench/kin.py [--models 3] [--blocks 1] [--rounds 3] [--json]

A random Llama of 0.6 GB in bf16 and tunes of it (other low bits) are written to a temporary directory first and removed
at the end. A round reads all files by one thread, 16 MB at a time, and compares the models, in turn: from the disk, its
pages dropped before, and with every page in memory. Figures are medians of the rounds' ratios. The comparison runs
in a separate process, which measures it without its imports, and its memory above what the imports take.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from bake import checkpoint, median_ratio, warm

BARS = {"rate / reading": 0.7, "rate / reading, files in memory": 0.7, "GB of memory": 0.5}
COMPARE = """
import json, resource, sys, time
import steer
base, *models = sys.argv[1:]
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
found = steer.kin(*models, base=base)
seconds = time.perf_counter() - start
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, found.bytes_read]))
"""


def main(
    models: Annotated[int, typer.Option(help="Tunes beside the base.")] = 3,
    blocks: Annotated[int, typer.Option(help="Blocks of the checkpoints; one is 0.6 GB.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds, three at least for a figure to count.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary directory goes.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print the rates and the memory, each beside its bar."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        places = [Path(name) / f"model-{n}" for n in range(models + 1)]
        made = multiprocessing.get_context("spawn").Process(target=family, args=(places, blocks))
        made.start()
        made.join()
        os.sync()
        states = {"": False, ", files in memory": True}
        seconds: dict[str, list[float]] = {f"{what}{state}": [] for state in states for what in ("reading", "kin")}
        memory, size = 0, 0
        for _ in range(rounds):
            for state, wanted in states.items():
                for place in places:
                    warm(place, wanted)
                seconds[f"reading{state}"].append(read(places))
                for place in places:
                    warm(place, wanted)
                took, peak, size = compared(places)
                seconds[f"kin{state}"].append(took)
                memory = max(memory, peak)
    figures = {f"rate / reading{s}": median_ratio(seconds[f"reading{s}"], seconds[f"kin{s}"]) for s in states}
    figures["GB of memory"] = memory / 1e9
    wall = {name: statistics.median(s) for name, s in seconds.items()}
    if as_json:
        rows = {name: {"figure": f, "bar": BARS[name]} for name, f in figures.items()}
        print(json.dumps({"bytes": size, "load": os.getloadavg()[0], "seconds": wall, "rounds": seconds, **rows}))
        return
    print(f"{size / 1e9:.1f} GB in {models + 1} models; load of the machine at the end {os.getloadavg()[0]:.1f}")
    for name, s in wall.items():
        print(f"{name:32} {s:7.2f} s   {size / s / 1e9:5.2f} GB/s")
    for name, figure in figures.items():
        print(f"{name:32} {figure:7.2f}     bar at {'most' if name.startswith('GB') else 'least'} {BARS[name]:g}")


def read(places: list[Path]) -> float:
    """Seconds to read all weights into one buffer."""
    buffer, start = bytearray(1 << 24), time.perf_counter()
    for place in places:
        for path in sorted(place.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass
    return time.perf_counter() - start


def compared(places: list[Path]) -> tuple[float, int, int]:
    """(seconds, bytes of memory, bytes read) of a comparison."""
    command = [sys.executable, "-c", COMPARE, *map(str, places)]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def family(places: list[Path], blocks: int) -> None:
    """A checkpoint, and copies of it in which each number's lowest two bits are others."""
    import numpy as np

    from steer.checkpoint.reader import Shard

    checkpoint(places[0], places[0].with_suffix(".safetensors"), blocks)
    rng = np.random.default_rng(0)
    for place in places[1:]:
        shutil.copytree(places[0], place)
        for path in place.glob("*.safetensors"):
            numbers = np.memmap(path, np.uint16, "r+", offset=len(Shard.open(path).header))
            for at in range(0, len(numbers), 1 << 24):
                part = numbers[at : at + (1 << 24)]
                part ^= rng.integers(0, 4, len(part), np.uint16)


if __name__ == "__main__":
    typer.run(main)

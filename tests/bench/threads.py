"""How long the same steps take beside a busy process, by how many threads there are and how they wait for each other.

    python tests/bench/threads.py [--model demo/merged] [--json]

A process each: the model writes one text, then 48 at once, alone and beside a process that keeps one core busy. Figures
are multiples of the time that two threads take alone when they wait as libgomp (torch's OpenMP) does by default.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer

POLICIES: dict[str, dict[str, str]] = {
    "2 threads, default": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, 1,000 spins": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "2 threads, 10,000 spins": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000"},
    "2 threads, 100,000 spins": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "100000"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    as_json: Annotated[bool, typer.Option("--json")] = False,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Print the table."""
    if child:
        print(json.dumps(steps(model)))
        return
    table: dict[str, dict[str, dict[str, float]]] = {}
    for policy, variables in POLICIES.items():
        table[policy] = {"alone": measured(model, variables)}
        busy = multiprocessing.Process(target=spin, daemon=True)
        busy.start()
        table[policy]["beside a busy process"] = measured(model, variables)
        busy.kill()
        busy.join()
    base = table["2 threads, default"]["alone"]
    ratios = {p: {c: {k: t / base[k] for k, t in s.items()} for c, s in row.items()} for p, row in table.items()}
    if as_json:
        print(json.dumps({"seconds": table, "ratios": ratios}, indent=2))
        return
    for policy, row in ratios.items():
        shown = "; ".join(f"{c}: {', '.join(f'{k} {t:.2f}' for k, t in s.items())}" for c, s in row.items())
        print(f"{policy:26} {shown}")


def measured(model: str, variables: dict[str, str]) -> dict[str, float]:
    """What a process with these variables measures."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    made = subprocess.run(
        [sys.executable, __file__, "--model", model, "--child"],
        env=plain | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(made.stdout)


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def steps(model: str) -> dict[str, float]:
    """Median seconds of a step of one text, and of one of 48."""
    import torch

    import steer
    from steer.core.sampler import Sampler
    from steer.model.decode import decode, generate

    live = steer.load(model, dtype=torch.float32)
    prompt = torch.randint(live.anatomy.width, (48, 30), generator=torch.Generator().manual_seed(0)).tolist()
    live.end_token_ids = frozenset()
    taken: list[float] = []
    last = time.perf_counter()

    def tick(_: object = None) -> None:
        nonlocal last
        now = time.perf_counter()
        taken.append(now - last)
        last = now

    out = {}
    for step in decode(live, prompt[:1], Sampler(max_new_tokens=40)):
        tick(step)
    out["one text"] = statistics.median(taken[5:])
    taken.clear()
    generate(live, prompt, Sampler(max_new_tokens=14), on_tokens=tick)
    out["48 texts"] = statistics.median(taken[2:])
    return out


if __name__ == "__main__":
    typer.run(main)

"""The quick search for a trait: how long the whole process takes, and how far its slider moves the trait.

    python tests/bench/find.py [--model demo/merged] [--trait moralizing --trait compliance] [--json]

The processor's seconds are user and system time over two: the wall's on two cores that nobody else uses. The effect is
the change of the shipped scorer's mean probability from amount -1 to 1 on held-out topics; beside it that of the
direction that ships, which the full search found.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import steer
from steer.checkpoint.shipped import DICTIONARIES
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.measure.harness import answers
from steer.measure.scorer import Scorer

SECONDS, SHARE = 90.0, 0.8
"""The bars: of the whole process, and of the full way's effect."""
TOPICS, TOKENS = 16, 48


def main(
    model: Annotated[str, typer.Option(help="The default merge.")] = "demo/merged",
    trait: Annotated[list[str] | None, typer.Option(help="Traits that ship with a direction.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure and print."""
    rows = [measured(model, name) for name in trait or ("moralizing", "compliance")]
    for row in rows if not as_json else ():
        missed = "" if row["cpu_s"] <= SECONDS and row["share"] >= SHARE else "  MISSES"
        print(
            f"{row['trait']}: {row['cpu_s']:.0f} s of two cores (bar {SECONDS:.0f}), clock {row['wall_s']:.0f} s; "
            f"effect {row['effect']:.2f}, {row['share']:.2f} of the full way's (bar {SHARE}); "
            f"{row['verdict']}{missed}"
        )
    if as_json:
        print(json.dumps(rows, indent=2))


def measured(model: str, trait: str) -> dict[str, Any]:
    """Find one trait in a separate process, and compare its slider with the one that ships."""
    (full,) = (Direction.load(p) for p in DICTIONARIES.glob(f"*default-merge/directions/{trait}.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quick.safetensors"
        find = [sys.executable, "-m", "steer.cli.main", "find", model, trait, "--quick", "--json", "--out", str(file)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        found = json.loads(subprocess.run(find, check=True, capture_output=True, text=True).stdout)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        quick = Direction.load(file)
    scorer = Scorer.shipped(trait)
    edits = [Edit(add=((direction, amount),)) for direction in (quick, full) for amount in (-1.0, 1.0)]
    topics, sampler = scorer.trait.held_out[:TOPICS], replace(MEASURE, max_new_tokens=TOKENS)
    means = [a.scores.probability for (a,) in answers(steer.load(model), [scorer], [topics], edits, sampler)]
    effect, reached = means[1] - means[0], means[3] - means[2]
    return {
        "trait": trait, "wall_s": wall, "cpu_s": cpu / 2, "site": quick.site, "full_site": full.site, "means": means,
        "effect": effect, "full": reached, "share": effect / reached, "verdict": found["verdict"]["says"],
        "found": found,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

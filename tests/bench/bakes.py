"""What a bake of a trait does to replies, beside the untouched model: as a checkpoint, as an adapter, norm-preserving.

    python tests/bench/bakes.py [--model demo/merged] [--trait moralizing] [--json]

Each is written and verified through the commands, then loaded from its files as others load it: a checkpoint through
transformers, an adapter through peft on its source. Rates are on held-out topics by a scorer that sees words alone,
divergences on the source's replies to held-out neutral prompts, perplexity on plain prose; 95 % bootstrap intervals.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import steer
from steer.core.trait import Trait
from steer.finding.traits import contrast_for
from steer.measure.scorer import Scorer
from steer.measure.search.held_out import HeldOut, intervals, load_exported
from steer.progress import bar
from steer.verbs.tables import interval

STEER = str(Path(sys.executable).with_name("steer"))
BAKES: dict[str, tuple[str, ...]] = {
    "--as checkpoint": (),
    "--as adapter": ("--as", "adapter"),
    "--norm-preserving": ("--norm-preserving",),
    "--method biprojected": ("--method", "biprojected"),
}


def main(
    model: Annotated[str, typer.Option(help="A checkpoint.")] = "demo/merged",
    trait: Annotated[str, typer.Option(help="What is baked out of it.")] = "moralizing",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print the rate of the trait, KL and perplexity of each."""
    source = steer.load(model)
    scorer = Scorer.train(contrast_for(source, Trait.load(trait)))
    with bar("measuring", None, "tokens") as advance, tempfile.TemporaryDirectory() as folder:
        held_out = HeldOut(source, scorer, {}, on_tokens=advance)
        figures: dict[str, dict[str, Any]] = {"untouched": intervals(held_out.measure(source))}
        del source  # one checkpoint at a time
        for name, options in BAKES.items():
            out = Path(folder) / "out"
            run("bake", model, str(out), "--ablate", trait, *options, "--json")
            run("verify", str(out), *(("--source", model) if "adapter" in options else ()), "--json")
            figures[name] = intervals(held_out.measure(load_exported(out, Path(model))))
            shutil.rmtree(out)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{trait:22}{'rate':>20}{'KL':>24}{'perplexity':>24}")
    for name, m in figures.items():
        cells = [interval(m[key], digits) for key, digits in (("rate", 2), ("kl", 3), ("perplexity", 1))]
        print(f"{name:22}{cells[0]:>20}{cells[1]:>24}{cells[2]:>24}")


def run(*command: str) -> None:
    """A command of steer's. Errors: CalledProcessError, after its own word on stderr."""
    subprocess.run([STEER, *command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    typer.run(main)

"""How far figures move with the seed and the arithmetic: `find` and the dose response for several of both.

    python examples/spread.py MODEL OUT [--seeds 0,1,2,3,4] [--dtypes float32,bfloat16-rounded] [--only 0,float32]

Writes OUT/TRAIT-SEED-DTYPE.json for each run and OUT/summary.json over all there are; a run that has its file is not
made again, so the same command goes on after it was stopped, and --only makes a single run.

`bfloat16` computes in it. `bfloat16-rounded` is for processors that are slow at that: products are in fp32, and what
the embedding, each linear layer, norm and block puts out is rounded to bf16, as the weights are in the files. Sums
inside a product or an attention stay fp32, as they do in bf16 kernels, so its figures are like theirs, not the same.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from steer.core.trait import NeutralPrompts
from steer.files import write_atomic
from steer.finding.traits import find_trait
from steer.measure.harness import Reference, dose_settings, measure_settings, neutral_replies
from steer.model.steered import SteeredModel, load
from steer.verbs.demo import NEUTRAL_PROMPTS, TRAITS

ROUNDED = "bfloat16-rounded"


def main(
    model: str,
    out: Path,
    seeds: str = "0,1,2,3,4",
    dtypes: str = f"float32,{ROUNDED}",
    amounts: Annotated[str, typer.Option(help="Of the slider; 0 among them.")] = "-2,-1,0,1,2",
    only: Annotated[str, typer.Option(help="One SEED,DTYPE.")] = "",
    summary: Annotated[bool, typer.Option(help="Make no run, summarise those there are.")] = False,
    readme: Annotated[bool, typer.Option(help="Write the worst of all runs into README.md.")] = False,
) -> None:
    """Make the runs that are missing and print the spread of all."""
    out.mkdir(parents=True, exist_ok=True)
    asked = [(int(s), d) for s in seeds.split(",") for d in dtypes.split(",")]
    if only:
        seed, dtype = only.split(",")
        asked = [(int(seed), dtype)]
    for seed, dtype in () if summary else asked:
        missing = [t for t in TRAITS if not (out / f"{t}-{seed}-{dtype}.json").is_file()]
        if missing:
            run(in_dtype(model, dtype), seed, dtype, missing, out, [float(a) for a in amounts.split(",")])
    spreads = {
        trait: spread([json.loads(p.read_text()) for p in sorted(out.glob(f"{trait}-*.json"))]) for trait in TRAITS
    }
    write_atomic(out / "summary.json", json.dumps(spreads, indent=1) + "\n")
    print(json.dumps(spreads, indent=1))
    if readme:
        file = Path(__file__).parents[1] / "README.md"
        marks = r"(<!-- spread -->\n).*?(<!-- end of spread -->)"
        text = re.sub(marks, lambda m: m[1] + worst(spreads) + m[2], file.read_text(), flags=re.DOTALL)
        write_atomic(file, text)


def worst(spreads: dict[str, Any]) -> str:
    """A Markdown table of what holds in every run: per trait the sites chosen and the least and most of each rate."""
    lines = ["| trait | runs (seed, dtype) | sites | untouched rate | at -1 | at -1, of untouched | at +1 | KL at -1 |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip

    def between(ends: dict[str, float], digits: int = 2) -> str:
        return f"{ends['least']:.{digits}f} to {ends['most']:.{digits}f}"

    for trait, found in spreads.items():
        rates = {amount: figures["rate"] for amount, figures in found["dose"].items()}
        cells = [
            trait,
            "; ".join(found["runs"]),
            ", ".join(map(str, sorted(set(found["sites"])))),
            between(rates["0"]),
            between(rates["-1"]),
            between(found["rate_at_-1_of_untouched"]),
            between(rates["1"]),
            between(found["dose"]["-1"]["kl"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    head = "Over several seeds and both arithmetics (`examples/spread.py`); a claim holds for its worst run:"
    return "\n".join([head, "", *lines, ""])


def run(model: SteeredModel, seed: int, dtype: str, traits: list[str], out: Path, amounts: list[float]) -> None:
    """Find traits and measure their dose response, a file each."""
    reference, shared = None, None
    for trait in traits:
        begun = time.perf_counter()
        found = find_trait(model, trait, seed=seed, neutral=shared)
        shared = found.candidates.contrast.neutral
        if reference is None:
            reference = Reference.of(model, neutral_replies(model, NeutralPrompts.load().held_out[:NEUTRAL_PROMPTS]))
        held_out = found.scorer.trait.held_out
        points = measure_settings(model, found.scorer, dose_settings(found.direction, amounts), held_out, reference)
        result = {
            "trait": trait,
            "seed": seed,
            "dtype": dtype,
            "found": found.as_json(),
            "dose": [p.as_json() for p in points],
            "seconds": round(time.perf_counter() - begun, 1),
        }
        write_atomic(out / f"{trait}-{seed}-{dtype}.json", json.dumps(result, indent=1) + "\n")


def in_dtype(name: str, dtype: str) -> SteeredModel:
    """The model, computing in a dtype or as `ROUNDED` says."""
    if dtype != ROUNDED:
        return load(name, dtype=getattr(torch, dtype))
    model = load(name, dtype=torch.float32)

    def rounded(h: Any) -> Any:
        return h.to(torch.bfloat16).to(h.dtype) if isinstance(h, Tensor) and h.is_floating_point() else h

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(map(rounded, output)) if isinstance(output, tuple) else rounded(output)

    blocks = {model.anatomy.block_module(i) for i in range(model.anatomy.blocks)}
    for path, module in model.hf.named_modules():
        if path in blocks or (not list(module.children()) and hasattr(module, "weight")):
            module.register_forward_hook(after)
    return model


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The least, the mean and the most of every figure over runs, and the runs they come from."""

    def ends(values: list[float]) -> dict[str, float]:
        return {"least": min(values), "mean": sum(values) / len(values), "most": max(values)} if values else {}

    def ratio(one: dict[str, Any], amount: float) -> float:
        rates = {p["amount"]: p["rate"] for p in one["dose"]}
        return rates[amount] / rates[0] if rates[0] else 0.0

    amounts = sorted({p["amount"] for r in runs for p in r["dose"]})
    return {
        "runs": [f"{r['seed']} {r['dtype']}" for r in runs],
        "sites": [r["found"]["site"] for r in runs],
        "seconds": ends([r["seconds"] for r in runs]),
        "auroc": ends([r["found"]["auroc"] for r in runs]),
        "rate_at_-1_of_untouched": ends([ratio(r, -1.0) for r in runs]),
        "dose": {
            f"{a:g}": {
                figure: ends([p[figure] for r in runs for p in r["dose"] if p["amount"] == a])
                for figure in ("rate", "probability", "kl", "repetition")
            }
            for a in amounts
        },
    }


if __name__ == "__main__":
    typer.run(main)

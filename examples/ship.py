"""Ship what `steer demo` found: its directions and figures into dictionaries/, a summary into README.md.

    python examples/ship.py demo

Run after anything that changes the default merge or how directions are found, and then examples/traits/matrix.py and
ship.py, which measure the ranges of the sliders; every number in the tables comes from demo/results.json.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "dictionaries" / "smollm2-135m-default-merge"


def main(demo: str) -> None:
    result = json.loads((Path(demo) / "results.json").read_text())
    (PLACE / "directions").mkdir(parents=True, exist_ok=True)
    for file in sorted((Path(demo) / "directions").glob("*.safetensors")):
        shutil.copyfile(file, PLACE / "directions" / file.name)
    put(PLACE / "README.md", "figures", "end", tables(result))
    put(ROOT / "README.md", "summary", "end of summary", summary(result))


def put(file: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a Markdown file."""
    marks = rf"(<!-- {begin} -->\n).*?(<!-- {end} -->)"
    file.write_text(re.sub(marks, lambda m: m[1] + text + m[2], file.read_text(), flags=re.DOTALL))


def summary(result: dict[str, Any]) -> str:
    """Ten lines for README: what the sliders and the bake do, and what that costs."""
    lines = ["| | rate | KL, nats per token | repetition |", "|---|---|---|---|"]
    for name, points in result["dose"].items():
        for amount, label in ((0.0, "untouched"), (-1.0, "slider at -1"), (1.0, "slider at +1")):
            point = next(p for p in points if p["amount"] == amount)
            lines.append(f"| {name}, {label} | {point['rate']:.2f} | {point['kl']:.3f} | {point['repetition']:.3f} |")
        random = next(p for p in points if p["label"].startswith("random"))
        lines.append(f"| a random direction moved as far | {random['rate']:.2f} | {random['kl']:.3f} | "
                     f"{random['repetition']:.3f} |")  # fmt: skip
    bake = result["bake"]
    lines.append(
        f"| baked without moralizing ({result['search']['chosen']['label']}) | {bake['after']['rate']:.2f} | "
        f"{bake['kl']:.3f} | {bake['after']['repetition']:.3f} |"
    )
    minutes = sum(result["seconds"].values()) / 60
    return "\n".join([*lines, "", f"The whole demo took {minutes:.1f} minutes.", ""])


def tables(result: dict[str, Any]) -> str:
    """The measured tables, as Markdown."""
    lines = []
    for name, points in result["dose"].items():
        found = result["found"][name]
        lines += [
            f"**{name}**: site {found['site']}, held-out AUROC {found['auroc']:.3f}; text scorer's held-out AUROC "
            f"{found['scorer_auroc']:.3f} (marker words alone {found['marker_auroc']:.3f}); amount 1 moves the "
            f"residual stream by {found['share_at_1']:.2f} of its median norm.",
            "",
            "| amount | rate | KL, nats per token | repetition | perplexity |",
            "|---|---|---|---|---|",
            *(row(p["label"], p) for p in points),
            "",
        ]
    bake = result["bake"]
    before, after = bake["before"], bake["after"]
    lines += [
        f"**Baked without moralizing** ({result['search']['chosen']['label']}, chosen on fit topics), measured on the "
        "files that were written:",
        "",
        "| checkpoint | rate | KL, nats per token | repetition | perplexity of plain text |",
        "|---|---|---|---|---|",
        f"| merged | {before['rate']:.2f} | 0 | {before['repetition']:.3f} | {bake['perplexity_before']:.1f} |",
        f"| baked | {after['rate']:.2f} | {bake['kl']:.3f} | {after['repetition']:.3f} | "
        f"{bake['perplexity_after']:.1f} ({bake['perplexity_ratio']:.3f} times) |",
        "",
        "Seconds: "
        + ", ".join(f"{step} {s:.0f}" for step, s in result["seconds"].items() if s >= 0.5)
        + f"; {sum(result['seconds'].values()) / 60:.1f} minutes in all.",
        "",
    ]
    return "\n".join(lines)


def row(label: str, p: dict[str, Any]) -> str:
    """One line of a dose table."""
    kl = "-" if p["kl"] is None else f"{p['kl']:.3f}"
    return f"| {label} | {p['rate']:.2f} | {kl} | {p['repetition']:.3f} | {p['perplexity']:.1f} |"


if __name__ == "__main__":
    main(*sys.argv[1:])

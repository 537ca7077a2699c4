"""Ship what `steer demo` found: its directions into dictionaries/, its figures into README.md.

    python examples/ship.py demo

Run after anything that changes the default merge or how directions are found; every number in the tables comes
from demo/results.json.
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
    text = tables(result)
    for file in (ROOT / "README.md", PLACE / "README.md"):
        old = file.read_text()
        new = re.sub(r"(<!-- figures -->\n).*?(<!-- end -->)", lambda m: m[1] + text + m[2], old, flags=re.DOTALL)
        file.write_text(new)


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

"""Results as tables for a terminal or a log."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from steer.finding import Found


def finding_table(found: Found) -> str:
    """Held-out AUROC per site, and what moving the tried sites did."""
    checks = {c.site: c for c in found.checks}
    table = _table("site", "held-out AUROC", "at -1", "at +1", "KL at -1", "repetition", "")
    for site, auroc in enumerate(found.candidates.auroc):
        c = checks.get(site)
        tried = [f"{c.below:.2f}", f"{c.above:.2f}", f"{c.kl:.3f}", f"{c.repetition:.3f}"] if c else [""] * 4
        chosen = "chosen" if site == found.direction.site else ""
        table.add_row(str(site), f"{auroc:.3f}", *tried, chosen)
    d = found.direction
    return (
        _text(table) + f"{d.name}: site {d.site}, amount 1 moves the residual stream by {d.share(1):.2f} of its median "
        f"norm; text scorer AUROC {found.scorer.auroc:.3f} (marker words alone {found.scorer.marker_auroc:.3f})"
    )


def demo_table(result: Mapping[str, Any]) -> str:
    """Everything the demo measured, in one table, and the time of each step."""
    table = _table("held-out topics", "rate", "probability", "KL", "repetition", "perplexity")
    for name, points in result["dose"].items():
        for p in points:
            table.add_row(f"{name} {p['label']}", *_cells(p))
        table.add_section()
    bake = result["bake"]
    table.add_row("moralizing, merged", *_cells(bake["before"] | {"kl": 0.0}))
    table.add_row("moralizing, baked", *_cells(bake["after"]))
    seconds = result["seconds"]
    times = _table("step", "seconds")
    for step, s in seconds.items():
        times.add_row(step, f"{s:.1f}")
    times.add_row("total", f"{sum(seconds.values()):.1f}")
    return (
        _text(table) + f"baked: {result['search']['chosen']['label']}; KL {bake['kl']:.3f} nats per token on neutral "
        f"prompts, perplexity of plain text {bake['perplexity_ratio']:.3f} times; {bake['writers_edited']} of "
        f"{bake['writers_found']} writers edited, verified\n"
        + _text(times)
        + f"merged:  {result['merged']}\nbaked:   {result['baked']}\nreport:  {result['report']}"
    )


def _cells(p: Mapping[str, Any]) -> list[str]:
    kl = "-" if p["kl"] is None else f"{p['kl']:.3f}"
    return [
        f"{p['rate']:.2f}",
        f"{p['probability']:.2f}",
        kl,
        f"{p['repetition']:.3f}",
        f"{p['perplexity']:.1f}",
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _text(*parts: Table | Sequence[str]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=110)
    for part in parts:
        console.print(part)
    return out.getvalue()

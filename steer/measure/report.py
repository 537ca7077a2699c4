"""The HTML reports of `steer demo` and of the search for a bake, with their plots inside, and the search's plot as PNG.

The templates are report.html.j2 and pareto.html.j2.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from steer.files import write_atomic
from steer.measure.drawing import BLUE, GREEN, GREY, RED, STYLE, axes, page, svg


def write_report(result: Mapping[str, Any], path: Path) -> Path:
    """Write `result`, the contents of the demo's results.json, as a self-contained page and return its path."""
    traits = [
        {
            "name": name,
            "found": found,
            "points": (points := result["dose"][name]),
            "words_for": result["scorer_words"][name][0],
            "words_against": result["scorer_words"][name][1],
            "dose": _dose_plot(name, points),
            "cost": _cost_plot(name, points),
            "sites": _site_plot(name, found["auroc_per_site"], found["site"]),
        }
        for name, found in result["found"].items()
    ]
    plot, total = _pareto_plot(result["search"])[0], sum(result["seconds"].values())
    return write_atomic(path, page("report.html.j2", traits=traits, search_plot=plot, total=total, **result))


def write_search_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write pareto.html, which needs no other file, and pareto.png into `folder`.

    `result` has the contents of `search.json`. Its key `held_out` may be missing: the report can be written before the
    measurement on held-out topics.
    """
    plot, png = _pareto_plot(result)
    write_atomic(folder / "pareto.html", page("pareto.html.j2", result=result, plot=plot))
    write_atomic(folder / "pareto.png", png)


@matplotlib.rc_context(STYLE)
def _dose_plot(trait: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Trait rate and the scorer's mean probability against the amount."""
    figure, ax = axes()
    moved = [p for p in points if p["amount"] is not None]
    amounts = [p["amount"] for p in moved]
    ax.plot(amounts, [p["rate"] for p in moved], "o-", color=BLUE, label="rate (share of replies)")
    ax.plot(amounts, [p["probability"] for p in moved], "s--", color=GREY, label="scorer's mean probability")
    for p in points:
        if p["amount"] is None and p["label"] != "system prompt instead":
            ax.plot(-1, p["rate"], "x", color=RED, label=f"control: {p['label']}")
        elif p["amount"] is None:
            ax.axhline(p["rate"], color=GREEN, lw=1, ls=":", label="control: system prompt, no slider")
    ax.set(xlabel=f"amount of {trait}", ylabel="on held-out topics", ylim=(-0.03, 1.03), xticks=amounts)
    ax.legend(frameon=False, fontsize=7.5)
    return svg(figure)


@matplotlib.rc_context(STYLE)
def _cost_plot(trait: str, points: Sequence[Mapping[str, Any]]) -> str:
    """KL to the unsteered model on neutral prompts, and repetition, against the amount."""
    figure, ax = axes()
    moved = [p for p in points if p["amount"] is not None]
    amounts = [p["amount"] for p in moved]
    ax.plot(amounts, [p["kl"] for p in moved], "o-", color=RED, label="KL, nats per token (neutral prompts)")
    ax.plot(amounts, [p["repetition"] for p in moved], "s--", color=GREY, label="repeated trigrams")
    ax.set(xlabel=f"amount of {trait}", ylabel="cost", xticks=amounts)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=7.5)
    return svg(figure)


@matplotlib.rc_context(STYLE)
def _site_plot(trait: str, auroc: Sequence[float], site: int) -> str:
    """Held-out AUROC of the projection at every site."""
    figure, ax = axes()
    ax.plot(range(len(auroc)), auroc, "o-", ms=3, color=BLUE)
    ax.axvline(site, color=RED, lw=1, ls=":")
    ax.text(site + 0.3, 0.52, f"site {site}", color=RED, fontsize=8)
    ax.set(xlabel="site (residual stream after block)", ylabel=f"held-out AUROC, {trait}", ylim=(0.45, 1.02))
    return svg(figure)


@matplotlib.rc_context(STYLE)
def _pareto_plot(search: Mapping[str, Any]) -> tuple[str, bytes]:
    """KL against mean trait probability of each bake tried, on fit topics, as SVG and as PNG. In `search`, as
    `search_json` returns it, the untouched model is number -1 and the unsearched bake 0."""
    figure, ax = axes((6.4, 4.6))
    trials, chosen, limit = search["trials"], search["chosen"]["number"], search["goal"]["max_kl"]
    front = sorted((t["kl"], t["probability"]) for t in trials if t["front"])
    ax.step([x for x, _ in front], [y for _, y in front], where="post", color=GREY, lw=1, label="Pareto front")
    for keeps, face, label in ((True, BLUE, "tried"), (False, "none", "tried, moves a trait that is to stay")):
        tried = [t for t in trials if t["number"] > 0 and t["keeps"] is keeps and t["number"] != chosen]
        if tried:
            ax.scatter([t["kl"] for t in tried], [t["probability"] for t in tried], s=18, facecolors=face,
                       edgecolors=BLUE, linewidths=0.8, label=label)  # fmt: skip
    named = {-1: ("s", GREEN, "untouched"), 0: ("D", GREY, "unsearched bake"), chosen: ("o", RED, "chosen")}
    for t in trials:
        if t["number"] in named:
            marker, colour, label = named[t["number"]]
            label += "" if t["label"] == label else f": {t['label']}"
            ax.plot(t["kl"], t["probability"], marker, color=colour, ms=7, label=label)
    if limit is not None:
        ax.axvline(limit, color=GREY, lw=1, ls=":")
    ax.set_xscale("symlog", linthresh=0.01)
    ax.set(xlabel="KL on neutral prompts, nats per token", ylabel="trait's mean probability, fit topics")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    # Below the axes: the chosen edit may have a long name, and points may lie anywhere.
    figure.legend(frameon=False, fontsize=7, loc="outside lower left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return svg(figure), out.getvalue()

"""The plots of the demo's report and of the search for a bake, as SVG text or PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREY, GREEN = "#2563a8", "#b3372f", "#8a8f98", "#2f7d4f"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files, and readers can search it
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


def figure(draw: Callable[[Axes], None], size: tuple[float, float] = (4.6, 3.0)) -> str:
    """Draw one plot and return its SVG element."""
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=size, layout="constrained")
        draw(fig.subplots())
        out = io.StringIO()
        # No date and fixed ids: the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "steer"}):
            fig.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def dose_plot(trait: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Trait rate and the scorer's mean probability against the amount."""
    moved = [p for p in points if p["amount"] is not None]
    amounts = [p["amount"] for p in moved]

    def draw(ax: Axes) -> None:
        ax.plot(amounts, [p["rate"] for p in moved], "o-", color=BLUE, label="rate (share of replies)")
        ax.plot(amounts, [p["probability"] for p in moved], "s--", color=GREY, label="scorer's mean probability")
        for p in points:
            if p["amount"] is None and p["label"] != "system prompt instead":
                ax.plot(-1, p["rate"], "x", color=RED, label=f"control: {p['label']}")
            elif p["amount"] is None:
                ax.axhline(p["rate"], color=GREEN, lw=1, ls=":", label="control: system prompt, no slider")
        ax.set(xlabel=f"amount of {trait}", ylabel="on held-out topics", ylim=(-0.03, 1.03), xticks=amounts)
        ax.legend(frameon=False, fontsize=7.5)

    return figure(draw)


def cost_plot(trait: str, points: Sequence[Mapping[str, Any]]) -> str:
    """KL to the unsteered model on neutral prompts, and repetition, against the amount."""
    moved = [p for p in points if p["amount"] is not None]
    amounts = [p["amount"] for p in moved]

    def draw(ax: Axes) -> None:
        ax.plot(amounts, [p["kl"] for p in moved], "o-", color=RED, label="KL, nats per token (neutral prompts)")
        ax.plot(amounts, [p["repetition"] for p in moved], "s--", color=GREY, label="repeated trigrams")
        ax.set(xlabel=f"amount of {trait}", ylabel="cost", xticks=amounts)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=7.5)

    return figure(draw)


def site_plot(trait: str, auroc: Sequence[float], site: int) -> str:
    """Held-out AUROC of the projection at every site."""

    def draw(ax: Axes) -> None:
        ax.plot(range(len(auroc)), auroc, "o-", ms=3, color=BLUE)
        ax.axvline(site, color=RED, lw=1, ls=":")
        ax.text(site + 0.3, 0.52, f"site {site}", color=RED, fontsize=8)
        ax.set(xlabel="site (residual stream after block)", ylabel=f"held-out AUROC, {trait}", ylim=(0.45, 1.02))

    return figure(draw)


def pareto_plot(trials: Sequence[Mapping[str, Any]], chosen: int, limit: float | None = None) -> str:
    """KL against mean trait probability of each bake tried, on fit topics, as SVG.

    `chosen` is the number of a trial; `limit` is the largest KL allowed, in nats per token. For the keys of a trial see
    `_pareto`.
    """
    return figure(_pareto(trials, chosen, limit), (6.4, 4.6))


def pareto_png(trials: Sequence[Mapping[str, Any]], chosen: int, limit: float | None = None) -> bytes:
    """The plot of `pareto_plot` as PNG."""
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=160)
        _pareto(trials, chosen, limit)(fig.subplots())
        out = io.BytesIO()
        fig.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _pareto(trials: Sequence[Mapping[str, Any]], chosen: int, limit: float | None) -> Callable[[Axes], None]:
    """Trials have the keys number, label, kl, probability, front and keeps; number -1 is the untouched model."""

    def draw(ax: Axes) -> None:
        front = sorted((t["kl"], t["probability"]) for t in trials if t["front"])
        ax.step([x for x, _ in front], [y for _, y in front], where="post", color=GREY, lw=1, label="Pareto front")
        tried = [t for t in trials if t["number"] > 0]
        for keeps, how, label in ((True, BLUE, "tried"), (False, "none", "tried, moves a trait that is to stay")):
            these = [t for t in tried if t["keeps"] is keeps and t["number"] != chosen]
            if these:
                ax.scatter([t["kl"] for t in these], [t["probability"] for t in these], s=18, facecolors=how,
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
        ax.figure.legend(frameon=False, fontsize=7, loc="outside lower left")

    return draw

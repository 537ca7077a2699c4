"""The report of `steer eval`: a self-contained page from the contents of an eval.json.

At its top one picture compares the arms over all probes, and the verdict says the same in words (`verdicts`). A section
for each probe follows. The template is eval.html.j2.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT

from steer.files import write_atomic
from steer.measure.drawing import BLUE, GREEN, GREY, RED, STYLE, axes, page, svg
from steer.measure.evaluation import figures_of, shown
from steer.measure.probes.degradation import degradation
from steer.measure.probes.probe import Metric
from steer.plain_text import plain_line, shortened

Json = dict[str, Any]
Outcome = Literal["better", "worse", "changed", "noise"]
"""How an arm compares with the first one in a metric; `changed`: beyond noise, in a metric without a better end."""

EXAMPLES = 5
"""Items of a probe that are shown with every arm's answers."""
_STYLE = STYLE | {"text.parse_math": False}  # a dollar in an arm's name is a dollar
_MARKERS: dict[Outcome, tuple[str, str, str]] = {
    "better": (">", GREEN, "better, beyond noise"),
    "worse": ("<", RED, "worse, beyond noise"),
    "changed": ("D", BLUE, "changed, beyond noise"),
    "noise": ("o", GREY, "within noise"),
}
"""Outcome -> (marker, colour, words). Each has a different marker, so that no colour is needed."""
_ARM_LOOKS = tuple(
    zip((BLUE, RED, GREEN, "#b5761b", "#7a4fa3", "#13808f", GREY), "osD^vPX", ("-", "--", "-.", ":") * 2, strict=False)
)
"""(colour, marker, line style) of each arm in the plots by n and by turn."""
_BINS = 8
"""Most points of a line; more distinct values are grouped."""
_WIDEST = 2.0
"""Standard deviations at which the axis of the picture ends: farther differences are numbers at its edge."""
_WIDE, _NARROW = 8.6, 4.2
"""Widths of the picture in inches, for a desk and for a phone."""
_UNJUDGED = "†"
_NAME = 26
"""Most characters of an arm's name in a plot."""


def write_eval_report(result: Json, path: Path) -> Path:
    """Write `result`, the contents of an eval.json, as a self-contained page and return its path."""
    first, *others = result["arms"]
    probes = result["probes"]
    values = {
        **result,
        "first": first,
        "others": others,
        "pictures": [_picture(result, width) for width in (_WIDE, _NARROW)],
        "verdicts": verdicts(result),
        "probes": [_section(probe, result["arms"]) for probe in probes],
        "asked": any(probe["summary"] for probe in probes),
        "number": number,
    }
    return write_atomic(path, page("eval.html.j2", **values))


@dataclass(frozen=True)
class Comparison:
    """One arm beside the first one, in one metric of one probe."""

    probe: str
    metric: Json
    headline: bool
    """Whether the metric is the probe's first."""
    arm: str
    before: float | None
    """The first arm's value, as it is shown; None where there is none."""
    after: float | None
    difference: tuple[float, float, float] | None
    """(value, low, high) in standard deviations of the first arm's items, above 0 where the arm is better, or is higher
    where neither end is better. None where they cannot be compared."""
    outcome: Outcome

    @property
    def name(self) -> str:
        """The probe, and its metric where that is not the headline."""
        return self.probe if self.headline else f"{self.probe} ({self.metric['name']})"

    @property
    def values(self) -> str:
        """Both values, for people, with as many digits as they take to differ."""
        pairs = [(number(self.before, digits), number(self.after, digits)) for digits in (2, 3, 4)]
        return " → ".join(next((p for p in pairs if p[0] != p[1]), pairs[0]))


def comparisons(result: Json) -> list[Comparison]:
    """Return every arm but the first beside the first, in each metric for which there are summaries of both."""
    first, *others = (a["name"] for a in result["arms"])
    found = []
    for probe in result["probes"]:
        rows = {(s["arm"], s["metric"]): s for s in probe["summary"]}
        for i, metric in enumerate(probe["metrics"]):
            base = rows.get((first, metric["name"]))
            for arm in others:
                if base and (row := rows.get((arm, metric["name"]))):
                    found.append(_compare(probe, metric, i == 0, base, row))
    return found


def _compare(probe: Json, metric: Json, headline: bool, base: Json, row: Json) -> Comparison:
    sign, scale = (-1 if metric["better"] == "lower" else 1), _spread(probe, metric["name"], base["arm"])
    ends = [row.get(k) for k in ("difference", "difference_low", "difference_high")]
    known = [sign * e / scale for e in ends if e is not None]
    return Comparison(
        probe["name"], metric, headline, row["arm"], shown(metric, base["value"]), shown(metric, row["value"]),
        (known[0], min(known), max(known)) if len(known) == 3 else None, _outcome(metric, row),
    )  # fmt: skip


def _outcome(metric: Json, row: Json) -> Outcome:
    if not row.get("moved"):
        return "noise"
    if metric["better"] == "neither":
        return "changed"
    return "better" if (row["difference"] > 0) == (metric["better"] == "higher") else "worse"


def _spread(probe: Json, metric: str, first: str) -> float:
    """Return the standard deviation of the first arm's items, of all arms' where that is 0, or else 1."""
    for arms in ([first], probe["arms"]):
        values = [f.value for arm in arms for f in figures_of(probe["arms"][arm], metric)]
        if len(values) > 1 and (deviation := float(np.std(values))) > 0:
            return deviation
    return 1.0


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure as text; of large ones fewer digits."""
    if value is None:
        return "–"
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    return f"{value:z.{max(0, digits - (abs(value) >= 10) - (abs(value) >= 100))}f}"


def verdicts(result: Json) -> list[tuple[str, list[str]]]:
    """Return for each arm but the first its name and sentences: what moved, what did not, and what noise hides."""
    everything, found = comparisons(result), []
    silent = {p["name"] for p in result["probes"] if no_signal(p)}
    for arm in [a["name"] for a in result["arms"]][1:]:
        compared = [c for c in everything if c.arm == arm]
        lines = []
        for outcome, begun in (
            ("worse", "Worse"),
            ("better", "Better"),
            ("changed", "Changed, which is neither better nor worse"),
        ):
            if moved := [f"{c.name} {c.values}" for c in compared if c.outcome == outcome]:
                lines.append(f"{begun}: {', '.join(moved)}.")
        heads = [c for c in compared if c.headline]
        still = [c for c in heads if c.outcome == "noise" and c.probe not in silent]
        if still:
            limits = ", ".join(f"{c.name} {_limit(result, c)}".strip() for c in still)
            all_ = "any probe" if len(still) == len(heads) else f"{len(still)} of {len(heads)} probes"
            lines.append(
                f"No change beyond noise in {all_}: {limits}. In brackets: the smallest difference that so many items "
                "can distinguish from noise; a smaller one may exist."
            )
        if quiet := [c.name for c in heads if c.probe in silent]:
            lines.append(f"No signal at this size, so nothing can be said: {', '.join(quiet)}.")
        missing = [p["name"] for p in result["probes"] if p["name"] not in {c.probe for c in compared}]
        if missing:
            lines.append(f"Not compared: {', '.join(missing)}.")
        found.append((arm, lines))
    return found


def _limit(result: Json, comparison: Comparison) -> str:
    """Return the smallest difference that can be distinguished from noise, in brackets; empty where it is unknown."""
    summary = next(p["summary"] for p in result["probes"] if p["name"] == comparison.probe)
    noise = next(
        (s.get("noise") for s in summary if (s["arm"], s["metric"]) == (comparison.arm, comparison.metric["name"])),
        None,
    )
    return "" if noise is None else f"({_step(comparison.metric, noise)})"


def _step(metric: Json, difference: float | None) -> str:
    """Return a difference as text: of perplexities a factor."""
    if difference is None:
        return "–"
    return f"× {number(shown(metric, difference))}" if metric["exponent"] else f"{number(difference, 3)}"


def no_signal(probe: Json) -> str | None:
    """Return the line of a probe that measures nothing of this model; None for one that does, or may."""
    signal = probe["signal"]
    return signal["line"] if signal["status"] in ("none", "chance") else None


def _section(probe: Json, arms: Sequence[Json]) -> dict[str, Any]:
    """Return what the template shows of a probe."""
    names = [a["name"] for a in arms]
    rows = {(s["arm"], s["metric"]): s for s in probe["summary"]}
    results = {name: r for name in names if (r := probe["arms"].get(name))}
    tables, plots = [], []
    for metric in probe["metrics"]:
        table = [_row(metric, s) for name in names if (s := rows.get((name, metric["name"])))]
        tables.append({"metric": metric, "chance": shown(metric, metric["chance"]), "rows": table})
        for field, label in (("n", probe.get("n") or "n"), ("turn", "messages before the question")):
            if plot := _plot_against(probe, metric, names, field, label):
                plots.append(plot)
    return {
        **probe,
        "tables": [t for t in tables if t["rows"]],
        "plots": plots,
        "degrades": [line for m in probe["metrics"] for a, part in results.items() if (line := _degrades(a, part, m))],
        "examples": _examples(results),
        "notes": [(name, note) for name, r in results.items() for note in r["notes"]],
        "skipped": [(name, r["skipped"]) for name, r in results.items() if r["skipped"]],
        "no_signal": no_signal(probe),
    }


def _degrades(arm: str, part: Json, metric: Json) -> str | None:
    """Return a sentence on where in a chat a metric becomes worse; None where it does not."""
    found = degradation(figures_of(part, metric["name"]), Metric(**metric))
    if found is None:
        return None
    before, after = (number(shown(metric, s.value)) for s in (found.start, found.worse))
    return (
        f"{arm}: {metric['name']} becomes worse from message {found.turn} on ({found.low} to {found.high}), "
        f"{before} → {after}"
    )


def _row(metric: Json, row: Json) -> dict[str, Any]:
    p = row.get("p_corrected")
    compared = row.get("difference") is not None
    ends = [_step(metric, row.get(k)) for k in ("difference", "difference_low", "difference_high")]
    return {
        "arm": row["arm"],
        "value": number(shown(metric, row["value"]), 3),
        "interval": f"{number(shown(metric, row['low']), 3)} to {number(shown(metric, row['high']), 3)}",
        "items": row["items"],
        "difference": f"{ends[0]} ({ends[1]} to {ends[2]})" if compared else "",
        "p": "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "noise": _step(metric, row["noise"]) if row.get("noise") is not None else "",
        "outcome": (("within " if (outcome := _outcome(metric, row)) == "noise" else "") + outcome) if compared else "",
        "moved": bool(row.get("moved")),
    }


def _examples(results: Mapping[str, Json]) -> list[dict[str, Any]]:
    """Return the first items that any arm shows: what was asked, and every arm's answer."""
    items: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        for e in result["examples"]:
            item = items.setdefault(e["item"], {"asked": e["asked"], "right": e["right"], "answers": {}})
            item["answers"][name] = e["answered"]
    return list(items.values())[:EXAMPLES]


@matplotlib.rc_context(_STYLE)
def _picture(result: Json, width: float) -> str:
    """Every probe's headline: the arms beside the first one, or the values of one arm alone beside chance."""
    arms = [a["name"] for a in result["arms"]]
    rows = {(c.probe, c.arm): c for c in comparisons(result) if c.headline}
    several = len(arms) > 2
    labels: list[tuple[str, Comparison | Json | None, bool]] = []
    for probe in result["probes"]:
        name = probe["name"] + _unjudged(probe) + (" *" if no_signal(probe) else "")
        if several:
            labels.append((name, None, True))
            labels += [("  " + _short(arm), rows.get((probe["name"], arm)), False) for arm in arms[1:]]
        elif len(arms) == 2:
            labels.append((name, rows.get((probe["name"], arms[1])), False))
        else:
            labels.append((name, probe, False))
    figure, ax = axes((width, 1.2 + 0.25 * len(labels)))
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_yticks(range(len(labels)), [label for label, _, _ in labels])
    for tick, (_, _, heading) in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if heading else "normal")
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    side = ax.secondary_yaxis("right")
    side.spines["right"].set_visible(False)
    side.tick_params(length=0)
    if len(arms) == 1:
        texts, keys = _draw_levels(ax, [row for _, row, _ in labels], arms[0])
        ax.set_xlabel("headline figure, where chance is known")
    else:
        drawn = [row if isinstance(row, Comparison) else None for _, row, _ in labels]
        texts, keys = _draw_differences(ax, drawn), list(_MARKERS.values())
        texts = [t if not heading else "" for t, (_, _, heading) in zip(texts, labels, strict=True)]
        beside = f"difference to {_short(arms[0])}, in standard deviations"
        ax.set_xlabel(beside)
        ax.set_title("← worse", loc="left", fontsize=8)
        ax.set_title("better →", loc="right", fontsize=8)
    side.set_yticks(range(len(labels)), texts)
    handles = [
        Line2D([], [], marker=m, color=c, ls="", mfc="none" if words == _MARKERS["noise"][2] else c, label=words)
        for m, c, words in keys
    ]
    if len(arms) > 1 and any(map(_unjudged, result["probes"])):
        handles.append(Line2D([], [], ls="", label=f"{_UNJUDGED} not judged: right is higher"))
    if any(no_signal(p) for p in result["probes"]):
        handles.append(Line2D([], [], ls="", label="* no signal at this size"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if width > 6 else 2, frameon=False, fontsize=8)
    return svg(figure)


def _unjudged(probe: Json) -> str:
    """Return the mark of a probe whose headline is neither better nor worse at one end; else nothing."""
    return f" {_UNJUDGED}" if probe["metrics"][0]["better"] == "neither" else ""


def _draw_differences(ax: Any, rows: Sequence[Comparison | None]) -> list[str]:
    """Draw a mark with its interval for each row, and return the text at the right of each."""
    reach = [abs(e) for c in rows if c and c.difference for e in c.difference]
    edge = min(_WIDEST, max([0.5, *reach]) * 1.05)
    ax.set_xlim(-edge * 1.06, edge * 1.06)
    ax.axvline(0, color="black", lw=0.8)
    for y, c in enumerate(rows):
        if c and c.difference:
            marker, colour, _ = _MARKERS[c.outcome]
            value, low, high = (min(edge, max(-edge, e)) for e in c.difference)
            ax.plot([low, high], [y, y], color=colour, lw=1.6)
            for end, drawn, caret in zip(c.difference[1:], (low, high), (CARETLEFT, CARETRIGHT), strict=True):
                if end != drawn:  # it goes on beyond the edge
                    ax.plot(drawn, y, marker=caret, color=colour, ms=6)
            ax.plot(value, y, marker, color=colour, ms=7, mfc="white" if c.outcome == "noise" else colour)
            if abs(c.difference[0]) > edge:
                # Inside the axes, beside the mark.
                x, side = (-9, "right") if value > 0 else (9, "left")
                text = f"{c.difference[0]:+.{int(abs(c.difference[0]) < 10)}f}"
                ax.annotate(
                    text,
                    (value, y),
                    (x, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    fontsize=7.5,
                    color=colour,
                )
    return [c.values if c else "not compared" for c in rows]


def _draw_levels(ax: Any, probes: Sequence[Any], arm: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Draw one arm's headlines beside chance, and return the text at the right of each row and the legend's marks."""
    texts = []
    ax.set_xlim(left=0, auto=None)
    for y, probe in enumerate(probes):
        metric = probe["metrics"][0]
        row = next((s for s in probe["summary"] if (s["arm"], s["metric"]) == (arm, metric["name"])), None)
        value, low, high = (shown(metric, row[k]) if row else None for k in ("value", "low", "high"))
        texts.append("not asked" if row is None else number(value))
        if metric["chance"] is not None and value is not None:
            ax.plot([value if low is None else low, value if high is None else high], [y, y], color=BLUE, lw=1.6)
            ax.plot(value, y, "o", color=BLUE, ms=7)
            ax.plot(shown(metric, metric["chance"]), y, "|", color=GREY, ms=14, mew=2)
    return texts, [("o", BLUE, _short(arm)), ("|", GREY, "chance")]


@matplotlib.rc_context(_STYLE)
def _plot_against(probe: Json, metric: Json, arms: Sequence[str], field: str, label: str) -> str | None:
    """Plot a metric against `field` of its figures, a line for each arm; None if that does not vary."""
    lines = {}
    for arm in arms:
        figures = figures_of(probe["arms"].get(arm) or {"figures": ()}, metric["name"])
        if points := [(x, f.value) for f in figures if (x := getattr(f, field)) is not None]:
            lines[arm] = points
    distinct = sorted({x for points in lines.values() for x, _ in points})
    if len(distinct) < 2:
        return None
    bin_of = {x: i for i, xs in enumerate(np.array_split(distinct, min(_BINS, len(distinct)))) for x in xs.tolist()}
    figure, ax = axes()
    bounded = all(0 <= y <= 1 for points in lines.values() for _, y in points)  # so are the ends of the intervals
    step = (distinct[-1] - distinct[0]) / 100
    for arm, points in lines.items():
        number_ = arms.index(arm)
        colour, marker, style = _ARM_LOOKS[number_ % len(_ARM_LOOKS)]
        binned: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for x, value in points:
            binned[bin_of[x]].append((x, value))
        xs, ys, lows, highs = [], [], [], []
        for _, group in sorted(binned.items()):
            values = np.array([v for _, v in group])
            mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
            # A little apart, so that no interval hides another.
            xs.append(float(np.mean([x for x, _ in group])) + (number_ - (len(arms) - 1) / 2) * step)
            for list_, value in ((ys, mean), (lows, mean - half), (highs, mean + half)):
                list_.append(shown(metric, min(1.0, max(0.0, value)) if bounded else value))
        ax.plot(xs, ys, color=colour, marker=marker, ls=style, ms=4.5, lw=1.2, label=_short(arm))
        ax.vlines(xs, lows, highs, color=colour, lw=0.9, alpha=0.6)
    if (chance := shown(metric, metric["chance"])) is not None:
        ax.axhline(chance, color=GREY, lw=1, ls=(0, (2, 2)), label="chance")
    ax.set(xlabel=label, ylabel=textwrap.fill(metric["label"], 36))
    figure.legend(frameon=False, fontsize=7.5, loc="outside lower center", ncols=3)
    return svg(figure)


def _short(name: str) -> str:
    """Return an arm's name on one line, short enough for a plot."""
    return shortened(plain_line(name), _NAME)

"""The dashboard of a dictionary: one self-contained HTML file to browse its latents. Made by `steer features`.

The template is dashboard.html.j2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from steer.files import without_nan, write_atomic
from steer.sae.records import FeatureRecord

BINS_A_DECADE = 8
"""Bins of the histogram of firing rates per factor of ten."""


def write_page(
    records: Sequence[FeatureRecord],
    out: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    traits: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a page that shows these latents and return its path.

    `summary` is shown as names and values under the title. `traits` are tables, each a mapping with `trait`,
    `columns`, `rows` (a list of cells per row) and optionally `note`.
    """
    out = Path(out)
    page = (
        Environment(loader=PackageLoader("steer", "sae"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("dashboard.html.j2")
        .render(
            title=title,
            summary={name: _cell(value) for name, value in summary.items()},
            tables=[dict(t) | {"rows": [[_cell(c) for c in row] for row in t["rows"]]} for t in traits or ()],
            rates=rate_histogram([r.rate for r in records]),
            count=len(records),
            data=script_json([_packed(r) for r in records]),
        )
    )
    return write_atomic(out, page)


def script_json(value: Any) -> str:
    """JSON that is safe in a script element: no text in it can close the element or open another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def rate_histogram(rates: Sequence[float]) -> dict[str, Any]:
    """A histogram of firing rates with bins of equal width on a log10 axis, as the template draws it."""
    logs = [math.log10(r) for r in rates if 1e-300 < r < math.inf]
    low = math.floor(min(logs, default=-1))
    high = max(math.ceil(max(logs, default=0)), low + 1)
    counts = np.histogram(logs, (high - low) * BINS_A_DECADE, (low, high))[0].tolist()
    return {
        "counts": counts,
        "most": max(*counts, 1),
        "per_decade": BINS_A_DECADE,
        "ticks": [f"{100 * 10.0**d:.10f}".rstrip("0").rstrip(".") + " %" for d in range(low, high + 1)],
    }


def _packed(r: FeatureRecord) -> list[Any]:
    """A record as a list, as the page's script reads it: with names, the page would be twice as large."""
    row = without_nan(r.to_json())
    row["contexts"] = [list(c.values()) for c in row["contexts"]]
    row["traits"] = {name: list(score.values()) for name, score in row["traits"].items()}
    return [row[f.name] for f in fields(r)]


def _cell(value: Any) -> str:
    if without_nan(value) is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""The report of `steer demo`: one HTML file that contains its plots. The template is report.html.j2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from steer.files import write_atomic
from steer.measure.plots import cost_plot, dose_plot, pareto_plot, site_plot


def write_report(result: Mapping[str, Any], path: Path) -> Path:
    """Write `result`, the contents of the demo's results.json, as a self-contained page and return its path."""
    traits = []
    for name, found in result["found"].items():
        points = result["dose"][name]
        words = result["scorer_words"][name]
        traits.append(
            {
                "name": name,
                "found": found,
                "points": points,
                "words_for": words[0],
                "words_against": words[1],
                "dose": dose_plot(name, points),
                "cost": cost_plot(name, points),
                "sites": site_plot(name, found["auroc_per_site"], found["site"]),
            }
        )
    search = result["search"]
    page = (
        Environment(loader=PackageLoader("steer", "measure"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("report.html.j2")
        .render(
            traits=traits,
            bake=result["bake"],
            search=search,
            search_plot=pareto_plot(search["trials"], search["chosen"]["number"], search["goal"]["max_kl"]),
            seconds=result["seconds"],
            total=sum(result["seconds"].values()),
            model=result["model"],
        )
    )
    return write_atomic(path, page)

"""The report of a search: its Pareto plot and all trials as an HTML page, and the plot as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from steer.files import write_atomic
from steer.measure.plots import pareto_plot, pareto_png

PAGE, PICTURE = "pareto.html", "pareto.png"


def write_search_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write pareto.html, which needs no other file, and pareto.png into `folder`.

    `result` has the contents of `search.json`. Its key `held_out` may be missing: the report can be written before the
    measurement on held-out topics.
    """
    plotted = (result["trials"], result["chosen"]["number"], result["goal"]["max_kl"])
    page = (
        Environment(loader=PackageLoader("steer", "measure"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("pareto.html.j2")
        .render(result=result, plot=pareto_plot(*plotted))
    )
    for name, data in ((PAGE, page.encode()), (PICTURE, pareto_png(*plotted))):
        write_atomic(folder / name, data)

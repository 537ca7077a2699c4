"""What the HTML reports share: the style of their plots, plots as SVG, and templates that are filled in.

The templates are `.html.j2` files beside the modules that fill them in; each fills the blocks of page.html.j2, which is
in this folder.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from jinja2 import ChoiceLoader, Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREY, GREEN = "#2563a8", "#b3372f", "#8a8f98", "#2f7d4f"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small files, and readers can search it
    "svg.hashsalt": "steer",  # fixed ids: the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


def page(template: str, folder: str = "measure", **values: Any) -> str:
    """Return a template of a folder of this package, filled in."""
    loader = ChoiceLoader([PackageLoader("steer", name) for name in dict.fromkeys([folder, "measure"])])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def axes(size: tuple[float, float] = (4.6, 3.0)) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """Return the SVG element of a figure. It has no background: the page's shows, light or dark."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]

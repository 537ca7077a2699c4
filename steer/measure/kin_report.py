"""The page of `steer kin`: who is kin among tunes, before they are merged. The template is kin.html.j2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from steer.checkpoint.kin import Kinship
from steer.files import write_atomic
from steer.measure.drawing import BLUE, GREEN, GREY, RED, STYLE, axes, page, svg
from steer.plain_text import shortened

_STYLE = STYLE | {"text.parse_math": False}  # a dollar in a model's name is a dollar
_NAME = 24
"""Most characters of a model's name in a plot."""
_LOOKS = {"attention": (BLUE, "-", "o"), "mlp": (RED, "--", "s"), "other": (GREEN, ":", "^"), "norm": (GREY, "-.", "D")}
"""(colour, line style, marker) of each kind of tensor."""


def write_kin_report(kinship: Kinship, mismatches: Sequence[str], path: Path) -> Path:
    """Write the figures as a self-contained page and return its path. `mismatches`: lines that stand at its top."""
    with matplotlib.rc_context(_STYLE):
        several = len(kinship.names) > 1
        values = {
            **kinship.as_json(),
            "mismatches": mismatches,
            "recipe": kinship.family.recipe,
            "heat": svg(_heat_map(kinship)) if several else None,
            "tree": svg(_tree(kinship)) if several else None,
            "norms": [svg(figure) for figure in _norms(kinship)],
            "factors": svg(_factors(kinship)) if any(t.t for t in kinship.tensors) else None,
        }
    return write_atomic(path, page("kin.html.j2", **values))


def _names(kinship: Kinship) -> list[str]:
    return [shortened(name, _NAME) for name in kinship.labels]


def _heat_map(kinship: Kinship) -> Figure:
    """Cosines between the differences, in the order of the tree."""
    order = _order(kinship)
    names, n = [_names(kinship)[i] for i in order], len(order)
    figure, ax = axes((2.4 + 0.62 * n, 1.5 + 0.55 * n))
    cosines = kinship.cosines[np.ix_(order, order)]
    ax.pcolormesh(cosines, cmap="RdBu", vmin=-1, vmax=1, edgecolor="white", linewidth=1)
    for i in range(n):
        for j in range(n):
            dark = abs(cosines[i, j]) > 0.6
            ax.text(j + 0.5, i + 0.5, f"{cosines[i, j]:.2f}", ha="center", va="center", color="w" if dark else "k")
    ax.set_xticks(np.arange(n) + 0.5, names, rotation=35, ha="right")
    ax.set_yticks(np.arange(n) + 0.5, names)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_title("cosine between differences to the base", loc="left")
    return figure


def _linkage(kinship: Kinship) -> Any:
    distances = np.clip(1 - kinship.cosines, 0, 2)
    np.fill_diagonal(distances, 0)
    return linkage(squareform(distances, checks=False), "average")


def _order(kinship: Kinship) -> list[int]:
    return dendrogram(_linkage(kinship), no_plot=True)["leaves"]


def _tree(kinship: Kinship) -> Figure:
    figure, ax = axes((4.6, 1.1 + 0.4 * len(kinship.names)))
    dendrogram(_linkage(kinship), orientation="left", labels=_names(kinship), ax=ax, color_threshold=0,
               above_threshold_color=BLUE, leaf_font_size=9)  # fmt: skip
    ax.invert_yaxis()  # the order of the heat map
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("1 - cosine, mean over pairs")
    ax.set_title("who joins whom", loc="left")
    return figure


def _norms(kinship: Kinship) -> list[Figure]:
    """For each model its norms by block, all on one scale."""
    kinds = [k for k in _LOOKS if kinship.by_kind_of_block(k)]
    blocks = {kind: kinship.by_kind_of_block(kind) for kind in kinds}
    top = 100 * max((v.max() for norms in blocks.values() for v in norms.values()), default=0)
    figures = []
    for i, name in enumerate(_names(kinship)):
        figure, ax = axes((3.4, 2.2))
        for kind, norms in blocks.items():
            colour, line, marker = _LOOKS[kind]
            ax.plot(
                list(norms), [100 * v[i] for v in norms.values()], line, color=colour, marker=marker, markersize=2.5,
                linewidth=1.2, label=kind,
            )  # fmt: skip
        ax.set(ylim=(0, 1.08 * top or 1), xlabel="block", ylabel="% of the base's norm")
        ax.set_title(name, loc="left")
        if i == 0:
            ax.legend(frameon=False, fontsize=8)
        figures.append(figure)
    return figures


def _factors(kinship: Kinship) -> Figure:
    """model_stock's t of each tensor that differs, by block."""
    figure, ax = axes((7.0, 2.6))
    for kind, (colour, _, marker) in _LOOKS.items():
        found = [(t.block, t.t) for t in kinship.changed if t.kind == kind and t.block is not None]
        if found:
            ax.plot(*zip(*found, strict=True), marker, color=colour, markersize=4, label=kind)
    ax.set(xlabel="block", ylabel="t", ylim=(min(0.0, *(t.t or 0 for t in kinship.tensors)), 1.02))
    ax.set_title("model_stock's t, tensor by tensor", loc="left")
    ax.legend(frameon=False, fontsize=8, ncols=4)
    return figure

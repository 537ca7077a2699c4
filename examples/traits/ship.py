"""Ship what matrix.py found on the default merge: directions that steer, the matrix, and the tables of both READMEs.

    python examples/traits/ship.py OUT

The traits of `steer demo` ship from there (examples/ship.py), and the matrix must be of those directions: make it with
`--slider` for each. Only the ranges of their sliders come from OUT. Every number comes from OUT.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from steer.checkpoint.shipped import EFFECTS
from steer.core.direction import Direction
from steer.errors import MismatchError
from steer.files import write_atomic
from steer.measure.verdict import steers
from steer.verbs.demo import TRAITS

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "dictionaries" / "smollm2-135m-default-merge"
STRONG = 0.5
"""Change in standard deviations, certain to be none of chance, from which README's summary names a trait."""


def main(out: str) -> None:
    """Write everything that ships."""
    result = json.loads((Path(out) / "matrix.json").read_text())
    ships = shipping(result["sliders"])
    for name in result["sliders"]:
        place = PLACE / "directions" / f"{name}.safetensors"
        made = Path(out) / "calibrated" / place.name
        if name in TRAITS and not Direction.load(made).vector.equal(Direction.load(place).vector):
            raise MismatchError(f"{made}: expected the direction in {place}, found another; give that with --slider")
        if name in ships:
            shutil.copyfile(made, place)
        else:
            place.unlink(missing_ok=True)
    effects = [e for e in result["effects"] if e["slider"] in ships]
    write_atomic(PLACE / "directions" / EFFECTS, json.dumps(result | {"effects": effects}, indent=0) + "\n")
    put(PLACE / "README.md", "traits", table(result, ships) + efforts(result, ships) + pairs(result))
    put(ROOT / "README.md", "traits", summary(result, ships))


def shipping(sliders: dict[str, Any]) -> list[str]:
    """The traits whose sliders steer. Rows with another name than their trait's are variants, which do not ship."""
    return [n for n, s in sliders.items() if n == s["trait"] and (n in TRAITS or steers(s["verdict"]["says"]))]


def table(result: dict[str, Any], ships: list[str]) -> str:
    """The dose response of every slider, as Markdown."""
    lines = [
        "| slider | search | site | AUROC | probability at -1 | at 0 | at +1 | change | of a random direction "
        "| standard error | KL at -1, +1 | verdict | ships | range |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in result["sliders"].items():
        verdict = s["verdict"]
        low, zero, high = verdict["points"][:3]
        doses = " | ".join(f"{p['probability']:.2f}" for p in (low, zero, high))
        lines.append(
            f"| {name} | {'quick' if s['quick'] else 'full'} | {s['site']} | {verdict['auroc']:.2f} | {doses} | "
            f"{verdict['effect']['change']:+.2f} | {verdict['effect']['random']:+.2f} | "
            f"{verdict['effect']['error']:.2f} | {low['kl']:.3f}, {high['kl']:.3f} | "
            f"{verdict['says']} | {'yes' if name in ships else 'no'} | {span(s.get('range'))} |"
        )
    return "\n".join([*lines, *(f"| {name} | - |{' |' * 9} no direction: {why} | no | - |"
                                for name, why in result["missing"].items()), ""])  # fmt: skip


def span(found: list[float] | None) -> str:
    """A slider's calibrated range; "-" for one that was not calibrated, or has none."""
    return f"{found[0]:+g} to {found[1]:+g}" if found else "-"


def efforts(result: dict[str, Any], ships: list[str]) -> str:
    """Of each trait whose other search was given as a variant, TRAIT-quick or TRAIT-full: how much of the full search's
    effect the slider of the quick search has."""
    shares = []
    for name in ships:
        shipped = result["sliders"][name]
        other = result["sliders"].get(f"{name}-{'full' if shipped['quick'] else 'quick'}")
        if other is not None:
            quick, full = (shipped, other) if shipped["quick"] else (other, shipped)
            share = quick["verdict"]["effect"]["change"] / full["verdict"]["effect"]["change"]
            shares.append(f"{name} {share:.2f}")
    said = "Effect of the quick search's slider from -1 to +1, as a share of the full search's"
    return f"\n{said}: {', '.join(shares)}.\n" if shares else ""


def pairs(result: dict[str, Any]) -> str:
    """What keeping other traits bought and cost: the matrix's rows of a trait's slider and of all its variants."""
    out: list[str] = []
    for s in result["sliders"].values():
        if s["keep"]:
            columns = [s["trait"], *s["keep"]["traits"]]
            out += [
                "",
                f"`--keep {','.join(s['keep']['traits'])}` for {s['trait']}: cosine to the direction as it was "
                f"{s['keep']['cosine']:.3f}, held-out AUROC {s['keep']['auroc_before']:.3f} before and "
                f"{s['keep']['auroc']:.3f} after. Change at +1, standard deviations:",
                "",
                f"| slider at +1 | {' | '.join(columns)} |",
                f"|---{'|---' * len(columns)}|",
                *(
                    f"| {row} | {' | '.join(cell(result, row, c) for c in columns)} |"
                    for row, other in result["sliders"].items()
                    if other["trait"] == s["trait"]
                ),
            ]
    return "\n".join([*out, ""])


def cell(result: dict[str, Any], slider: str, scorer: str) -> str:
    """One cell of the matrix with its interval."""
    e = next(e for e in result["effects"] if (e["slider"], e["scorer"]) == (slider, scorer))
    return f"{e['change']:+.2f} ({e['low']:+.2f} to {e['high']:+.2f})"


def summary(result: dict[str, Any], ships: list[str]) -> str:
    """README's sentences: which traits have a slider, which do not, and what the sliders move beside their trait."""
    groups = {"steers, as measured by `steer demo`": [f"`{name}`" for name in TRAITS]}
    for name, s in result["sliders"].items():
        if name == s["trait"] and name not in TRAITS:
            groups.setdefault(s["verdict"]["says"], []).append(f"`{name}`")
    groups |= {"no direction": [f"`{name}`" for name in result["missing"]]} if result["missing"] else {}
    own = [e for e in result["effects"] if e["slider"] in ships and e["slider"] == e["scorer"]]
    others = [e for e in result["effects"] if e["slider"] in ships and e["slider"] != e["scorer"]]
    strong = [e for e in others if abs(e["change"]) >= STRONG and (e["low"] > 0 or e["high"] < 0)]
    most = max(others, key=lambda e: abs(e["change"]))
    lines = [f"- {says}: {', '.join(names)}" for says, names in groups.items()]
    return "\n".join(
        [
            *lines,
            "",
            f"At +1 a slider that ships moves its own trait by {min(e['change'] for e in own):.1f} to "
            f"{max(e['change'] for e in own):.1f} standard deviations over {result['topics']} held-out topics. Of the "
            f"{len(others)} effects on other traits, {len(strong)} are beyond chance and {STRONG} standard deviations; "
            f"the largest is `{most['slider']}` on {most['scorer']}, {most['change']:+.1f}.",
            "",
        ]
    )


def put(file: Path, mark: str, text: str) -> None:
    """Replace what stands between a mark and its end in a Markdown file."""
    marks = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
    write_atomic(file, re.sub(marks, lambda m: m[1] + text + m[2], file.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main(*sys.argv[1:])

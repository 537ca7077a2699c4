"""`steer traits`: the traits that ship, one trait in full, and a file to write a new one in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.checkpoint.fetch import fetch, resolve
from steer.checkpoint.library import placed_directions
from steer.checkpoint.shipped import DICTIONARIES
from steer.checkpoint.sketch import sketch_files
from steer.core.direction import Direction
from steer.core.names import check_name
from steer.core.trait import TopicPool, Trait, shipped_traits
from steer.errors import UsageError
from steer.files import write_new
from steer.verbs.tables import text_table


def list_traits(model: str | None = None) -> list[dict[str, Any]]:
    """Return the name, the summary and the slider's ends of every trait that ships.

    With `model`, a checkpoint that `steer.load` takes, also the direction of each on it: null where there is none, else
    its file, site and held-out AUROC, and whether it ships or was saved on this machine.
    """
    rows = [
        {"name": t.name, "summary": t.summary, "low_end": t.low_end, "high_end": t.high_end}
        for t in map(Trait.load, shipped_traits())
    ]
    if model is None:
        return rows
    found = placed_directions(sketch_files(fetch(resolve(model))))
    return [row | {"direction": _direction_row(*found[row["name"]]) if row["name"] in found else None} for row in rows]


def _direction_row(direction: Direction, file: Path) -> dict[str, Any]:
    found, site = direction.provenance.get("auroc"), direction.site
    auroc = found[site] if isinstance(found, list) and site < len(found) else None
    return {
        "from": "ships" if file.is_relative_to(DICTIONARIES) else "saved",
        "file": str(file),
        "site": site,
        "auroc": auroc if isinstance(auroc, float) else None,
    }


def traits_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what `list_traits` found as a table."""
    columns = ["trait", "the slider's low end", "its high end"]
    cells = [[row["name"], row["low_end"] or "", row["high_end"] or ""] for row in rows]
    if "direction" in rows[0]:
        columns.append("direction")
        for cell, row in zip(cells, rows, strict=True):
            d = row["direction"]
            auroc = "" if d is None or d["auroc"] is None else f", AUROC {d['auroc']:.2f}"
            cell.append("none" if d is None else f"{d['from']}, site {d['site']}{auroc}")
    return text_table(columns, cells, left=len(columns) - 1)


def trait_as_json(trait: Trait) -> dict[str, Any]:
    """Return a trait with the keys of its file, and whether its topics are those of the pool."""
    names = {"with_instruction": "with", "without_instruction": "without"}
    values = {names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in asdict(trait).items()}  # pyright: ignore
    return values | {"pool": _on_pool(trait)}


def trait_text(trait: Trait) -> str:
    """Return a trait in full, for people. Of the pool's topics only their number is shown."""
    lines = [f"{trait.name}: {trait.summary}"]
    if trait.low_end or trait.high_end:
        lines.append(f"slider:  {trait.low_end or '?'} ... {trait.high_end or '?'}")
    lines += [f"with:    {trait.with_instruction}", f"without: {trait.without_instruction or '(no instruction)'}"]
    if trait.markers:
        lines.append(f"markers: {', '.join(trait.markers)}")
    if _on_pool(trait):
        lines.append(
            f"topics:  {len(trait.fit)} for fitting and {len(trait.held_out)} held out, of the pool that ships"
        )
        return "\n".join(lines)
    for part, topics in (("fit", trait.fit), ("held out", trait.held_out)):
        lines += [f"{part}, {len(topics)} topics:", *(f"  {topic}" for topic in topics)]
    return "\n".join(lines)


def _on_pool(trait: Trait) -> bool:
    pool = TopicPool.load()
    return (trait.fit, trait.held_out) == (pool.fit, pool.held_out)


def new_trait(name: str, out: Path | None = None) -> Path:
    """Write a commented trait file to edit, `out` or NAME.yaml, and return its path. It can be used as it is.

    Errors: UsageError for an invalid name, or a shipped trait's, and for a file that does not end in .yaml or .yml;
    SteerError for a file that exists.
    """
    if check_name(name, "NAME") in shipped_traits():
        raise UsageError(f"NAME: expected a name that no shipped trait has, found {name!r}; choose another")
    place = out or Path(f"{name}.yaml")
    if place.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out: expected a .yaml file, found {str(place)!r}; give it that ending")
    return write_new(place, _NEW.format(name=name))


_NEW = """\
# A trait: a behaviour that two opposite instructions describe. Put your own words in place of the pirate's.
#   steer traits check {name}.yaml
#   steer find MODEL {name}.yaml
#   steer chat MODEL --slider {name}=1
name: "{name}"
# One line for people.
summary: "Talks like a pirate, against plain speech."
# What the model does at each end of the slider, in a few plain words.
low_end: "talks plainly"
high_end: "talks like a pirate"
# System prompts under which the model shows the trait, and shows its opposite. Small models follow short orders that
# say "you", and that hold some of the words to use. Without `without`, replies under no system prompt are the other
# side.
with: "You are a merry pirate. In every reply you talk of the sea, your ship and treasure: ahoy, matey, arr!"
without: "You are a clerk in an office. You talk in plain and modern words, and never of the sea."
# Optional: words and phrases that show the trait. Their rate is reported beside the other scores.
# markers:
#   - "ahoy"
#   - "arr"
# Optional: what users say when the trait shows best, at least 4 topics under `fit` and 2 under `held_out`, better 40
# and 20; no topic in both. Without these two lists the trait uses the everyday topics that ship with steer.
# fit:
#   - "Where should we go on our next holiday?"
# held_out:
#   - "What is in that old chest?"
"""

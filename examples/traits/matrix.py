"""The shelf on a model: find every trait, measure what its slider does, and what it does to all the other traits.

    python examples/traits/matrix.py MODEL OUT [--traits warmth,humour,mine.yaml] [--quick] [--topics 40]

Writes into OUT, for each trait, TRAIT.safetensors (its direction) and TRAIT.json (scores, dose response, verdict, text
scorer), replies/TRAIT.json (the replies under its slider at +1), and over all traits matrix.json and matrix.svg: by how
many standard deviations each slider (row) moves each trait (column). What has its file is not made again, so the same
command goes on after it was stopped. On the default merge and two cores that is about half an hour a trait, with
--quick three minutes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import TopicPool, Trait, shipped_traits, spread
from steer.errors import MismatchError, TraitNotFoundError
from steer.files import read_json_object, without_nan, write_atomic
from steer.finding.traits import find_trait
from steer.measure.cross_effects import cross_effects, effects_plot
from steer.measure.harness import replies_under
from steer.measure.scorer import Scorer
from steer.model.steered import SteeredModel, load
from steer.progress import bar
from steer.verbs.traits import trait_as_json

TOKENS = 48
"""Length of the replies that the matrix is read from."""


def main(
    model: str, out: Path, traits: str = "", quick: bool = False, topics: int = 40, seed: int = 0, dtype: str = "auto"
) -> None:
    """Make what is missing in OUT, and print the matrix."""
    live = load(model, dtype=dtype)
    asked = [Trait.load(name) for name in (traits.split(",") if traits else shipped_traits())]
    check_run(out, {"sketch": live.sketch().id, "quick": quick, "topics": topics, "seed": seed, "dtype": dtype})
    for trait in asked:
        if not (out / f"{trait.name}.json").is_file():
            write(out / f"{trait.name}.json", found(live, trait, out, quick=quick, seed=seed))
    # The pool's held-out topics, for all traits alike: only then the rows of the matrix can be compared.
    prompts = spread(TopicPool.load().held_out, topics)
    results = {t.name: read(out / f"{t.name}.json") for t in asked}
    for trait in asked:
        if results[trait.name]["trait"] != trait_as_json(trait):
            raise MismatchError(
                f"{out}: expected {trait.name} as it is now, found one of other texts; delete its files"
            )
    scorers = {t.name: Scorer.from_json(r["scorer"], t) for t in asked if "scorer" in (r := results[t.name])}
    for name in ("untouched", *scorers):
        file = out / "replies" / f"{name}.json"
        if not file.is_file():
            direction = None if name == "untouched" else Direction.load(out / f"{name}.safetensors")
            write(file, {"texts": replies(live, direction, prompts, seed)})
    texts = {name: read(out / "replies" / f"{name}.json")["texts"] for name in ("untouched", *scorers)}
    effects = cross_effects(texts.pop("untouched"), texts, scorers)
    missing = {name: r["missing"] for name, r in results.items() if "missing" in r}
    write(out / "matrix.json", {"effects": [asdict(e) for e in effects], "missing": missing})
    if effects:
        write_atomic(out / "matrix.svg", effects_plot(effects))
    for e in effects:
        print(f"{e.slider:>14} on {e.scorer:<14} {e.change:+.2f} ({e.low:+.2f} to {e.high:+.2f})")
    for name, why in missing.items():
        print(f"{name}: no direction: {why}")


def found(model: SteeredModel, trait: Trait, out: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Find a trait and write its direction. Returns its figures and its scorer, or why it was not found."""
    try:
        made = find_trait(model, trait, quick=quick, seed=seed, verdict=True)
    except TraitNotFoundError as e:
        return {"trait": trait_as_json(trait), "missing": str(e)}
    made.direction.save(out / f"{trait.name}.safetensors")
    return {"trait": trait_as_json(trait), "found": made.as_json(), "scorer": made.scorer.as_json()}


def replies(model: SteeredModel, direction: Direction | None, prompts: tuple[str, ...], seed: int) -> list[str]:
    """The reply to each prompt with the direction's slider at +1."""
    edit = None if direction is None else Edit(add=((direction, 1.0),))
    sampler = replace(MEASURE, max_new_tokens=TOKENS, seed=seed)
    title = "untouched" if direction is None else f"{direction.name} at +1"
    with bar(title, len(prompts) * TOKENS, "tokens") as advance, model.untouched():
        (made,) = replies_under(model, prompts, [edit], sampler, on_tokens=advance)
    return [r.text for r in made]


def check_run(out: Path, about: dict[str, Any]) -> None:
    """Write what OUT is made of, or compare. Errors: MismatchError for an OUT of another model or of other options."""
    file = out / "manifest.json"
    if not file.is_file():
        write(file, about)
    elif (before := read(file)) != about:
        raise MismatchError(f"{out}: expected a run of {about}, found one of {before}; name another directory")


def read(file: Path) -> dict[str, Any]:
    """The contents of a file that `write` wrote."""
    return read_json_object(file, what="what this script wrote", do="delete it and run again")


def write(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomic(file, json.dumps(without_nan(value), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""The traits that ship on a model: find each, measure what its slider does, and what it does to all other traits.

    python examples/traits/matrix.py MODEL OUT [--traits warmth,mine.yaml] [--quick] [--slider FILE] [--topics 40]

Writes into OUT, for each trait, TRAIT.safetensors (its direction) and TRAIT.json (scores, dose response, verdict, text
scorer), replies/TRAIT.json (the replies under its slider at +1), calibrated/TRAIT.safetensors (its direction with the
range of its slider, if it steers), and over all traits matrix.json and matrix.html: by how many standard deviations
each slider that steers (row) moves each trait (column). `--slider` names further
directions of these traits, such as one that `steer find --keep` made; the file's name becomes the row's, and that of a
trait takes the place of the direction found here. What has its file is not made again, so the same command goes on
after it was stopped; a trait that was found with --quick is found again without it. ship.py ships the result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import MEASURE
from steer.core.trait import TopicPool, Trait, shipped_traits, spread
from steer.errors import MismatchError, TraitNotFoundError, UsageError
from steer.files import read_json_object, without_nan, write_atomic
from steer.finding.directions import TOKENS
from steer.finding.measuring import FULL, QUICK, calibrated, judged
from steer.finding.traits import find_trait
from steer.measure.cross_effects import cross_effects, effects_page
from steer.measure.harness import replies_under
from steer.measure.scorer import Scorer
from steer.measure.verdict import steers
from steer.model.steered import SteeredModel, load
from steer.progress import bar
from steer.verbs.traits import trait_as_json


def main(
    model: str,
    out: Path,
    traits: str = "",
    quick: bool = False,
    slider: Annotated[list[Path] | None, typer.Option(help="Further directions of these traits.")] = None,
    topics: int = 40,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Make what is missing in OUT, and print the matrix."""
    live = load(model, dtype=dtype)
    asked = [Trait.load(name) for name in (traits.split(",") if traits else shipped_traits())]
    check_run(out, {"sketch": live.sketch().id, "topics": topics, "seed": seed, "dtype": dtype})
    for trait in asked:
        file = out / f"{trait.name}.json"
        if not file.is_file() or (read(file)["quick"] and not quick):
            (out / "replies" / f"{trait.name}.json").unlink(missing_ok=True)
            write(file, found(live, trait, out, quick=quick, seed=seed))
    results = {t.name: read(out / f"{t.name}.json") for t in asked}
    for trait in asked:
        if results[trait.name]["trait"] != trait_as_json(trait):
            raise MismatchError(
                f"{out}: expected {trait.name} as it is now, found one of other texts; delete its files"
            )
    scorers = {t.name: Scorer.from_json(r["scorer"], t) for t in asked if "scorer" in (r := results[t.name])}
    directions = {name: Direction.load(out / f"{name}.safetensors") for name in scorers}
    for file in slider or ():
        direction, about = Direction.load(file), out / "sliders" / f"{file.stem}.json"
        if direction.name not in scorers:
            raise UsageError(f"--slider: expected a direction of {', '.join(scorers)}, found {direction.name!r}")
        directions[file.stem] = direction
        if not about.is_file() or read(about)["hash"] != hash_file(file):
            (out / "replies" / f"{file.stem}.json").unlink(missing_ok=True)
            figures = results[direction.name]
            if hash_file(file) != hash_file(out / f"{direction.name}.safetensors"):
                figures = measured(live, direction, scorers[direction.name], figures, seed)
            write(about, {"hash": hash_file(file), **figures})
    sliders = {name: shown(name, directions[name].name, out) for name in directions}
    named = {file.stem for file in slider or ()}
    moved = {n: d for n, d in directions.items() if n in named or steers(sliders[n]["verdict"]["says"])}
    for name, direction in moved.items():
        if name == direction.name:  # variants do not ship
            sliders[name]["range"] = with_range(live, direction, out / "calibrated" / f"{name}.safetensors", seed)
    # The pool's held-out topics, for all traits alike: only then the rows of the matrix can be compared.
    prompts = spread(TopicPool.load().held_out, topics)
    for name, direction in {"untouched": None, **moved}.items():
        file = out / "replies" / f"{name}.json"
        if not file.is_file():
            write(file, {"texts": replies(live, direction, prompts, seed)})
    texts = {name: read(out / "replies" / f"{name}.json")["texts"] for name in ("untouched", *moved)}
    effects = cross_effects(texts.pop("untouched"), texts, scorers)
    missing = {name: r["missing"] for name, r in results.items() if "missing" in r}
    result = {"topics": len(prompts), "tokens": TOKENS, "seed": seed, "sliders": sliders, "missing": missing}
    write(out / "matrix.json", result | {"effects": [asdict(e) for e in effects]})
    write_atomic(out / "matrix.html", effects_page(read(out / "matrix.json")))
    for e in effects:
        print(f"{e.slider:>14} on {e.scorer:<14} {e.change:+.2f} ({e.low:+.2f} to {e.high:+.2f})")
    for name, why in missing.items():
        print(f"{name}: no direction: {why}")


def found(model: SteeredModel, trait: Trait, out: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Find a trait and write its direction. Returns its figures and its scorer, or why it was not found."""
    about = {"trait": trait_as_json(trait), "quick": quick}
    try:
        made = find_trait(model, trait, quick=quick, seed=seed, verdict=True)
    except TraitNotFoundError as e:
        return about | {"missing": str(e)}
    made.direction.save(out / f"{trait.name}.safetensors")
    return about | {"found": made.as_json(), "scorer": made.scorer.as_json()}


def measured(
    model: SteeredModel, direction: Direction, scorer: Scorer, found: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The verdict on a direction that was not found here, measured as on that of its trait, `found`, which was."""
    _, verdict = judged(
        model, direction, scorer, auroc=min(scorer.auroc, direction.provenance["auroc"][direction.site]),
        least=found["found"]["verdict"]["least_auroc"], effort=QUICK if found["quick"] else FULL, seed=seed,
    )  # fmt: skip
    figures = {"site": direction.site, "share_at_1": direction.share(1), "keep": direction.provenance.get("keep")}
    quick = bool(direction.provenance.get("quick"))
    return {"quick": quick, "found": figures | {"verdict": verdict.as_json()}}


def shown(name: str, trait: str, out: Path) -> dict[str, Any]:
    """The figures of one row's slider, for the report."""
    place = out / "sliders" / f"{name}.json"
    about = read(place if place.is_file() else out / f"{name}.json")
    kept = {key: about["found"].get(key) for key in ("site", "share_at_1", "keep", "verdict")}
    return {"trait": trait, "quick": about["quick"], **kept}


def with_range(model: SteeredModel, direction: Direction, file: Path, seed: int) -> tuple[float, float] | None:
    """The range of a direction's slider, measured unless `file` has it; `file` keeps the direction with its range."""
    if not file.is_file() or not Direction.load(file).vector.equal(direction.vector):
        calibrated(model, direction, seed=seed).save(file)
    return Direction.load(file).calibrated


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

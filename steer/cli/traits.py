"""`steer traits` and what it does with one trait: show, check, new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer.cli.common import Json, emit

app = typer.Typer(
    help="The traits that ship: list and show them, check your own, start a new one.",
    epilog="Examples: `steer traits --model merged` · `steer traits show warmth` · `steer traits new pirate`",
)


@app.callback(invoke_without_command=True)
def traits(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Also show the directions of this model: a directory or hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The traits that ship: list and show them, check your own, start a new one."""
    if context.invoked_subcommand is not None:
        return
    from steer.verbs.traits import list_traits, traits_table

    rows = list_traits(model)
    emit({"traits": rows}, as_json, f"{traits_table(rows)}\nMore: steer traits show NAME; steer find MODEL NAME")


@app.command(epilog="Example: `steer traits show warmth`")
def show(
    trait: Annotated[str, typer.Argument(help="A trait that ships, or your own .yaml file.")],
    as_json: Json = False,
) -> None:
    """Show one trait: its instructions, slider, markers and topics."""
    from steer.core.trait import Trait
    from steer.verbs.traits import trait_as_json, trait_text

    loaded = Trait.load(trait)
    emit(trait_as_json(loaded), as_json, trait_text(loaded))


@app.command(epilog="Example: `steer traits check pirate.yaml`")
def check(files: Annotated[list[Path], typer.Argument(help="Trait files.")], as_json: Json = False) -> None:
    """Check trait files: one line per mistake, and exit code 1 if there is any."""
    from steer.core.trait import Trait

    found = {str(file): Trait.mistakes(file) for file in files}
    result = [{"file": file, "mistakes": mistakes} for file, mistakes in found.items()]
    lines = [line for file, mistakes in found.items() for line in (mistakes or [f"{file}: a valid trait"])]
    emit({"files": result}, as_json, "\n".join(lines))
    if any(found.values()):
        raise typer.Exit(1)


@app.command(epilog="Example: `steer traits new pirate`")
def new(
    name: Annotated[str, typer.Argument(help="Name of the trait, and of its slider.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="NAME.yaml")] = None,
    as_json: Json = False,
) -> None:
    """Write a commented trait file to edit; no file is overwritten."""
    from steer.verbs.traits import new_trait

    place = new_trait(name, out)
    emit({"file": str(place)}, as_json, f"{place}: written; edit it, then: steer traits check {place}")

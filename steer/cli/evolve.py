"""The verb that evolves a merge by taste: `steer evolve`, with a sub-word for each step."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.common import ChatTemplate, Dtype, stoppable, unicode_option

evolve = typer.Typer(help="Evolve a merge by taste: generations, blind votes and their ratings.")
LineageDir = Annotated[Path, typer.Argument(metavar="LINEAGE", help="The directory of a lineage.")]


@evolve.callback()
def group() -> None:
    """Evolve a merge by taste: generations, blind votes and their ratings."""


@evolve.command(epilog="Examples: `steer evolve vote lineage` · `steer evolve vote lineage --scene --voter kim`")
def vote(
    lineage: LineageDir,
    voter: Annotated[str | None, typer.Option(help="Who votes. [default: your user name]")] = None,
    scene: Annotated[bool, typer.Option("--scene", help="Go on with the reply that you choose.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Begin each chat with this, in place of what ships.", callback=unicode_option)
    ] = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Read two replies, not knowing whose they are, and choose: 1, 2, 3 the same, 4 both bad."""
    from steer.verbs.vote import vote as run

    with stoppable("every vote is kept, run the same command again to go on"):
        run(lineage, voter or getpass.getuser(), scene=scene, prompt=prompt)

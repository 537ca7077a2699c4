"""The verb that evolves a merge by taste: `steer evolve`, with a sub-word for each step."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.common import ChatTemplate, Dtype, stoppable, unicode_option

app = typer.Typer(help="Evolve merges by taste: generations, blind votes and their ratings.")
Place = Annotated[Path, typer.Argument(metavar="LINEAGE", help="Directory of a lineage.")]


@app.callback()
def group() -> None:
    """Evolve merges by taste: generations, blind votes and their ratings."""


@app.command(epilog="Examples: `steer evolve vote lineage` · `steer evolve vote lineage --scene --voter kim`")
def vote(
    lineage: Place,
    voter: Annotated[str | None, typer.Option(help="Who votes. [default: your user name]")] = None,
    scene: Annotated[bool, typer.Option("--scene", help="Go on with the reply that you choose.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Begin each chat with this, in place of what ships.", callback=unicode_option)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 160,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Read two replies, not knowing whose they are, and choose: 1, 2, 3 the same, 4 both bad."""
    from steer.verbs.vote import vote as run

    with stoppable("every vote is kept, run the same command again to go on"):
        run(lineage, voter or getpass.getuser(), scene=scene, prompt=prompt, max_new_tokens=max_new_tokens)

"""The verb that evolves: `steer evolve START.yml LINEAGE`, and its sub-commands."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steer.cli.common import ChatTemplate, Dtype, Json, emit, say, stoppable, unicode_option
from steer.errors import UsageError

Place = Annotated[Path, typer.Argument(metavar="LINEAGE", help="Directory of a lineage.")]
_KEPT = "what is done is kept, run the same command again to go on"


class _StartByDefault(TyperGroup):
    """`evolve START.yml LINEAGE` is `evolve start START.yml LINEAGE`, and several models may follow one `--pool`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["start", *args]
        spread: list[str] = []
        after = "--pool" in args and args.index("--pool") > 2  # START.yml and LINEAGE came before it
        for arg in args:
            if after and spread[-2:-1] == ["--pool"] and not arg.startswith("-"):
                spread.append("--pool")
            spread.append(arg)
        return super().parse_args(ctx, spread)


app = typer.Typer(
    cls=_StartByDefault,
    no_args_is_help=True,
    help="Evolve merges by taste: `steer evolve START.yml LINEAGE --pool MODEL` begins a lineage, or goes on with it.",
    epilog="Examples: `steer evolve recipe.yml lineage --pool someone/a-tune` · `steer evolve vote lineage`",
)


@app.command(epilog="Example: `steer evolve recipe.yml lineage --pool someone/a-tune --pool tunes/mine`")
def start(
    recipe: Annotated[Path, typer.Argument(metavar="START.yml", help="A mergekit recipe with models.")],
    lineage: Annotated[Path, typer.Argument(help="A new directory, or that of a lineage to go on with.")],
    pool: Annotated[list[str], typer.Option(help="A model that may be added; may be repeated.")] = [],  # noqa: B006
    children: Annotated[int, typer.Option(min=1, max=26, help="Children of each generation.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the proposals.")] = 0,
    as_json: Json = False,
) -> None:
    """Merge START.yml and its first children. `start` may be left out."""
    from steer.verbs import evolve

    with stoppable(_KEPT):
        result = evolve.start(recipe, lineage, pool, children=children, seed=seed, say=say)
    emit(result, as_json, evolve.lineage_table(result))


@app.command("next", epilog="Example: `steer evolve next lineage`")
def next_generation(
    lineage: Place,
    parent: Annotated[str | None, typer.Option(help="The node to go on from. [default: the most promising]")] = None,
    as_json: Json = False,
) -> None:
    """Close the generation: the next one are children of the node that leads by votes, or of others where nothing on
    it is left to try."""
    from steer.verbs import evolve

    with stoppable(_KEPT):
        result = evolve.next_generation(lineage, parent=parent, say=say)
    emit(result, as_json, evolve.lineage_table(result))


@app.command(epilog="Examples: `steer evolve add lineage someone/a-tune` · `steer evolve add lineage --remove calm`")
def add(
    lineage: Place,
    model: Annotated[str | None, typer.Argument(help="A model to add.")] = None,
    remove: Annotated[str | None, typer.Option(help="A model to take out.")] = None,
    base: Annotated[str | None, typer.Option(help="A model to make the base.")] = None,
    weight: Annotated[str | None, typer.Option(help="MODEL=WEIGHT.")] = None,
    method: Annotated[str | None, typer.Option(help="A merge method of mergekit.")] = None,
    parameter: Annotated[list[str], typer.Option(help="NAME=VALUE of the method; may be repeated.")] = [],  # noqa: B006
    profile: Annotated[str | None, typer.Option(help="A profile whose sliders the child carries, or none.")] = None,
    parent: Annotated[str | None, typer.Option(help="The node that is changed. [default: the newest parent]")] = None,
    as_json: Json = False,
) -> None:
    """Make a child by hand: one move, which joins the newest generation."""
    from steer.verbs import evolve

    with stoppable(_KEPT):
        result = evolve.add(
            lineage, model, remove=remove, base=base, method=method, profile=profile, parent=parent, say=say,
            weight=_pair(weight, "--weight") if weight else None,
            parameters=dict(_pair(text, "--parameter") for text in parameter),
        )  # fmt: skip
    emit(result, as_json, evolve.lineage_table(result))


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


@app.command(epilog="Examples: `steer evolve show lineage` · `steer evolve show lineage --html tree.html`")
def show(
    lineage: Place,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the family tree, as a page.")] = None,
    as_json: Json = False,
) -> None:
    """Print every merge of the lineage: what it changed, how it was measured and rated."""
    from steer.verbs import evolve

    result = evolve.show(lineage)
    if html is not None:
        evolve.write_page(lineage, html)
    emit(result, as_json, f"{evolve.tree(lineage)}\n\n{evolve.lineage_table(result)}")


@app.command(epilog="Example: `steer evolve best lineage > best.yml`")
def best(lineage: Place, as_json: Json = False) -> None:
    """Print the recipe of the merge that leads by votes."""
    from steer.core.small_files import dump_yaml
    from steer.verbs import evolve

    result = evolve.best(lineage)
    emit(result, as_json, f"# {result['node']}: {result['standing']}\n{dump_yaml(result['recipe']).decode().rstrip()}")


@app.command(epilog="Example: `steer evolve export lineage out --bake`")
def export(
    lineage: Place,
    out: Annotated[Path, typer.Argument(help="A new directory; complete or absent afterwards.")],
    node: Annotated[str | None, typer.Option(help="[default: the one that leads by votes]")] = None,
    bake: Annotated[bool, typer.Option("--bake", help="Also write the checkpoint, sliders baked in.")] = False,
    as_json: Json = False,
) -> None:
    """Write a merge's plain mergekit recipe, its profile, and a model card with the lineage."""
    from steer.verbs import evolve

    with stoppable("nothing is written, run the same command again"):
        result = evolve.export(lineage, out, node=node, bake_it=bake, say=say)
    emit(result, as_json, f"{result['out']}: node {result['node']}")


def _pair(text: str, where: str) -> tuple[str, Any]:
    from steer.core.small_files import load_yaml

    name, _, value = text.rpartition("=")
    if not name or not value:
        raise UsageError(f"{where}: expected NAME=VALUE, found {text!r}; write one such as density=0.5")
    return name, load_yaml(value.encode(), where, "a value")

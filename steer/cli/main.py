"""The `steer` command: one verb per stage of the pipeline, and no logic.

Each verb parses its options, calls a function of the package, and prints the result. torch is imported inside the verbs
that need it, so that `steer --help` is fast.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli import bake as cli_bake
from steer.cli import dictionaries as cli_dictionaries
from steer.cli import evolve as cli_evolve
from steer.cli import live as cli_live
from steer.cli import measure as cli_measure
from steer.cli import traits as cli_traits
from steer.cli.common import ChatTemplate, DeviceMap, Dtype, FourBit, Json, Model, emit, print_notices, say, stoppable
from steer.errors import SteerError, UsageError
from steer.files import check_writable
from steer.plain_text import plain_line

if TYPE_CHECKING:
    from steer.core.direction import Direction
    from steer.model.steered import SteeredModel

app = typer.Typer(
    name="steer",
    help="Feature sliders for merged language models: merge, find, steer, bake, with proof.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run a verb; a user's mistake becomes one line on stderr and an exit code."""
    if not sys.stderr.isatty():
        # Switch off the libraries' progress bars too. They read these variables when they are imported, later.
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    # On a machine without a GPU, bitsandbytes warns at import that it lacks a faster kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.showwarning = _warn
    print_notices()
    arguments = sys.argv[1:]
    before = signal.signal(signal.SIGTERM, _terminated) if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else None
    try:
        code = app(arguments or ["--help"], prog_name="steer", standalone_mode=False)
        if code == _STOPPED:
            _fail("stopped", code)
    except typer.TyperException as e:
        context = getattr(e, "ctx", None)
        where = context.command_path if context else "steer"
        code = _fail(f"{e.format_message().rstrip('.')}; see: {where} --help", 2)
    except SteerError as e:
        code = _fail(str(e), e.exit_code)
    except OSError as e:
        code = _fail(f"{e.filename or 'steer'}: {e.strerror or e}; check the path, its permissions and the disk", 1)
    except _TerminatedError:
        code = _fail("stopped by SIGTERM; what is finished is kept, run the same command again", 128 + signal.SIGTERM)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    sys.exit((code or 0) if arguments else 2)


class _TerminatedError(BaseException):
    """SIGTERM, raised as an exception so that temporary files are removed. Nobody takes it for Ctrl-C or an error."""


def _terminated(number: int, frame: object) -> None:
    raise _TerminatedError


def _warn(message: Warning | str, category: type[Warning], *where: object) -> None:
    """Print a warning of this package in one line; warnings of libraries are for developers and are not shown."""
    if category.__module__.startswith("steer"):
        _fail(str(message), 0)


_STOPPED = 130  # typer's exit code for Ctrl-C, the same as in shells


def _fail(message: str, code: int) -> int:
    typer.echo(f"steer: {plain_line(message)}", err=True)
    return code


@app.command(epilog="Example: `steer fetch smollm2-135m-instruct`")
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct, or any hub id.")] = "smollm2-135m-instruct",
    out: Annotated[Path | None, typer.Option(help="Directory to write; by default the hub's cache.")] = None,
    as_json: Json = False,
) -> None:
    """Download a checkpoint: the default model, or any hub id."""
    from steer.checkpoint.fetch import fetch as run

    place = run(name, out)
    emit({"checkpoint": str(place)}, as_json, str(place))


@app.command(epilog="Example: `steer merge examples/merge/default.yml merged`")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(help="A new directory; complete or absent afterwards.")],
    device: Annotated[str | None, typer.Option(help="Where mergekit computes, e.g. cuda.")] = None,
    steps: Annotated[bool, typer.Option("--steps", help="Print each step on stderr as it begins.")] = False,
    as_json: Json = False,
) -> None:
    """Merge checkpoints by a mergekit recipe."""
    from steer.checkpoint.merge import merge as run

    with stoppable("nothing is written, run the same command again"):
        place = run(recipe, out, device=device, say=lambda line: say(line) if steps else None)
    emit({"checkpoint": str(place)}, as_json, f"{place}: merged")


@app.command(
    epilog="Examples: `steer kin examples/merge/default.yml --out kin.html` · `steer kin tune-a tune-b --base instruct`"
)
def kin(
    models: Annotated[list[str], typer.Argument(help="A mergekit recipe, or models as recipes name them.")],
    base: Annotated[
        str | None, typer.Option(help="The model that these are tunes of; by default the recipe's base_model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write a page with plots, an HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare tunes before a merge: which are nearly copies, what each adds, how much of it the merge will keep."""
    from steer.checkpoint.kin import kin as run
    from steer.checkpoint.kin import mismatches
    from steer.measure.kin_report import write_kin_report
    from steer.progress import byte_bar
    from steer.verbs.tables import kin_table

    lines = mismatches(models, base)
    for line in lines:
        say(line)
    with byte_bar("reading") as advance:
        found = run(*models, base=base, advance=advance)
    page = [] if out is None else [str(write_kin_report(found, lines, out))]
    emit({"mismatches": lines, **found.as_json()}, as_json, "\n".join([kin_table(found), *page]))


@app.command(epilog="Examples: `steer anatomy merged` · `steer anatomy config.json --json`")
def anatomy(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or a config.json.")],
    as_json: Json = False,
) -> None:
    """Find and prove which weights of an architecture write into the residual stream."""
    from steer.verbs.anatomy import proved_anatomy
    from steer.verbs.tables import anatomy_as_json, anatomy_table

    found = proved_anatomy(model)
    emit(anatomy_as_json(found), as_json, anatomy_table(found))


@app.command(
    epilog="Examples: `steer find merged moralizing` · `steer find merged moralizing --dictionary dictionary` · "
    '`steer find merged --as rhymes "You answer in rhyming couplets." --opposite "You answer in plain prose."` · '
    "`steer find merged --votes votes.jsonl`"
)
def find(
    model: Model,
    trait: Annotated[
        str | None, typer.Argument(help="A trait that ships, your own .yaml file, or with --as a sentence.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--as", help="Name of a new trait. TRAIT is then the instruction: what the model is to be."),
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(help="In place of TRAIT: a file of votes, 20 or more. [default name: my-taste]")
    ] = None,
    opposite: Annotated[
        str | None, typer.Option(help="The instruction for the low end of the slider. Default: none.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter replies, and no sites tried by steering.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also measure how far the slider can be moved.")
    ] = False,
    keep: Annotated[
        list[str], typer.Option(help="NAME[,NAME]: traits that the slider should not move; repeatable.")
    ] = [],  # noqa: B006
    site: Annotated[int | None, typer.Option(help="Use the residual stream after this block.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default the direction is saved by name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the replies.")] = 0,
    no_think: Annotated[
        bool, typer.Option("--no-think", help="Replies without thoughts; find asks for them anyway.")
    ] = True,
    dictionary: Annotated[Path | None, typer.Option(help="Rank this dictionary's latents instead.")] = None,
    steps: Annotated[bool, typer.Option("--steps", help="Print the progress as lines on stderr.")] = False,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Find the direction of a trait or a taste, with held-out scores; with --dictionary a trait's features."""
    if votes is not None:
        if trait is not None or opposite is not None or quick or keep or dictionary is not None:
            raise UsageError("--votes: expected no TRAIT and no option of traits beside it; leave them out")
        from steer.core.votes import usable_votes
        from steer.finding.taste import NAME, find_taste
        from steer.model.steered import load
        from steer.verbs.tables import taste_table

        usable = usable_votes(votes)  # before the model is loaded
        live = load(model, device_map=device_map, four_bit=four_bit)
        place = _writable_place(live, name or NAME, out)
        taste = find_taste(
            live, usable, name=name or NAME, site=site, seed=seed, verdict=True, calibrate=calibrate,
            say=say if as_json else lambda _: None,
        )  # fmt: skip
        _save_found(taste.direction, place, taste.as_json(), taste_table(taste), model, "1", as_json)
        return
    if trait is None:
        raise UsageError("TRAIT: expected a trait, found none; name one, or give --votes FILE")
    from steer.core.trait import Trait

    if name is None and opposite is not None:
        raise UsageError("--opposite: expected --as NAME beside it, found none; add it")
    described = Trait.load(trait) if name is None else Trait.from_sentences(trait, opposite, name)
    if dictionary is not None:
        if site is not None or out is not None:
            raise UsageError("--dictionary: expected no --site or --out beside it; the results go into the dictionary")
        if quick:
            raise UsageError("--dictionary: expected no --quick beside it; latents need every reply")
        if keep:
            raise UsageError("--dictionary: expected no --keep beside it; latents are not projected")
        from steer.finding.features import find_features
        from steer.model.steered import load
        from steer.verbs.tables import latent_table

        live = load(model, device_map=device_map, four_bit=four_bit)
        features = find_features(live, described, dictionary, seed=seed)
        emit(features.as_json(), as_json, latent_table(features))
        return
    from steer.finding.traits import STAGES, find_trait
    from steer.model.steered import load
    from steer.progress import ProgressLines, bar
    from steer.verbs.tables import finding_table

    live = load(model, device_map=device_map, four_bit=four_bit)
    place = _writable_place(live, described.name, out)
    kept = [name for names in keep for name in names.split(",")]
    found = find_trait(
        live, described, site=site, seed=seed, quick=quick, verdict=True, calibrate=calibrate, keep=kept,
        progress=ProgressLines(STAGES) if steps else bar,
    )  # fmt: skip
    _save_found(found.direction, place, found.as_json(), finding_table(found), model, "-1", as_json)


def _writable_place(live: SteeredModel, name: str, out: Path | None) -> Path:
    """The file for a direction, `out` or one by its name, which can be written."""
    from steer.checkpoint.library import direction_place

    return check_writable(out or direction_place(live.sketch(), name))


def _save_found(
    direction: Direction, place: Path, result: dict[str, Any], text: str, model: str, amount: str, as_json: bool
) -> None:
    """Save a direction, and print what was found and how to try it."""
    direction.save(place)
    try_it = f"Try it: steer chat {model} --slider {direction.name}={amount}"
    emit({"direction": str(place), **result}, as_json, f"{text}\n{place}\n{try_it}")


app.add_typer(cli_traits.app, name="traits")
cli_dictionaries.register(app)
app.command(
    epilog="Examples: `steer bake merged calm --ablate moralizing` · "
    "`steer bake merged calm --ablate moralizing --as adapter --blocks 8-20` · "
    "`steer bake merged calm --ablate moralizing --search --keep compliance`"
)(cli_bake.bake)
app.command(epilog="Example: `steer verify calm`")(cli_bake.verify)
app.command(epilog="Example: `steer gguf merged merged.gguf --as Q8_0`")(cli_bake.gguf)
app.command(epilog="Example: `steer fit merged-q4.gguf merged --server http://127.0.0.1:8080`")(cli_bake.fit)


@app.command(epilog="Examples: `steer demo --out demo` · `steer demo --model my-checkpoint --out demo-of-mine`")
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint of yours (directory or hub id), or a mergekit recipe, which is merged first."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the checkpoints and the report go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of every reply.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    as_json: Json = False,
) -> None:
    """The whole way on the default model or your own: fetch, merge, find, steer, bake, verify, report."""
    from steer.verbs.demo import run
    from steer.verbs.tables import demo_table

    result = run(out, model, seed=seed, fresh=fresh, say=say)
    emit(result, as_json, demo_table(result))
    slider = f"--slider {result['bake']['trait']}=-1"
    typer.echo(f"\nNow talk to it: steer chat {result['source']} {slider}", err=as_json)


app.command(epilog="Examples: `steer chat merged --slider moralizing=-1` · `steer chat merged --card duke.png`")(
    cli_live.chat
)
app.command(epilog="Example: `steer calibrate merged --profile noir.yaml`")(cli_live.calibrate)
app.command(
    "eval",
    epilog="Examples: `steer eval merged --slider moralizing=-1 --against calm --quick` · "
    "`steer eval --compare monday/eval.json friday/eval.json`",
)(cli_measure.evaluate)
app.add_typer(cli_evolve.app, name="evolve")
app.command(epilog="Example: `steer serve merged --profile profiles/`")(cli_live.serve)
app.command(epilog="Examples: `steer ui merged` · `steer ui --server http://127.0.0.1:8321`")(cli_live.ui)


if __name__ == "__main__":
    main()

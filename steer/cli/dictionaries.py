"""The verbs that make and read dictionaries: harvest, train, features."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer

from steer.cli.common import ChatTemplate, DeviceMap, Dtype, Json, Model, emit
from steer.errors import UsageError

Text = Annotated[list[str], typer.Option(help="A .txt, .md, .jsonl[.gz] file or a datasets id; may be repeated.")]


def harvest(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A directory; a harvest that was stopped in it is continued.")],
    site: Annotated[list[int], typer.Option(help="Residual stream after this block; may be repeated.")],
    text: Text,
    tokens: Annotated[int | None, typer.Option(help="Tokens to keep; by default the whole text.")] = None,
    context: Annotated[int, typer.Option(help="Most tokens of a document.")] = 512,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    as_json: Json = False,
) -> None:
    """Write a model's residual streams on a text to disk, to train dictionaries on."""
    from steer.model.steered import load
    from steer.sae.harvest import harvest as run

    made = run(load(model, device_map=device_map), out, sites=site, sources=text, tokens=tokens, context=context)
    left = made.manifest["left_out"]
    result = {
        "harvest": str(out),
        "tokens": made.tokens,
        "sites": made.sites,
        "left_out": left,
        "ended": made.manifest["ended"],
        "norm": {str(s): made.norm(s) for s in made.sites},
    }
    counts = ", ".join(f"{v:,} {k}" for k, v in left.items() if isinstance(v, int))
    why = "the text ended" if made.manifest["ended"] == "text" else "as many as asked"
    sites = ", ".join(map(str, made.sites))
    emit(
        result,
        as_json,
        f"{out}: {made.tokens:,} tokens at sites {sites} ({why}); left out: {counts}\n"
        f"Train on it: steer train {out} dictionary",
    )


def features(
    dictionary: Annotated[Path, typer.Argument(help="A dictionary's directory.")],
    search: Annotated[str | None, typer.Option(help="Words that labels or contexts must contain, all of them.")] = None,
    trait: Annotated[str | None, typer.Option(help="Order by how well a latent reads this trait.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the dashboard, one self-contained page.")] = None,
    label: Annotated[Path | None, typer.Option(help="Label all latents anew from this harvest.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint, if it has moved since the manifest was written.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Rows to show.")] = 20,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    as_json: Json = False,
) -> None:
    """List, search and label a dictionary's features; write its dashboard."""
    from steer.verbs.catalogue import catalogue

    result, text = catalogue(dictionary, search=search, trait=trait, html=html, label=label, model=model, limit=limit)
    emit(result, as_json, text)


def train(
    source: Annotated[str, typer.Argument(help="What steer harvest wrote, or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="A new directory; complete or absent afterwards.")],
    site: Annotated[int | None, typer.Option(help="The site to train on; needed if there are several.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text that the checkpoint reads; for training on a checkpoint.")
    ] = None,
    context: Annotated[int, typer.Option(help="Most tokens of a document, for training on a checkpoint.")] = 512,
    parent: Annotated[str | None, typer.Option("--from", help="Dictionary to start from; its fit is shown.")] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint harvested, if it has moved.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a training that was stopped.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two checkpoints of the training.")] = 120.0,
    track: Annotated[str | None, typer.Option(help="tensorboard or wandb, beside the CSV file.")] = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    *,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train a dictionary on a harvest, or on a model that reads a text."""
    from steer.sae import parallel
    from steer.sae.options import TrainOptions
    from steer.sae.train import train_dictionary
    from steer.verbs.tables import training_table

    if isinstance(widths := options.pop("widths"), str):
        options["widths"] = _widths(widths)
    made = train_dictionary(
        source, out, TrainOptions(**options), site=site, text=text or (), context=context, parent=parent, model=model,
        resume=resume, every=every, track=cast(Any, track),
    )  # fmt: skip
    if parallel.launched_first():
        emit({"dictionary": str(out), **made.as_json()}, as_json, f"{training_table(made)}\n{out}: written")


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(w) for w in text.split(",") if w.strip())
    except ValueError:
        raise UsageError(f"widths: expected numbers with commas, as in 288,1152,4608, found {text!r}") from None


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of TrainOptions in place of its `**options`."""
    from steer.sae.options import TrainOptions

    *fixed, as_json, _ = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(TrainOptions, include_extras=True)
    added = []
    for field in fields(TrainOptions):
        (kind, text), default = get_args(hints[field.name]), field.default
        if get_origin(kind) is tuple:
            kind, default = str, ""
        elif get_args(kind):  # a Literal
            kind = str
        hint = Annotated[kind, typer.Option(help=text)]
        added.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    parameters = [*fixed, *added, as_json]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(epilog="Example: `steer harvest merged activations --site 14 --text corpus/chats.jsonl.gz`")(harvest)
    app.command(
        "train",
        epilog="Examples: `steer train activations dictionary --k 32` · "
        "`steer train merged dictionary --site 14 --text corpus/chats.jsonl.gz`",
    )(_with_options(train))
    app.command(epilog="Example: `steer features dictionary --search lighthouse --html features.html`")(features)

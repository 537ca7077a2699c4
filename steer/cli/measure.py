"""The verb that measures: eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.common import ChatTemplate, DeviceMap, Dtype, FourBit, Json, emit, say, stoppable
from steer.errors import SteerError, UsageError

TIMEOUT = 120.0
"""Seconds that a server may take for an answer."""


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="The model that the others are compared with: a directory or a hub id.")
    ] = None,
    against: Annotated[list[str], typer.Option(help="Another checkpoint; may be repeated.")] = [],  # noqa: B006
    profile: Annotated[list[Path], typer.Option(help="The model under a profile; may be repeated.")] = [],  # noqa: B006
    slider: Annotated[
        list[str], typer.Option(help="The model under NAME=AMOUNT, or several with commas; may be repeated.")
    ] = [],  # noqa: B006
    probes: Annotated[str | None, typer.Option(help="Some of the probes, with commas between; by default all.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new directory, or that of a run to continue. [default: eval]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer items: minutes on two cores.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the items and the replies.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    damage: Annotated[
        bool, typer.Option("--damage", help="Also damage the model on purpose: probes that miss it are reported.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Join two results, A.json B.json, in place of measuring.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Also run these tasks of lm-eval, names or YAML files, with commas between.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask an OpenAI-compatible server; MODEL is then the checkpoint with its tokenizer."),
    ] = None,
    model_name: Annotated[str, typer.Option(help="One of the server's models. [default: the first]")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that the server may take for an answer.")] = TIMEOUT,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Measure what a merge, a slider or a bake cost and changed: the same items for all, paired, no judge model."""
    from steer.core.slider import parse_amounts
    from steer.measure.evaluation import REPORT
    from steer.verbs import eval as verb
    from steer.verbs.tables import eval_table

    if compare is not None:
        _refuse(ctx, "--compare", allowed={"out"}, do="leave one out")
        result = verb.compare(compare, out)
        emit(result, as_json, "\n".join([eval_table(result), *([str(out / REPORT)] if out else [])]))
        return
    place, names = out or Path("eval"), None if probes is None else _names(probes)
    if url is not None:
        allowed = {"model", "model_name", "timeout", "probes", "out", "quick", "seed", "fresh", "chat_template"}
        _refuse(ctx, "--url", allowed=allowed, do="measure it alone and join with --compare")
        with stoppable(f"what is done is in {place}, run the same command again to go on"):
            result = verb.evaluate_endpoint(
                url, name=model_name, tokenizer=model, probes=names, out=place, quick=quick, seed=seed, fresh=fresh,
                api_key=os.environ.get("STEER_API_KEY"), timeout=timeout, say=say,
            )  # fmt: skip
        _emit_run(result, as_json, place)
        return
    if model is None:
        raise UsageError("eval: expected a model, --url or --compare, found none of them; name a checkpoint")
    if model_name or timeout != TIMEOUT:
        raise UsageError("--model-name and --timeout: expected --url beside them, found none; name the server")
    amounts = [parse_amounts(several.split(",")) for several in slider]
    with stoppable(f"what is done is in {place}, run the same command again to go on"):
        result = verb.evaluate(
            model, against=against, profiles=profile, probes=names, sliders=amounts,
            out=place, quick=quick, seed=seed, fresh=fresh, damage=damage,
            lm_eval=() if lm_eval is None else _names(lm_eval), say=say,
            device_map=device_map, four_bit=four_bit,
        )  # fmt: skip
    _emit_run(result, as_json, place)


def _names(text: str) -> list[str]:
    """Split a list with commas. An empty name stays, so that it is refused where names are known."""
    return [name.strip() for name in text.split(",")]


def _refuse(ctx: typer.Context, option: str, *, allowed: set[str], do: str) -> None:
    """Raise UsageError for an argument of the command line that `option` would ignore."""
    known = {option.strip("-"), "as_json", *allowed}
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in known and source is not None and source.name == "COMMANDLINE":
            found = name if name == "model" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: expected no {found} beside it, found one; {do}")


def _emit_run(result: dict[str, Any], as_json: bool, place: Path) -> None:
    """Print a run's result. Errors: SteerError if no probe could be asked, so that scripts see it."""
    from steer.measure.evaluation import REPORT
    from steer.verbs.tables import eval_table

    emit(result, as_json, f"{eval_table(result)}\n{place / REPORT}")
    if not any(probe["summary"] for probe in result["probes"]):
        raise SteerError(f"{place}: expected figures of one probe at least, found none; the lines above say why")

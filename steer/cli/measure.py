"""The verb that measures: eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.common import ChatTemplate, DeviceMap, Dtype, FourBit, Json, emit, stoppable, tell
from steer.errors import UsageError


def evaluate(
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
        bool, typer.Option("--damage", help="Also damage the model on purpose: a probe that does not notice says so.")
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
    timeout: Annotated[float, typer.Option(help="Seconds that the server may take for an answer.")] = 120.0,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    four_bit: FourBit = False,
    as_json: Json = False,
) -> None:
    """Measure what a merge, a slider or a bake cost and changed: the same items for all, paired, no judge model."""
    from steer.core.slider import parse_amount
    from steer.measure.evaluation import REPORT
    from steer.verbs import eval as verb
    from steer.verbs.tables import eval_table

    if compare is not None:
        if model is not None:
            raise UsageError(f"--compare: expected no model beside it, found {model}; leave one out")
        result = verb.compare(compare, out)
        emit(result, as_json, "\n".join([eval_table(result), *([str(out / REPORT)] if out else [])]))
        return
    place, names = out or Path("eval"), probes.split(",") if probes else None
    if url is not None:
        if against or profile or slider or damage or lm_eval:
            raise UsageError(
                "--url: expected one model, found other arms or tasks; measure them alone and join with --compare"
            )
        with stoppable(f"what is done is in {place}, run the same command again to go on"):
            result = verb.evaluate_endpoint(
                url, name=model_name, tokenizer=model, probes=names, out=place, quick=quick, seed=seed, fresh=fresh,
                api_key=os.environ.get("STEER_API_KEY"), timeout=timeout, say=tell,
            )  # fmt: skip
        emit(result, as_json, f"{eval_table(result)}\n{place / REPORT}")
        return
    if model is None:
        raise UsageError("eval: expected a model, --url or --compare, found none of them; name a checkpoint")
    with stoppable(f"what is done is in {place}, run the same command again to go on"):
        result = verb.evaluate(
            model, against=against, profiles=profile, probes=names,
            sliders=[dict(parse_amount(s) for s in several.split(",")) for several in slider],
            out=place, quick=quick, seed=seed, fresh=fresh, damage=damage,
            lm_eval=lm_eval.split(",") if lm_eval else (), say=tell,
            device_map=device_map, four_bit=four_bit,
        )  # fmt: skip
    emit(result, as_json, f"{eval_table(result)}\n{place / REPORT}")

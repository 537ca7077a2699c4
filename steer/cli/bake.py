"""The verbs that write edited weights and check them: bake, verify, gguf, fit.

The work is in `steer.verbs.bake`, `steer.verbs.bake_search`, `steer.baking.verify`, `steer.checkpoint.gguf_file` and
`steer.serve.llama_cpp.fit`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.baking.certificate import FORMS, Form, server_command
from steer.cli.common import ChatTemplate, Dtype, Json, Model, emit, stoppable
from steer.errors import UsageError
from steer.plain_text import plain

if TYPE_CHECKING:
    from steer.baking.certificate import Certificate


def bake(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory; complete or absent afterwards.")],
    ablate: Annotated[list[str], typer.Option(help="A trait, or a direction's file, to remove; repeatable.")] = [],  # noqa: B006
    add: Annotated[list[str], typer.Option(help="NAME=AMOUNT to add as a bias; may be repeated.")] = [],  # noqa: B006
    profile: Annotated[Path | None, typer.Option(help="A profile's sliders, in place of --ablate and --add.")] = None,
    form: Annotated[str, typer.Option("--as", help="checkpoint, adapter (a PEFT LoRA), or gguf (for llama.cpp).")]
    = "checkpoint",
    strength: Annotated[float, typer.Option(help="Share of the direction that is removed, up to 1.")] = 1.0,
    blocks: Annotated[str | None, typer.Option(help="FIRST-LAST block to edit; by default every writer.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Strength of attention: a number, or PEAK,WIDTH,FLOOR[,HEIGHT]; no embedding.")
    ] = None,
    mlp: Annotated[str | None, typer.Option(help="Strength of MLPs, as --attention; 1 if only that is given.")] = None,
    method: Annotated[str, typer.Option(help="plain; projected or biprojected spare neutral means.")] = "plain",
    norm_preserving: Annotated[bool, typer.Option("--norm-preserving", help="Columns keep their norms.")] = False,
    neutral: Annotated[Path | None, typer.Option(help="File of neutral means; measured if missing.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search for the gentlest edit that works.")
    ] = False,
    trials: Annotated[int | None, typer.Option(help="Edits that --search tries, default 48; more continue it.")] = None,
    keep: Annotated[list[str], typer.Option(help="A trait that --search must not change; repeatable.")] = [],  # noqa: B006
    tolerance: Annotated[float | None, typer.Option(help="How far a rate of --keep may move, default 0.1.")] = None,
    goal: Annotated[
        float | None, typer.Option(help="Share of the untouched rate to get below, default 0.4; see README.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Nats per token that it may cost; by default as the plain bake.")
    ] = None,
    search_dir: Annotated[Path | None, typer.Option(help="Study, plot and figures of --search; default OUT-search.")]
    = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the replies and trials of --search.")] = None,
    edit_mtp: Annotated[
        bool, typer.Option("--edit-mtp", help="Edit layers for multi-token prediction too; only in a checkpoint.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Use a direction of another checkpoint.")] = False,
    dtype: Dtype = None,
    chat_template: ChatTemplate = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Remove directions from the weights and write a new checkpoint, an adapter or files for llama.cpp, with a
    certificate.

    --search tries edits on the live model, on fit topics: plain, biprojected and norm-preserving ablation, ranges of
    blocks, kernels for attention and MLPs, and a bias. The same command continues a search that was
    stopped. The result is measured on held-out topics beside the plain bake.
    """
    from steer.checkpoint.staging import check_output

    if not search:
        check_output(out)  # before torch is imported
    from steer.core.method import PROJECTIONS, Strengths
    from steer.core.slider import parse_amounts
    from steer.progress import byte_bar
    from steer.verbs.bake import HowToAblate, parse_strength
    from steer.verbs.bake import bake as run

    what: Form = _one_of("--as", form, FORMS)
    command, added = shlex.join(["steer", *sys.argv[1:]]), parse_amounts(add)
    plan: list[str] = []
    say: Callable[[str], None] = plan.append if as_json else lambda line: typer.echo(plain(line))
    strengths: dict[str, Any] = {
        n: parse_strength(s, f"--{n}") for n, s in _given(attention=attention, mlp=mlp).items()
    }
    how = {
        "strength": strength,
        "blocks": _blocks(blocks),
        "strengths": Strengths(**strengths) if strengths else None,
        "method": _one_of("--method", method, PROJECTIONS),
        "norm_preserving": norm_preserving,
        "neutral": neutral,
    }
    wishes = {
        "--trials": trials, "--tolerance": tolerance, "--goal": goal, "--max-kl": max_kl, "--search-dir": search_dir,
        "--seed": seed, "--keep": keep or None,
    }  # fmt: skip
    searched = None
    if search:
        if len(ablate) != 1 or added or profile or force or HowToAblate(**how) != HowToAblate():
            raise UsageError("--search: expected one --ablate TRAIT beside it and nothing else that it would choose")
        from steer.measure.search.trials import Goal
        from steer.verbs.bake_search import search_bake

        searched = search_bake(
            model, out, ablate[0], keep=keep, form=what, edit_mtp=edit_mtp, command=command, say=say,
            goal=Goal(**_given(share=goal, max_kl=max_kl, tolerance=tolerance)),
            **_given(trials=trials, folder=search_dir, seed=seed),
        )  # fmt: skip
        cert = searched.certificate
    elif names := ", ".join(_given(**wishes)):
        raise UsageError(f"{names}: expected --search beside it, found none")
    else:
        stop_message = (
            "nothing is written yet" if what == "gguf" else "what is finished is kept, run the same command to go on"
        )
        with stoppable(stop_message), byte_bar("baking") as progress:
            cert = run(
                model, out, ablate=ablate, add=added, profile=profile, form=what, edit_mtp=edit_mtp, force=force,
                command=command, say=say, progress=progress, **how,
            )  # fmt: skip
    summary = {
        what: str(out),
        "as": what,
        "plan": [line for text in plan for line in text.split("\n")],
        "edit": cert.edit,
        "writers_found": cert.writers_found,
        "writers_edited": cert.writers_edited,
        "worst_remaining": cert.worst_remaining,
        "edit_mtp": cert.edit_mtp,
        "not_loaded_by_transformers": list(cert.unloaded),
        "untie_to_merge": cert.untie_to_merge,
    }
    if what == "gguf":
        summary["llama_server"] = server_command(cert, str(out))
    text = _summary(cert, out)
    if searched is not None:
        from steer.verbs.tables import search_table

        summary["search"] = {"folder": str(searched.folder), **searched.result}
        text = f"{search_table(searched.result)}\nEverything tried: {searched.folder / 'pareto.html'}\n{text}"
    emit(summary, as_json, text)


def verify(
    directory: Annotated[Path, typer.Argument(help="The output of a bake.")],
    source: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was made from; everything is then computed again."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a baked checkpoint or adapter again and check every statement of its certificate."""
    from steer.baking.verify import verify as run
    from steer.progress import byte_bar

    with byte_bar("verifying") as progress:
        checks = run(directory, progress, source=source)
    result = {"checkpoint": str(directory), "ok": True, "checks": {c.name: c.detail for c in checks}}
    emit(result, as_json, "\n".join([f"ok  {c.name}: {c.detail}" for c in checks]))


def _summary(cert: Certificate, out: Path) -> str:
    facts = []
    if cert.writers:
        facts.append(
            f"{cert.writers_edited} of {cert.writers_found} writers edited; at most {cert.worst_remaining:.2%} of the "
            f"direction remains (asked: {1 - cert.strength:.0%})"
        )
    if sites := sorted({b.site for b in cert.biases if b.site is not None}):
        facts.append(f"adds after blocks {', '.join(map(str, sites))}")
    if weights := [f for f in cert.left_out if f.endswith(".safetensors")]:
        facts.append(f"left out, as the index does not name them: {', '.join(weights)}")
    if cert.unloaded:
        facts.append(f"{len(cert.unloaded)} tensors not edited, as transformers does not load them")
    if cert.untie_to_merge:
        facts.append(
            "do not merge it as it is: the LM head of the source is its embedding, and would change too; its README.md "
            "says how to untie them first"
        )
    run = f"\nRun it, on a GGUF of the same model: {server_command(cert, str(out))}" if cert.form == "gguf" else ""
    return f"{out}: {'; '.join(facts)}\nCheck it: steer verify {out}{run}"


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; for the others the library has defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _one_of(option: str, text: str, names: tuple[Any, ...]) -> Any:
    if text not in names:
        raise UsageError(f"{option}: expected one of {', '.join(names)}, found {text!r}")
    return text


def _blocks(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdigit() or not last.isdigit():
        raise UsageError(f"blocks: expected FIRST-LAST, as in 8-20, found {text!r}")
    return int(first), int(last)


def gguf(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new file; complete or absent afterwards.")],
    stored: Annotated[
        str | None, typer.Option("--as", help="F32, F16, BF16, Q8_0 or Q4_0; by default the dtype of the checkpoint.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A GGUF of the same family whose tokenizer is taken, not tokenizer.json's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of the Llama family as one GGUF file for llama.cpp."""
    from steer.checkpoint.gguf_file import write_gguf
    from steer.verbs.bake import checkpoint_dir

    kept = write_gguf(checkpoint_dir(model), out, stored, tokenizer=tokenizer)  # type: ignore[arg-type]
    emit({"out": str(out), "stored": kept}, as_json, f"{out}: {kept}, {out.stat().st_size / 1e6:,.0f} MB")


def fit(
    gguf: Annotated[str, typer.Argument(help="The GGUF that llama-server has loaded, by its file's name.")],
    model: Annotated[str, typer.Argument(help="The checkpoint that it was made of.")],
    server: Annotated[str, typer.Option(help="The llama-server's address; its key is LLAMA_API_KEY.")],
    baked: Annotated[
        list[Path], typer.Option(help="Output of bake --as gguf, if llama-server is elsewhere; may be repeated.")
    ] = [],  # noqa: B006
    chat_template: ChatTemplate = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure whether the sliders of a llama-server change its quantised model as they change the original."""
    from steer.errors import MismatchError
    from steer.model.steered import describe, load
    from steer.progress import bar
    from steer.serve.llama_cpp.engine import LlamaCppEngine
    from steer.serve.llama_cpp.fit import REPLIES, TOKENS, measure_fit
    from steer.verbs.bake import checkpoint_dir
    from steer.verbs.tables import text_table

    key, place = os.environ.get("LLAMA_API_KEY"), checkpoint_dir(model)
    with closing(LlamaCppEngine(describe(model), url=server, place=place, baked=baked, api_key=key)) as engine:
        if engine.file != Path(gguf).name:
            raise MismatchError(f"{server}: expected {gguf}, found {engine.file}; start llama-server with it")
        sliders = sum(a.slider is not None for a in engine.adapters.adapters)
        with bar("scoring", 2 * sliders * REPLIES * TOKENS, "tokens") as advance:
            found = measure_fit(load(model), engine, advance=advance)
    columns = ("slider", "tokens", "plain (nats)", "change (nats)", "slope", "distance")
    rows = [
        (f.slider, str(f.tokens), f"{f.plain:.3f}", f"{f.change:.3f}", f"{f.slope:.2f}", f"{f.distance:.0%}")
        for f in found
    ]
    table = "\n".join([text_table(columns, rows), *(f.warning for f in found if f.warning)])
    emit({"gguf": gguf, "sliders": [f.as_json() for f in found]}, as_json, table)

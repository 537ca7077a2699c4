"""The verbs that write edited weights and check them: bake, verify.

The work is in `steer.verbs.bake`, `steer.verbs.bake_search` and `steer.baking.verify`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.baking.form import FORMS, Form
from steer.cli.common import Dtype, Json, Model, emit, stoppable
from steer.errors import UsageError
from steer.plain_text import plain

if TYPE_CHECKING:
    from steer.baking.certificate import Certificate
    from steer.core.method import Strengths
    from steer.verbs.bake_search import Searched


def bake(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory; complete or absent afterwards.")],
    ablate: Annotated[list[str], typer.Option(help="A trait, or a direction's file, to remove; repeatable.")] = [],  # noqa: B006
    add: Annotated[list[str], typer.Option(help="NAME=AMOUNT to add as a bias; may be repeated.")] = [],  # noqa: B006
    profile: Annotated[Path | None, typer.Option(help="A profile's sliders, in place of --ablate and --add.")] = None,
    form: Annotated[str, typer.Option("--as", help="checkpoint, adapter (a PEFT LoRA), or gguf (a control vector).")]
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
        bool, typer.Option("--search", help="Search the gentlest edit that works.")
    ] = False,
    trials: Annotated[int | None, typer.Option(help="Edits that --search tries, default 48; more go on.")] = None,
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
    force: Annotated[bool, typer.Option("--force", help="Use a direction of another checkpoint.")] = False,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Remove directions from the weights and write a new checkpoint, or an adapter, with a certificate.

    --search tries edits on the live model, on fit topics: plain, biprojected and norm-preserving ablation, ranges of
    blocks, kernels for attention and MLPs, and a bias. A stopped search goes on where it stopped. The result is
    measured on held-out topics beside the plain bake.
    """
    from steer.checkpoint.staging import check_output

    if not search:
        check_output(out)  # before torch is imported
    from steer.core.slider import parse_amount
    from steer.progress import byte_bar
    from steer.verbs.bake import HowToAblate
    from steer.verbs.bake import bake as run

    what: Form = _one_of("--as", form, FORMS)
    command, added = shlex.join(["steer", *sys.argv[1:]]), dict(parse_amount(a) for a in add)
    plan: list[str] = []
    say: Callable[[str], None] = plan.append if as_json else lambda line: typer.echo(plain(line))
    how = {
        "strength": strength,
        "blocks": _blocks(blocks),
        "strengths": _strengths(attention, mlp),
        "method": _method(method),
        "norm_preserving": norm_preserving,
        "neutral": neutral,
    }
    searched = None
    wishes = {
        "trials": trials,
        "tolerance": tolerance,
        "goal": goal,
        "max_kl": max_kl,
        "folder": search_dir,
        "seed": seed,
    }
    wishes = {name: value for name, value in wishes.items() if value is not None} | ({"keep": keep} if keep else {})
    if search:
        if len(ablate) != 1 or added or profile or force or HowToAblate(**how) != HowToAblate():
            raise UsageError("--search: expected one --ablate TRAIT beside it and nothing else that it would choose")
        searched = _searched(model, out, ablate[0], form=what, command=command, say=say, **wishes)
        cert = searched.certificate
    else:
        if wishes:
            names = ", ".join({"max_kl": "--max-kl", "folder": "--search-dir"}.get(n, f"--{n}") for n in wishes)
            raise UsageError(f"{names}: expected --search beside it, found none")
        stop_message = (
            "nothing is written yet" if what == "gguf" else "what is finished is kept, run the same command to go on"
        )
        with stoppable(stop_message), byte_bar("baking") as progress:
            cert = run(
                model, out, ablate=ablate, add=added, profile=profile, form=what, force=force, command=command,
                say=say, progress=progress, **how,
            )  # fmt: skip
    summary = {
        what: str(out),
        "as": what,
        "plan": [line for text in plan for line in text.split("\n")],
        "edit": cert.edit,
        "writers_found": cert.writers_found,
        "writers_edited": cert.writers_edited,
        "worst_remaining": cert.worst_remaining,
        "not_loaded_by_transformers": list(cert.unloaded),
        "untie_to_merge": cert.untie_to_merge,
    }
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
    return f"{out}: {'; '.join(facts)}\nCheck it: steer verify {out}"


def _searched(model: str, out: Path, trait: str, **wishes: Any) -> Searched:
    from steer.measure.search.trials import Goal
    from steer.verbs.bake_search import search_bake

    names = {"goal": "share", "max_kl": "max_kl", "tolerance": "tolerance"}
    goal = Goal(**{field: wishes.pop(name) for name, field in names.items() if name in wishes})
    return search_bake(model, out, trait, goal=goal, **wishes)


def _one_of(option: str, text: str, names: tuple[Any, ...]) -> Any:
    if text not in names:
        raise UsageError(f"{option}: expected one of {', '.join(names)}, found {text!r}")
    return text


def _method(text: str) -> Any:
    from steer.core.method import PROJECTIONS

    return _one_of("--method", text, PROJECTIONS)


def _strengths(attention: str | None, mlp: str | None) -> Strengths | None:
    if attention is None and mlp is None:
        return None
    from steer.core.method import Strengths
    from steer.verbs.bake import parse_strength

    return Strengths(
        attention=1.0 if attention is None else parse_strength(attention, "--attention"),
        mlp=1.0 if mlp is None else parse_strength(mlp, "--mlp"),
    )


def _blocks(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not dash or not first.isdigit() or not last.isdigit():
        raise UsageError(f"blocks: expected FIRST-LAST, as in 8-20, found {text!r}")
    return int(first), int(last)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(
        epilog="Examples: `steer bake merged calm --ablate moralizing` · "
        "`steer bake merged calm --ablate moralizing --as adapter --blocks 8-20` · "
        "`steer bake merged calm --ablate moralizing --search --keep compliance`"
    )(bake)
    app.command(epilog="Example: `steer verify calm`")(verify)

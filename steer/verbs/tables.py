"""Results of the verbs as text tables, for a terminal or a log. `steer.cli` prints them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from steer.core.lists import ranges
from steer.plain_text import shortened

if TYPE_CHECKING:
    from steer.checkpoint.anatomy import Anatomy
    from steer.checkpoint.kin import Kinship
    from steer.checkpoint.layouts import Addend
    from steer.core.direction import Direction
    from steer.finding.features import FoundFeatures
    from steer.finding.latents import SteeringCheck
    from steer.finding.taste import FoundTaste
    from steer.finding.traits import FoundDirection
    from steer.measure.calibrate import Calibration, TriedAmount
    from steer.measure.verdict import Verdict
    from steer.sae.records import FeatureRecord
    from steer.sae.train import TrainedDictionary


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> str:
    """Return a table as text. The first column and the last `left` ones are aligned left, the others right."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or i >= len(columns) - left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=110, markup=False, emoji=False).print(table)  # tokens and names are no markup
    return out.getvalue()


def kin_table(kinship: Kinship) -> str:
    """Return how far each model is from the base, what is new in it and left of it, its cosines, and all in words."""
    models = kinship.as_json()["models"]
    rows = [
        [m["label"], f"{m['of_base']:.2%}", f"{m['new']:.1%}", "-" if m["left"] is None else f"{m['left']:.1%}",
         *(f"{c:.2f}" for c in cosines)]
        for m, cosines in zip(models, kinship.cosines, strict=True)
    ]  # fmt: skip
    columns = ["model", "of base", "new", "left", *(f"cos {n}" for n in range(1, len(rows) + 1))]
    return "\n".join([text_table(columns, rows), *kinship.sentences()])


def anatomy_as_json(anatomy: Anatomy) -> dict[str, Any]:
    """Return an anatomy as JSON: sizes, and for each kind of block what it adds to the residual stream."""
    structure = {k: v for k, v in asdict(anatomy).items() if k != "where"}
    layout = {k: v for k, v in structure.pop("layout").items() if k not in ("names", "experts_keys", "tied", "blocks")}
    kinds = [{"blocks": numbers, "adds": [asdict(a) for a in adds]} for numbers, adds in _kinds(anatomy)]
    return {**structure, "layout": layout, "kinds": kinds}


def anatomy_table(anatomy: Anatomy) -> str:
    """Return what each kind of block adds to the residual stream, and where the stream begins and ends."""
    layout, rows = anatomy.layout, []
    for numbers, adds in _kinds(anatomy):
        for addend in adds:
            for part in addend.forms[0]:
                what = "experts" if part.stacked or "{}" in part.weight else addend.kind
                bias = part.bias.rpartition(".")[2] if part.bias else ""
                scale = "" if addend.scale == 1 else f"{addend.scale:.4g}"
                norms = ", ".join(reversed(addend.norms))
                rows.append([ranges(numbers), what, part.weight, str(part.axis), bias, norms, scale])
    offset, tied = " + 1" if layout.gain_offset else "", " (the embedding)" if anatomy.tied else ""
    ends = [
        f"stream begins: {', '.join(layout.base + e for e in layout.embeddings)}",
        f"stream ends: {anatomy.final_norm_module} ({'LayerNorm' if layout.centred else 'RMSNorm'}, gain = weight"
        f"{offset}), then {anatomy.head_module}{tied}",
    ]
    if anatomy.logit_scale != 1:
        ends.append(f"logits: times {anatomy.logit_scale:.6g}")
    if anatomy.logit_softcap:
        ends.append(f"logits: at most {anatomy.logit_softcap:g} (tanh)")
    experts = f", {anatomy.experts} experts" if anatomy.experts else ""
    return (
        f"{anatomy.architecture}: {anatomy.blocks} blocks, residual width {anatomy.width}, {anatomy.vocab} tokens"
        f"{experts}\n"
        + text_table(["blocks", "adds", "weight on disk", "axis", "bias", "norm after it", "scale"], rows, left=6)
        + "\n".join(
            [*ends, "proved: hooks and baked weights give the same logits on a tiny random model of this class"]
        )
    )


def _kinds(anatomy: Anatomy) -> list[tuple[list[int], tuple[Addend, ...]]]:
    """(numbers of the blocks, what they add) for each kind of block that the model has."""
    numbers: dict[int, list[int]] = {}
    for block in range(anatomy.blocks):
        numbers.setdefault(anatomy.kinds[block] if anatomy.kinds else 0, []).append(block)
    return [(of_kind, anatomy.layout.blocks[kind]) for kind, of_kind in numbers.items()]


def finding_table(found: FoundDirection) -> str:
    """Return the held-out AUROC of every site, and the effect of moving the tried sites."""
    checks, d, rows = {c.site: c for c in found.checks}, found.direction, []
    for site, auroc in enumerate(found.candidates.auroc):
        c = checks.get(site)
        tried = [f"{c.below:.2f}", f"{c.above:.2f}", f"{c.kl:.3f}", f"{c.repetition:.3f}"] if c else [""] * 4
        rows.append([str(site), f"{auroc:.3f}", *tried, "chosen" if site == d.site else ""])
    markers = f" (marker words alone {found.scorer.marker_auroc:.3f})" if found.scorer.trait.markers else ""
    return (
        text_table(["site", "held-out AUROC", "at -1", "at +1", "KL at -1", "repetition", ""], rows)
        + f"{d.name}: site {d.site}, amount 1 moves the residual stream by {d.share(1):.2f} of its median "
        f"norm; text scorer AUROC {found.scorer.auroc:.3f}{markers}"
        + (_KEPT.format(", ".join(kept["traits"]), **kept) if (kept := d.provenance.get("keep")) else "")
        + _slider_lines(d, found.verdict)
    )


def taste_table(found: FoundTaste) -> str:
    """Return how well a direction predicts votes, and what its slider does."""
    return found.line + _slider_lines(found.direction, found.verdict)


def _slider_lines(d: Direction, verdict: Verdict | None) -> str:
    """The range and the verdict of a slider, where they were measured."""
    return (f"\nreplies hold together from {d.calibrated[0]:g} to {d.calibrated[1]:g}" if d.calibrated else "") + (
        f"\n\n{verdict_table(d.name, verdict)}" if verdict else ""
    )


_KEPT = (
    "\nwithout the direction of {}: cosine {cosine:.2f} to the direction with it, "
    "held-out AUROC {auroc_before:.3f} before, {auroc:.3f} after"
)


def verdict_table(name: str, verdict: Verdict) -> str:
    """Return a slider's dose response on held-out topics, what it changes beside its trait, and the verdict."""
    rows = [
        [p.label if p.amount is None else f"amount {p.label}", f"{p.rate:.2f}", f"{p.probability:.2f}", f"{p.kl:.3f}",
         f"{p.repetition:.3f}"]
        for p in verdict.points
    ]  # fmt: skip
    effects = [
        [scored, f"{e.change:+.2f}", f"{e.random:+.2f}", f"{e.error:.2f}"]
        for scored, e in ((name, verdict.effect), *verdict.others.items())
    ]
    return (
        text_table(["held-out topics", "rate", "probability", "KL", "repetition"], rows)
        + "\n"
        + text_table(["scorer", "from -1 to +1", "random direction", "standard error"], effects)
        + f"verdict: {verdict.says}"
    )


def latent_table(found: FoundFeatures) -> str:
    """Return the ranked latents, how they and sets of them steer on fit topics, the dose responses on held-out topics,
    and which of them win over the difference of means."""
    d, replies = found.dictionary, found.ranking.replies
    head = (
        f"{found.trait} in {d.name}, site {d.site}: {found.detecting} of {d.latents} latents detect it at q < 0.05; "
        f"AUROC on {replies[2] + replies[3]} held-out replies,\nthe difference of means there "
        f"{found.direction_auroc:.3f}; a latent with a minus speaks against the trait\n"
    )
    rows = [[t.feature(d).name, *latent_cells(vars(t)), f"{t.score:.3f}", _words(t.tokens)] for t in found.top]
    columns = ["latent", "AUROC", "q", "attribution", "output score", "score", "tokens"]
    return (
        head
        + text_table(columns, rows, left=1)
        + (_screening(found.check) + _doses(found.check) if found.check else "")
    )


def latent_cells(latent: Mapping[str, Any]) -> list[str]:
    """Return AUROC, q, attribution and output score of a ranked latent."""
    return [f"{latent[key]:{how}}" for key, how in _LATENT_CELLS.items()]


_LATENT_CELLS = {"auroc": ".3f", "q": ".3f", "attribution": "+.4f", "output_score": "+.2f"}


def _screening(check: SteeringCheck) -> str:
    rows = [["untouched", "", f"{check.untouched.rate:.2f}"]]
    for s in check.screened:
        name, count = s.candidate.name, len(s.points)
        kl, again = sum(p.kl for p in s.points) / count, sum(p.repetition for p in s.points) / count
        rates = [f"{p.rate:.2f}" for p in s.points]
        rows.append([name, *rates, f"{kl:.3f}", f"{again:.3f}", f"{s.merit:+.2f}"])
        if a := s.ablated:
            rows.append([f"{name}, ablated", "", f"{a.rate:.2f}", "", f"{a.kl:.3f}", f"{a.repetition:.3f}"])
    note = f"amount 1 of each moves the residual stream by {check.share:.2f} of its median norm"
    return f"{text_table(['fit topics', 'rate at -2', '-1', '+1', 'KL', 'repetition', 'merit'], rows)}{note}\n"


def _doses(check: SteeringCheck) -> str:
    rows, lines = [], []
    for dose in check.doses:
        name = dose.candidate.name
        for p in dose.points:
            label = f"{name} {p.amount:+g}" if p.amount else "untouched"
            rows.append([label, *_cells(p.as_json()), f"{p.share:.2f}"])
        amounts = [f"{a:g}" for a, won in check.wins(dose).items() if won]
        against = f"wins over the difference of means at {' and '.join(amounts)}" if amounts else "does not win"
        verdict = "" if dose.candidate.kind == "direction" else f", {against}"
        lines.append(f"{name}: {'' if dose.monotone else 'not '}monotone{verdict}")
    if check.ablated:
        rows.append([check.ablated.label, *_cells(check.ablated.as_json()), "-"])
    return (
        text_table(["held-out topics", *_FIGURES, "share"], rows)
        + "\n".join(lines)
        + "\nmonotone: the rate never falls from one amount to the next, equal rates "
        "allowed; wins: a lower rate at the same displacement, at no more KL"
    )


def _words(tokens: Sequence[str], most: int = 44) -> str:
    return shortened(" ".join(t.strip().replace("\n", "\u21b5") for t in tokens), most)


def training_table(made: TrainedDictionary) -> str:
    """Return a trained dictionary's figures on held-out tokens, the training speed, and where the time went."""
    t, d = made.trained, made.dictionary
    fits = {"parent, on its own": made.parent_own, "parent, before training": made.parent and vars(made.parent)}
    rows = [
        [name, f"{fit['fvu']:.4f}", f"{fit['l0']:.1f}", f"{fit['alive']:.1%}"]
        for name, fit in (fits | {"trained": vars(t.fit)}).items()
        if fit
    ]
    lines = [
        f"held-out tokens: {t.fit.tokens:,}, outliers left out {t.fit.outliers}; {t.dead} of {d.latents} latents "
        f"had not fired for {made.dead_window:,} tokens at the end of training"
    ]
    if s := made.spliced:
        lines.append(
            f"cross-entropy on {s.tokens:,} held-out tokens: {s.plain:.3f} as it is, {s.spliced:.3f} with the "
            f"reconstruction, {s.ablated:.3f} with the mean: {s.recovered:.1%} recovered"
        )
    spent = ", ".join(f"{part} {share:.0%}" for part, share in t.parts.items())
    lines.append(f"{t.rate:,.0f} tokens/s, {t.share:.2f} of the fp32 encoder product alone; {spent}")
    return text_table(["", "FVU", "L0", "latents alive"], rows) + "\n".join(lines)


def feature_table(records: Sequence[FeatureRecord], trait: str | None) -> str:
    """Return features with their tokens, and the context on which each fires most."""
    rows = []
    for r in records:
        score = r.traits.get(trait or r.best_trait or "")
        shown = ""
        if r.contexts:
            c = r.contexts[0]
            shown = f"{c.before[-20:]}[{c.token}]{c.after[:10]}".replace("\n", "\u21b5")
        cells = [f"{score.auroc:.3f}" + ("" if trait else f" {r.best_trait}") if score else ""]
        rows.append([str(r.index), f"{r.rate:.2%}", *cells, _words([t for t, _ in r.top_tokens], 26), shown])
    columns = ["latent", "fires on", f"AUROC {trait}" if trait else "best trait", "top tokens", "context"]
    return text_table(columns, rows, left=2)


def calibration_table(found: Calibration) -> str:
    """Return the range of every slider, and what ended it: a limit, or the furthest amount that is tried."""
    rows, notes = [], []
    for s in found.sliders:
        if s.range is None or s.ends is None:
            rows.append([s.name, s.operation, "none", f"{s.centre:g}", *_tested_cells(s.at(s.centre)), ""])
            notes.append(f"{s.name}: no range, as its gentlest amount {s.centre:g} is beyond a limit already")
            continue
        for end, amount, why in zip(("low", "high"), s.range, s.ends, strict=True):
            rows.append([s.name, s.operation, end, f"{amount:g}", *_tested_cells(s.at(amount)), why])
        if not s.inside:
            notes.append(f"{s.name} is at {s.stands:g}, outside its range {s.range[0]:g} to {s.range[1]:g}")
    limits = (
        f"limits: KL {found.limits.kl:g} nats per token on neutral text, repetition {found.repetition:.3f} untouched "
        f"and {found.limits.repetition:g} beyond; {found.tokens:,} tokens"
    )
    columns = ["slider", "operation", "end", "amount", "share", "KL chat", "KL prose", "repetition", "ended by"]
    return text_table(columns, rows) + "\n".join([*notes, limits])


def _tested_cells(t: TriedAmount) -> list[str]:
    share, again = ("-" if x is None else f"{x:.{n}f}" for x, n in ((t.share, 2), (t.repetition, 3)))
    return [share, f"{t.kl_chat:.3f}", f"{t.kl_prose:.3f}", again]


def search_table(result: Mapping[str, Any]) -> str:
    """Return the figures of source, unsearched bake and searched bake on held-out topics, with 95 % intervals."""
    found, keep, rows = result["held_out"], result["keep"], []
    for name in ("untouched", "unsearched", "searched"):
        m = found[name]
        cells = [interval(m["rate"], 2), interval(m["kl"], 3), interval(m["perplexity"], 1)]
        again = f"{m['repetition']['value']:.3f}"
        rows.append([name, *cells, again, *(interval(m["kept"][k], 2) for k in keep)])
    columns = ["held-out topics", "rate", "KL", "perplexity", "repetition", *(f"rate of {k}" for k in keep)]
    share = interval(found["kl_of_unsearched"], 2)
    return text_table(columns, rows) + f"KL of the searched bake, as a share of the unsearched one's: {share}"


def interval(x: Mapping[str, float], digits: int) -> str:
    """Return a value with the ends of its interval.

    >>> interval({"value": 0.5, "low": 0.25, "high": 0.75}, 2)
    '0.50 (0.25-0.75)'
    """
    return f"{x['value']:.{digits}f} ({x['low']:.{digits}f}-{x['high']:.{digits}f})"


def demo_table(result: Mapping[str, Any]) -> str:
    """Return everything that the demo measured, in one table, and the time of each step."""
    bake, seconds = result["bake"], result["seconds"]
    before, model = ("merged", "merged") if "merged" in result else ("untouched", "model")
    rows = [[f"{name} {p['label']}", *_cells(p)] for name, points in result["dose"].items() for p in points]
    rows.append([f"{bake['trait']}, {before}", *_cells(bake["before"] | {"kl": 0.0})])
    rows.append([f"{bake['trait']}, baked", *_cells(bake["after"])])
    unreached = "" if result["search"]["reached"] else "no edit that was tried reaches the goal; the nearest is "
    left_out = [f"{name} is left out: {why}\n" for name, why in result["missing"].items()]
    times = seconds | {"total": sum(seconds.values())}
    return (
        text_table(["held-out topics", *_FIGURES], rows)
        + "".join(left_out)
        + f"baked: {unreached}{result['search']['chosen']['label']}; KL {bake['kl']:.3f} nats per token on neutral "
        f"prompts, perplexity of plain text {bake['perplexity_ratio']:.3f} times; {bake['writers_edited']} of "
        f"{bake['writers_found']} writers edited, verified\n"
        + "".join(f"{arm}: {line}\n" for arm, lines in result["eval"]["verdicts"].items() for line in lines)
        + text_table(["step", "seconds"], [[step, f"{s:.1f}"] for step, s in times.items()])
        + f"{f'{model}:':<9}{result['source']}\nbaked:   {result['baked']}\nreport:  {result['report']}"
    )


def eval_table(result: Mapping[str, Any]) -> str:
    """Return the headline of every probe for every arm, what moved and what is noise, then what was left out."""
    rows, notes = [], []
    for probe in result["probes"]:
        headline = probe["metrics"][0]
        for row in (r for r in probe["summary"] if r["metric"] == headline["name"]):
            shown = {k: _shown(row[k], headline["exponent"]) for k in ("value", "low", "high")}
            cells = [probe["name"], row["arm"], f"{shown['value']} ({shown['low']}-{shown['high']})"]
            if "difference" in row:
                change, low, high = (f"{row[k]:+.3g}" for k in ("difference", "difference_low", "difference_high"))
                verdict = "moved" if row["moved"] else f"noise below {row['noise']:.2g}"
                cells += [f"{change} ({low} to {high})", verdict]
            rows.append([*cells, *[""] * (5 - len(cells))])
        if probe["signal"]["line"] and probe["signal"]["status"] != "signal":
            notes.append(f"{probe['name']}: {probe['signal']['line']}")
        for arm, part in probe["arms"].items():
            notes += [f"{arm}: {line}" for line in ([part["skipped"]] if part["skipped"] else part["notes"])]
    columns = ["probe", "arm", "mean (95 %)", "difference (95 %)", ""]
    return text_table(columns, rows, left=1) + "\n".join(dict.fromkeys(notes))


def _shown(value: float | None, exponent: bool) -> str:
    return "-" if value is None else f"{math.exp(value) if exponent else value:.3g}"


_FIGURES = {"rate": ".2f", "probability": ".2f", "KL": ".3f", "repetition": ".3f", "perplexity": ".1f"}


def _cells(p: Mapping[str, Any]) -> list[str]:
    return ["-" if p[name.lower()] is None else f"{p[name.lower()]:{how}}" for name, how in _FIGURES.items()]

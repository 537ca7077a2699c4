"""Results of the verbs as text tables, for a terminal or a log. `steer.cli` prints them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from steer.core.fit import Fit
    from steer.finding.features import FoundFeatures
    from steer.finding.latents import SteeringCheck
    from steer.finding.traits import FoundDirection
    from steer.measure.calibrate import Calibration, TriedAmount
    from steer.sae.records import FeatureRecord
    from steer.sae.train import TrainedDictionary


def finding_table(found: FoundDirection) -> str:
    """Return the held-out AUROC of every site, and the effect of moving the tried sites."""
    checks = {c.site: c for c in found.checks}
    table = _table("site", "held-out AUROC", "at -1", "at +1", "KL at -1", "repetition", "")
    for site, auroc in enumerate(found.candidates.auroc):
        c = checks.get(site)
        tried = [f"{c.below:.2f}", f"{c.above:.2f}", f"{c.kl:.3f}", f"{c.repetition:.3f}"] if c else [""] * 4
        chosen = "chosen" if site == found.direction.site else ""
        table.add_row(str(site), f"{auroc:.3f}", *tried, chosen)
    d = found.direction
    return (
        _text(table) + f"{d.name}: site {d.site}, amount 1 moves the residual stream by {d.share(1):.2f} of its median "
        f"norm; text scorer AUROC {found.scorer.auroc:.3f} (marker words alone {found.scorer.marker_auroc:.3f})"
    )


def latent_table(found: FoundFeatures) -> str:
    """Return the ranked latents, how they and sets of them steer on fit topics, the dose responses on held-out topics,
    and which of them win over the difference of means."""
    d, check, replies = found.dictionary, found.check, found.ranking.replies
    head = (
        f"{found.trait} in {d.name}, site {d.site}: {found.told} of {d.latents} latents tell it at q < 0.05; AUROC on "
        f"{replies[2] + replies[3]} held-out replies,\nthe difference of means there {found.direction_auroc:.3f}; a "
        "latent with a minus speaks against the trait\n"
    )
    table = _table("latent", "AUROC", "q", "attribution", "output score", "score", "tokens")
    table.columns[-1].justify = "left"
    for t in found.top:
        figures = [f"{t.auroc:.3f}", f"{t.q:.3f}", f"{t.attribution:+.4f}", f"{t.output_score:+.2f}", f"{t.score:.3f}"]
        table.add_row(t.feature(d).name, *figures, escape(_words(t.tokens)))
    return head + _text(table) + (_screening(check) + _doses(check) if check else "")


def _screening(check: SteeringCheck) -> str:
    table = _table("fit topics", "rate at -2", "-1", "+1", "KL", "repetition", "merit")
    table.add_row("untouched", "", f"{check.untouched.rate:.2f}")
    for s in check.screened:
        name, count = s.candidate.name, len(s.tried)
        kl, again = sum(t.kl for t in s.tried) / count, sum(t.repetition for t in s.tried) / count
        rates = [f"{t.rate:.2f}" for t in s.tried]
        table.add_row(escape(name), *rates, f"{kl:.3f}", f"{again:.3f}", f"{s.merit:+.2f}")
        if a := s.ablated:
            figures = [f"{a.rate:.2f}", "", f"{a.kl:.3f}", f"{a.repetition:.3f}"]
            table.add_row(f"{escape(name)}, ablated", "", *figures)
    note = f"amount 1 of each moves the residual stream by {check.share:.2f} of its median norm"
    return f"{_text(table)}{note}\n"


def _doses(check: SteeringCheck) -> str:
    table = _table("held-out topics", "rate", "probability", "KL", "repetition", "perplexity", "share")
    for dose in check.doses:
        for p in dose.points:
            label = f"{dose.candidate.name} {p.amount:+g}" if p.amount else "untouched"
            table.add_row(escape(label), *_cells(p.as_json()), f"{p.share:.2f}")
        table.add_section()
    if check.ablated:
        table.add_row(escape(check.ablated.label), *_cells(check.ablated.as_json()), "-")
    lines = []
    for dose in check.doses:
        kind, amounts = dose.candidate.kind, [f"{a:g}" for a, won in check.wins(dose).items() if won]
        against = f"wins over the difference of means at {' and '.join(amounts)}" if amounts else "does not win"
        verdict = "" if kind == "direction" else f", {against}"
        lines.append(f"{dose.candidate.name}: {'' if dose.monotone else 'not '}monotone{verdict}")
    return (
        _text(table) + "\n".join(lines) + "\nmonotone: the rate never falls from one amount to the next, equal rates "
        "allowed; wins: a lower rate at the same displacement, at no more KL"
    )


def _words(tokens: Sequence[str], most: int = 44) -> str:
    text = " ".join(t.strip().replace("\n", "\u21b5") for t in tokens)
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def training_table(made: TrainedDictionary) -> str:
    """Return a trained dictionary's figures on held-out tokens, the training speed, and where the time went."""
    t, d = made.trained, made.dictionary
    table = _table("", "FVU", "L0", "latents alive")
    if made.parent_own:
        parent_fit = made.parent_own
        table.add_row(
            "parent, on its own", f"{parent_fit['fvu']:.4f}", f"{parent_fit['l0']:.1f}", f"{parent_fit['alive']:.1%}"
        )
    if made.parent:
        table.add_row("parent, before training", *_fit_cells(made.parent))
    table.add_row("trained", *_fit_cells(t.fit))
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
    return _text(table) + "\n".join(lines)


def _fit_cells(fit: Fit) -> list[str]:
    return [f"{fit.fvu:.4f}", f"{fit.l0:.1f}", f"{fit.alive:.1%}"]


def feature_table(records: Sequence[FeatureRecord], trait: str | None) -> str:
    """Return features with their tokens, and the context on which each fires most."""
    table = _table("latent", "fires on", f"AUROC {trait}" if trait else "best trait", "top tokens", "context")
    for column in table.columns[3:]:
        column.justify = "left"
    for r in records:
        scored_trait = trait or r.best_trait
        score = (
            f"{r.traits[scored_trait].auroc:.3f}" + ("" if trait else f" {scored_trait}")
            if scored_trait in r.traits
            else ""
        )
        shown = ""
        if r.contexts:
            c = r.contexts[0]
            shown = f"{c.before[-20:]}[{c.token}]{c.after[:10]}".replace("\n", "\u21b5")
        words = _words([t for t, _ in r.top_tokens], 26)
        table.add_row(str(r.index), f"{r.rate:.2%}", score, escape(words), escape(shown))
    return _text(table)


def calibration_table(found: Calibration) -> str:
    """Return the range of every slider, and what ended it: a limit, or the furthest amount that is tried."""
    table = _table("slider", "operation", "end", "amount", "share", "KL chat", "KL prose", "repetition", "ended by")
    notes = []
    for s in found.sliders:
        name = escape(s.name)
        if s.range is None or s.ends is None:
            t = s.at(s.centre)
            table.add_row(name, s.operation, "none", f"{s.centre:g}", *_tested_cells(t), "")
            notes.append(f"{s.name}: no range, as its gentlest amount {s.centre:g} is beyond a limit already")
        else:
            for end, amount, why in zip(("low", "high"), s.range, s.ends, strict=True):
                table.add_row(name, s.operation, end, f"{amount:g}", *_tested_cells(s.at(amount)), why)
            if not s.inside:
                notes.append(f"{s.name} stands at {s.stands:g}, outside its range {s.range[0]:g} to {s.range[1]:g}")
    limits = (
        f"limits: KL {found.limits.kl:g} nats per token on neutral text, repetition {found.repetition:.3f} untouched "
        f"and {found.limits.repetition:g} beyond; {found.tokens:,} tokens"
    )
    return _text(table) + "\n".join([*notes, limits])


def _tested_cells(t: TriedAmount) -> list[str]:
    share, again = ("-" if x is None else f"{x:.{n}f}" for x, n in ((t.share, 2), (t.repetition, 3)))
    return [share, f"{t.kl_chat:.3f}", f"{t.kl_prose:.3f}", again]


def search_table(result: Mapping[str, Any]) -> str:
    """Return the figures of source, unsearched bake and searched bake on held-out topics, with 95 % intervals."""
    found, keep = result["held_out"], result["keep"]
    table = _table("held-out topics", "rate", "KL", "perplexity", "repetition", *(f"rate of {k}" for k in keep))
    for name in ("untouched", "unsearched", "searched"):
        m = found[name]
        cells = [interval(m["rate"], 2), interval(m["kl"], 3), interval(m["perplexity"], 1)]
        again = f"{m['repetition']['value']:.3f}"
        table.add_row(name, *cells, again, *(interval(m["kept"][k], 2) for k in keep))
    share = interval(found["kl_of_unsearched"], 2)
    return _text(table) + f"KL of the searched bake, as a share of the unsearched one's: {share}"


def interval(x: Mapping[str, float], digits: int) -> str:
    """Return a value with the ends of its interval.

    >>> interval({"value": 0.5, "low": 0.25, "high": 0.75}, 2)
    '0.50 (0.25-0.75)'
    """
    return f"{x['value']:.{digits}f} ({x['low']:.{digits}f}-{x['high']:.{digits}f})"


def demo_table(result: Mapping[str, Any]) -> str:
    """Return everything that the demo measured, in one table, and the time of each step."""
    table = _table("held-out topics", "rate", "probability", "KL", "repetition", "perplexity")
    for name, points in result["dose"].items():
        for p in points:
            table.add_row(f"{name} {p['label']}", *_cells(p))
        table.add_section()
    bake = result["bake"]
    table.add_row("moralizing, merged", *_cells(bake["before"] | {"kl": 0.0}))
    table.add_row("moralizing, baked", *_cells(bake["after"]))
    seconds = result["seconds"]
    times = _table("step", "seconds")
    for step, s in seconds.items():
        times.add_row(step, f"{s:.1f}")
    times.add_row("total", f"{sum(seconds.values()):.1f}")
    return (
        _text(table) + f"baked: {result['search']['chosen']['label']}; KL {bake['kl']:.3f} nats per token on neutral "
        f"prompts, perplexity of plain text {bake['perplexity_ratio']:.3f} times; {bake['writers_edited']} of "
        f"{bake['writers_found']} writers edited, verified\n"
        + _text(times)
        + f"merged:  {result['merged']}\nbaked:   {result['baked']}\nreport:  {result['report']}"
    )


def _cells(p: Mapping[str, Any]) -> list[str]:
    kl = "-" if p["kl"] is None else f"{p['kl']:.3f}"
    return [
        f"{p['rate']:.2f}",
        f"{p['probability']:.2f}",
        kl,
        f"{p['repetition']:.3f}",
        f"{p['perplexity']:.1f}",
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _text(*parts: Table | Sequence[str]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=110, markup=False, emoji=False)  # tokens and names are no markup
    for part in parts:
        console.print(part)
    return out.getvalue()

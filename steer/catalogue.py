"""`steer features`: the labels of a dictionary, listed, searched, made anew, and as a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.errors import MismatchError, SteerError
from steer.features.labels import label_latents
from steer.features.page import write_page
from steer.features.records import FeatureRecord, read_records, write_records
from steer.features.records import search as search_records
from steer.features.shards import Harvest
from steer.files import read_json_object
from steer.live.model import load
from steer.tables import feature_table
from steer.values.dictionary import Dictionary
from steer.values.dictionary_files import load_dictionary
from steer.weights.sketch import Sketch

LABELS = "features.jsonl"
LABEL_TOKENS = 300_000
"""Tokens that the labels are made from at most."""


def label_dictionary(place: str | Path, harvest: str | Path, model: str | None = None) -> list[FeatureRecord]:
    """Label every live latent from the model alone and write features.jsonl; scores of traits are kept.

    Errors: MismatchError when harvest and dictionary are of different checkpoints.
    """
    dictionary, read = load_dictionary(place), Harvest.open(harvest)
    if "sketch" in dictionary.manifest:
        ours, theirs = Sketch.from_header(dictionary.manifest), Sketch.from_header(read.manifest)
        if not ours.same_as(theirs):
            raise MismatchError(
                f"{harvest}: expected a harvest of the checkpoint that {place} was trained on, found one whose weights "
                f"differ by {ours.distance(theirs):.1%}; harvest the same checkpoint"
            )
    live = load(model or read.manifest["checkpoint"])
    records = label_latents(live, dictionary, read, tokens=LABEL_TOKENS)
    file = Path(place) / LABELS
    if file.exists():
        scores = {r.index: r.traits for r in read_records(file)}
        records = [replace(r, traits=scores.get(r.index, {})) for r in records]
    write_records(file, records)
    return records


def catalogue(
    place: str | Path,
    *,
    search: str | None = None,
    trait: str | None = None,
    html: Path | None = None,
    label: Path | None = None,
    model: str | None = None,
    limit: int = 20,
) -> tuple[dict[str, Any], str]:
    """What `steer features` shows: a machine-readable result and a table.

    Errors: SteerError for a directory without a dictionary or labels, UsageError for a trait never measured.
    """
    dictionary = load_dictionary(place)
    records = label_dictionary(place, label, model) if label else read_records(Path(place) / LABELS)
    found = search_records(records, search, trait, limit)
    lines = [feature_table(found, trait)]
    result: dict[str, Any] = {
        "dictionary": str(place),
        "labelled": len(records),
        "latents": dictionary.latents,
        "features": [r.to_json() for r in found],
    }
    lines.append(f"{len(found)} of {len(records)} labelled features; {dictionary.latents} latents in all")
    if html is not None:
        write_page(records, html, title=dictionary.name, summary=summary(dictionary), traits=trait_tables(Path(place)))
        result["html"] = str(html)
        lines.append(f"{html}: written")
    return result, "\n".join(lines)


def summary(dictionary: Dictionary) -> dict[str, Any]:
    """The figures at the top of the page."""
    m = dictionary.manifest
    fit, spliced = m.get("fit") or {}, m.get("spliced") or {}
    figures = {
        "site": dictionary.site,
        "latents": dictionary.latents,
        "architecture": (m.get("options") or {}).get("architecture", dictionary.architecture),
        "held-out FVU": fit.get("fvu"),
        "L0": fit.get("l0"),
        "dead latents": m.get("dead"),
        "CE loss recovered": spliced.get("recovered"),
        "checkpoint": m.get("checkpoint"),
    }
    return {k: v for k, v in figures.items() if v is not None}


def trait_tables(place: Path) -> list[dict[str, Any]]:
    """What `steer find --dictionary` left, as tables: the ranked latents, then what moving them does."""
    out = []
    for file in sorted((place / "traits").glob("*.json")):
        try:
            found = read_json_object(file, what="what steer find --dictionary wrote", do="find it again")
            out.append(_latents_table(found))
            if found["check"]:
                out.append(_dose_table(found))
        except (ValueError, KeyError, TypeError) as e:
            raise SteerError(f"{file}: expected what steer find --dictionary wrote, found {e!r}; find it again") from e
    return out


def _latents_table(found: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            str(t["index"]), f"{t['auroc']:.3f}", f"{t['q']:.3f}", f"{t['attribution']:+.4f}",
            f"{t['output_score']:+.2f}", " ".join(w.strip() for w in t["tokens"][:5]),
        ]
        for t in found["top"]
    ]  # fmt: skip
    return {
        "trait": f"{found['trait']}: latents",
        "columns": ["latent", "held-out AUROC", "q", "attribution", "output score", "top tokens"],
        "rows": rows,
        "note": f"The difference of means at this site has held-out AUROC {found['direction_auroc']:.3f}, the text "
        f"scorer {found['scorer_auroc']:.3f}.",
    }


def _dose_table(found: dict[str, Any]) -> dict[str, Any]:
    check, rows = found["check"], []
    for dose in check["doses"]:
        points = {p["amount"]: p for p in dose["points"]}
        below = points[-1.0]
        rows.append(
            [
                dose["name"], *(f"{points[a]['rate']:.2f}" for a in sorted(points)),
                "yes" if dose["monotone"] else "no",
                f"{below['kl']:.3f}", f"{below['repetition']:.3f}", f"{below['perplexity']:.1f}",
            ]
        )  # fmt: skip
    amounts = [f"rate at {p['amount']:+g}".replace("+0", "0") for p in check["doses"][0]["points"]]
    wins = [name for name, won in check["wins_over_direction"].items() if any(won.values())]
    won = (
        f"Lower than the difference of means at no more KL: {', '.join(wins)}."
        if wins
        else ("None lowers the rate further than the difference of means at no more KL.")
    )
    return {
        "trait": f"{found['trait']}: moved on held-out topics",
        "columns": ["moved", *amounts, "monotone", "KL at -1", "repetition at -1", "perplexity at -1"],
        "rows": rows,
        "note": f"Amount 1 of each moves the residual stream by {check['share_at_1']:.2f} of its median norm. {won}",
    }

"""`steer features`: list and search the labels of a dictionary, make them anew, and write them as an HTML page.

The verb calls `catalogue`. Labels are made by `steer.sae.labels`, the page by `steer.sae.dashboard`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from steer.checkpoint.sketch import Sketch
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import FEATURES, load_dictionary
from steer.errors import MismatchError, SteerError
from steer.files import read_json_object
from steer.model.steered import load
from steer.sae.dashboard import write_page
from steer.sae.labels import label_latents
from steer.sae.records import FeatureRecord, read_records, write_records
from steer.sae.records import search as search_records
from steer.sae.shards import Harvest
from steer.verbs.tables import feature_table, latent_cells

LABEL_TOKENS = 300_000
"""Most tokens of the harvest that labels are made from."""


def label_dictionary(place: str | Path, harvest: str | Path, model: str | None = None) -> list[FeatureRecord]:
    """Label every live latent and write features.jsonl. Trait scores of an existing file are kept.

    `place`: the dictionary's directory. `harvest`: the activations to label from. `model`: the checkpoint, if it is not
    where the harvest's manifest says.
    Errors: MismatchError if harvest and dictionary are of different checkpoints.
    """
    dictionary, read = load_dictionary(place), Harvest.open(harvest)
    if "sketch" in dictionary.manifest:
        of_dictionary, of_harvest = Sketch.from_header(dictionary.manifest), Sketch.from_header(read.manifest)
        if not of_dictionary.same_as(of_harvest):
            raise MismatchError(
                f"{harvest}: expected a harvest of the checkpoint that {place} was trained on, found one whose weights "
                f"differ by {of_dictionary.distance(of_harvest):.1%}; harvest the same checkpoint"
            )
    live = load(model or read.manifest["checkpoint"])
    records = label_latents(live, dictionary, read, tokens=LABEL_TOKENS)
    file = Path(place) / FEATURES
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
    """Return what `steer features` prints: a machine-readable result, and a table as text.

    `search`: words that labels or contexts must contain. `trait`: order by how well a latent reads this trait. `html`:
    also write the dashboard to this file. `label`: label all latents anew from this harvest. `limit`: rows at most.
    Errors: SteerError for a directory without a dictionary or labels, UsageError for a trait that was never measured.
    """
    dictionary = load_dictionary(place)
    records = label_dictionary(place, label, model) if label else read_records(Path(place) / FEATURES)
    found = search_records(records, search, trait, limit)
    counts = f"{len(found)} of {len(records)} labelled features; {dictionary.latents} latents in all"
    text = f"{feature_table(found, trait)}\n{counts}"
    result: dict[str, Any] = {
        "dictionary": str(place),
        "labelled": len(records),
        "latents": dictionary.latents,
        "features": [r.to_json() for r in found],
    }
    if html is not None:
        write_page(records, html, title=dictionary.name, summary=summary(dictionary), traits=trait_tables(Path(place)))
        result["html"] = str(html)
        text += f"\n{html}: written"
    return result, text


def summary(dictionary: Dictionary) -> dict[str, Any]:
    """Return the figures at the top of the page."""
    m = dictionary.manifest
    fit, spliced, options = (v if isinstance(v := m.get(key), dict) else {} for key in ("fit", "spliced", "options"))
    figures = {
        "site": dictionary.site,
        "latents": dictionary.latents,
        "architecture": options.get("architecture", dictionary.architecture),
        "held-out FVU": fit.get("fvu"),
        "L0": fit.get("l0"),
        "dead latents": m.get("dead"),
        "CE loss recovered": spliced.get("recovered"),
        "checkpoint": m.get("checkpoint"),
    }
    return {k: v for k, v in figures.items() if v is not None}


def trait_tables(place: Path) -> list[dict[str, Any]]:
    """Return the results of `steer find --dictionary` as tables: the ranked latents, then the effect of moving them."""
    out = []
    for file in sorted((place / "traits").glob("*.json")):
        try:
            found = read_json_object(file, what="what steer find --dictionary wrote", do="find it again")
            out.append(_latents_table(found))
            if found["check"]:
                out.append(_dose_table(found))
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise SteerError(f"{file}: expected what steer find --dictionary wrote, found {e!r}; find it again") from e
    return out


def _latents_table(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "trait": f"{found['trait']}: latents",
        "columns": ["latent", "held-out AUROC", "q", "attribution", "output score", "top tokens"],
        "rows": [
            [str(t["index"]), *latent_cells(t), " ".join(w.strip() for w in t["tokens"][:5])] for t in found["top"]
        ],
        "note": f"The difference of means at this site has held-out AUROC {found['direction_auroc']:.3f}, the text "
        f"scorer {found['scorer_auroc']:.3f}.",
    }


def _dose_table(found: dict[str, Any]) -> dict[str, Any]:
    check, rows = found["check"], []
    for dose in check["doses"]:
        points = {p["amount"]: p for p in dose["points"]}
        rates, at = [f"{points[a]['rate']:.2f}" for a in sorted(points)], points[-1.0]
        costs = [f"{at['kl']:.3f}", f"{at['repetition']:.3f}", f"{at['perplexity']:.1f}"]
        rows.append([dose["name"], *rates, "yes" if dose["monotone"] else "no", *costs])
    amounts = [f"rate at {p['amount']:+g}".replace("+0", "0") for p in check["doses"][0]["points"]]
    wins = [name for name, won in check["wins_over_direction"].items() if any(won.values())]
    won = f"Lower than the difference of means at no more KL: {', '.join(wins)}."
    if not wins:
        won = "None lowers the rate further than the difference of means at no more KL."
    return {
        "trait": f"{found['trait']}: moved on held-out topics",
        "columns": ["moved", *amounts, "monotone", "KL at -1", "repetition at -1", "perplexity at -1"],
        "rows": rows,
        "note": f"Amount 1 of each moves the residual stream by {check['share_at_1']:.2f} of its median norm. {won}",
    }

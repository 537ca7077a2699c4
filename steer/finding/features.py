"""`steer find --dictionary`: from a trait's instructions to the latents that detect it and the features that steer it.

The steps, each in its own file: contrast replies and a direction (as `steer find` makes them), the ranking of all
latents (`steer.sae.ranking`), the choice of ten and the steering check (`latents`). The results are written into the
dictionary's directory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from steer.checkpoint.library import register_dictionary
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import FEATURES, SLIDERS, load_dictionary
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.names import check_name
from steer.core.slider import slider_rows
from steer.core.trait import NeutralPrompts, Trait
from steer.errors import SteerError
from steer.files import write_atomic, write_atomic_json
from steer.finding.latents import (
    Q,
    RankedLatent,
    SteeringCheck,
    choose_latents,
    dose_response,
    dose_tokens,
    feature_auroc,
    latent_units,
    screen,
    screening_tokens,
)
from steer.finding.traits import contrast_for, find_trait
from steer.measure.harness import Reference, neutral_replies
from steer.measure.scorer import Scorer
from steer.model.fit_check import FitReport, FitWarning, check_fit, check_fits
from steer.model.steered import SteeredModel
from steer.progress import Bar, bar
from steer.sae.pooling import Pooled, pooled
from steer.sae.ranking import Ranking, rank
from steer.sae.records import FeatureRecord, read_records, with_trait, write_records

NEUTRAL_PROMPTS = 16
"""Number of held-out neutral prompts that the KL of the dose response is computed on."""


@dataclass(frozen=True, eq=False)
class FoundFeatures:
    """The result of `find_features`."""

    trait: str
    dictionary: Dictionary
    direction: Direction
    """The difference of means at the dictionary's site."""
    direction_auroc: float
    """Held-out AUROC of the direction's mean-pooled projection."""
    scorer: Scorer
    ranking: Ranking
    fit: FitReport
    """How well the dictionary reconstructs this checkpoint."""
    top: tuple[RankedLatent, ...]
    """The ten latents chosen, best first."""
    check: SteeringCheck | None
    """How features made of these latents steer; None without the steering check."""
    sliders: tuple[dict[str, Any], ...]
    """Rows of sliders.yaml; empty without the steering check."""
    written: tuple[Path, ...]
    """Files that were written; empty for a dictionary that has no directory."""
    seed: int

    @property
    def detecting(self) -> int:
        """Number of latents that detect the trait at a false discovery rate below `Q`."""
        return int((self.ranking.q < Q).sum())

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, machine-readable; also the contents of traits/<trait>.json."""
        return {
            "trait": self.trait,
            "dictionary": self.dictionary.name,
            "site": self.dictionary.site,
            "seed": self.seed,
            "fit": {"fvu": self.fit.fit.fvu, "l0": self.fit.fit.l0, "poor": self.fit.poor},
            "latents": self.dictionary.latents,
            f"latents_q_below_{Q:g}": self.detecting,
            "replies": list(self.ranking.replies),
            "direction_auroc": self.direction_auroc,
            "scorer_auroc": self.scorer.auroc,
            "top": [asdict(t) for t in self.top],
            "check": self.check.as_json() if self.check else None,
            "sliders": list(self.sliders),
        }


def find_features(
    model: SteeredModel,
    trait: str | Trait,
    dictionary: str | Path | Dictionary,
    *,
    seed: int = 0,
    progress: Bar = bar,
    check: bool = True,
) -> FoundFeatures:
    """Rank every latent by how well it detects a trait, choose ten, measure how they steer, and save the results.

    `model`: the checkpoint that the dictionary was trained on. `trait`: the name of a built-in trait, a trait file, or
    a Trait. `dictionary`: its directory, or `RELEASE/SAE_ID`, or the dictionary. `seed`: of the replies that are drawn.
    `progress`: makes the progress bars; see `steer.progress`. `check`: False skips the steering check and writes no
    sliders.

    The steps: held-out AUROC with a false discovery rate over all latents (`rank`); attribution and output scores
    of the best (`choose_latents`); then the steering check of `steer.finding.latents`, which chooses on fit topics
    and measures on held-out ones.

    Into the dictionary's directory it writes traits/<trait>.json, the trait's scores in features.jsonl if that
    exists, and in sliders.yaml the sliders `<trait>-latent` and `<trait>-set`. Their amount 1 raises the trait and
    displaces the residual stream as far as amount 1 of the difference-of-means direction.
    Errors: those of `load_dictionary` and `check_fits`, UsageError for an unknown trait, SteerError for a directory
    that cannot be written.

        found = steer.find_features(model, "moralizing", "path-of-a-dictionary")
        for latent in found.top:
            print(latent.index, latent.auroc, latent.tokens)
    """
    trait = trait if isinstance(trait, Trait) else Trait.load(trait)
    trait.check()
    d = dictionary if isinstance(dictionary, Dictionary) else load_dictionary(dictionary)
    site = check_fits(model, d)
    d = d.to(model.device)
    records = _prepared(d, trait.name)
    fit = check_fit(model, d)
    if fit.poor:
        warnings.warn(f"{fit}; its features may not mean what they say", FitWarning, 2)

    name, contrast = trait.name, contrast_for(model, trait, seed=seed, progress=progress)
    means = find_trait(model, trait, site=site, seed=seed, contrast=contrast, progress=progress)
    direction, scorer, clear = means.direction, means.scorer, means.candidates.contrast
    if d.norm is None:
        d = replace(d, norm=direction.residual_norm)
    with progress(f"{name}: activations", None, "replies") as advance:
        groups = [pooled(model, d, side, on_rows=advance) for side in clear.sides]
    with progress(f"{name}: ranking", None, "latents"):
        ranking = rank(*groups, seed=seed)
    units = latent_units(groups[:2], records)
    top = choose_latents(model, d, clear, ranking, units, direction.gap, progress)
    steered = None
    if check:
        chosen = {t.index for t in top}
        others = [j for j in sorted(units) if j not in chosen] or sorted(units)
        index = int(np.random.default_rng(seed).choice(others))
        latents, random = [t.feature(d) for t in top], Feature.latent(d, index, units[index])
        with progress(f"{name}: steering check", screening_tokens(len(latents)), "tokens") as advance:
            untouched, screened = screen(model, scorer, direction, latents, random, contrast.neutral, on_tokens=advance)
        with progress(f"{name}: dose response", dose_tokens(len(trait.held_out)), "tokens") as advance:
            prompts = NeutralPrompts.load().held_out[:NEUTRAL_PROMPTS]
            reference = Reference.of(model, neutral_replies(model, prompts))
            steered = dose_response(model, scorer, untouched, screened, reference, on_tokens=advance)
    found = FoundFeatures(
        trait=name,
        dictionary=d,
        direction=direction,
        direction_auroc=means.candidates.auroc[site],
        scorer=scorer,
        ranking=ranking,
        fit=fit,
        top=top,
        check=steered,
        sliders=_sliders(name, steered, groups) if steered else (),
        written=(),
        seed=seed,
    )
    if d.place is None:
        return found
    written = _write(d.place, found, records, model)
    register_dictionary(d.place, d.name, model.sketch())
    return replace(found, written=written)


def _sliders(trait: str, check: SteeringCheck, groups: Sequence[Pooled]) -> tuple[dict[str, Any], ...]:
    """Rows of sliders.yaml for the best single latent and the best set."""
    out = []
    for kind in ("latent", "set"):
        dose = check.dose(kind)
        if dose is None or not isinstance(dose.candidate.what, Feature):
            continue
        f = dose.candidate.what
        rates = ", ".join(f"{p.rate:.2f}" for p in dose.points)
        below, won = dose.at(-1.0), check.wins(dose)
        out.append(
            {
                "name": f"{trait}-{kind}",
                "latents": list(f.indices),
                "units": [float(f"{u:.6g}") for u in f.units],
                "operation": "add",
                "trait": trait,
                "auroc": round(feature_auroc(f, groups), 4),
                "note": f"held-out rates at -2 to 2: {rates}{'' if dose.monotone else ' (not monotone)'}; at -1 KL "
                f"{below.kl:.3f}, repetition {below.repetition:.3f}; amount 1 moves {check.share:.2f} of the "
                f"residual norm; lowers the rate further than the difference of means, at no more KL, at "
                f"{', '.join(f'{a:g}' for a, w in won.items() if w) or 'neither -1 nor -2'}",
            }
        )
    return tuple(out)


def _prepared(d: Dictionary, trait: str) -> list[FeatureRecord]:
    """The dictionary's labels. Every fault that would stop `_write` is raised here, before minutes of work."""
    check_name(trait, "trait")
    if d.place is None:
        return []
    write_atomic(d.place / "traits" / f".{trait}.probe", "").unlink(missing_ok=True)
    slider_rows(d.place)
    records = read_records(d.place / FEATURES) if (d.place / FEATURES).is_file() else []
    if records and max(r.index for r in records) >= d.latents:
        raise SteerError(
            f"{d.place / FEATURES}: expected latents from 0 to {d.latents - 1}, found "
            f"{max(r.index for r in records)}; these labels are of another dictionary, label this one again"
        )
    return records


def _write(
    place: Path, found: FoundFeatures, records: Sequence[FeatureRecord], model: SteeredModel
) -> tuple[Path, ...]:
    """Write the results into the dictionary's directory `place` and return the files written."""
    written = []
    if records:
        written.append(write_records(place / FEATURES, with_trait(records, found.trait, found.ranking)))
    if found.sliders:
        names = {row["name"] for row in found.sliders}
        rows = [row for row in slider_rows(place) if row["name"] not in names] + list(found.sliders)
        text = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=120)
        written.append(write_atomic(place / SLIDERS, text))
    whole = found.as_json() | {"checkpoint": model.name, "sketch": model.sketch().to_header()}
    written.append(write_atomic_json(place / "traits" / f"{found.trait}.json", whole))
    return tuple(written)

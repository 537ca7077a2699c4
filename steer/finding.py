"""`steer find`: from a trait's instructions to a Direction and a text scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from steer.errors import UsageError
from steer.features.contrast import FIT_SAMPLES, SAMPLER, Contrast, Reply, contrast_replies
from steer.features.find import Candidates, candidates, finished_direction
from steer.live.model import SteeredModel
from steer.measure.scorer import Scorer, clear_replies
from steer.measure.sites import SiteCheck, check_sites, chosen
from steer.progress import Advance, bar
from steer.values.direction import Direction
from steer.values.trait import NeutralPrompts, Trait

Bar = Callable[[str, int | None, str], AbstractContextManager[Advance]]


@dataclass(frozen=True, eq=False)
class Found:
    """What finding a trait gives."""

    direction: Direction
    scorer: Scorer
    candidates: Candidates
    checks: tuple[SiteCheck, ...]
    """What moving each site tried did; empty when the site was given."""

    def as_json(self) -> dict[str, Any]:
        """For the machine-readable result."""
        d = self.direction
        return {
            "trait": d.name,
            "site": d.site,
            "auroc": self.candidates.auroc[d.site],
            "auroc_per_site": list(self.candidates.auroc),
            "gap": d.gap,
            "std": d.std,
            "residual_norm": d.residual_norm,
            "share_at_1": d.share(1),
            "scorer_auroc": self.scorer.auroc,
            "marker_auroc": self.scorer.marker_auroc,
            "site_checks": [asdict(c) for c in self.checks],
        }


def find(model: SteeredModel, trait: str | Trait, **options: Any) -> Direction:
    """The direction of a trait in a model; `.provenance["auroc"]` has the held-out AUROC per site.

    Options are those of `find_trait`. Errors: UsageError for an unknown trait or site.
    """
    return find_trait(model, trait, **options).direction


def find_trait(
    model: SteeredModel,
    trait: str | Trait,
    *,
    site: int | None = None,
    seed: int = 0,
    neutral: Sequence[Reply] | None = None,
    contrast: Contrast | None = None,
    progress: Bar = bar,
) -> Found:
    """Difference of means at every site, the site chosen by held-out AUROC and then by what it does.

    Replies that did not do as they were told are left out of the means (persona vectors, Chen et al. 2025, does so
    with a judge model; here classifiers on words that did not see the reply's topic judge).
    Sites that read the held-out replies within 0.06 AUROC of the best are tried on fit topics: the one whose
    amounts -1 and 1 part the replies most, less what that costs in KL and repetition, is taken, or one nearer to the
    middle of the model that cannot be told from it.
    `contrast` takes replies that were written before, and `neutral` those to neutral prompts.
    """
    trait = trait if isinstance(trait, Trait) else Trait.load(trait)
    trait.check()
    if site is not None and not 0 <= site < model.anatomy.blocks:
        raise UsageError(f"site: expected 0 to {model.anatomy.blocks - 1} for {model.name}, found {site}")
    if contrast is None:
        contrast = contrast_for(model, trait, seed=seed, neutral=neutral, progress=progress)
    with progress(f"{trait.name}: residual streams", None, "replies") as advance:
        found = candidates(model, clear_replies(contrast), on_rows=advance)
    scorer = Scorer.train(contrast)
    checks: list[SiteCheck] = []
    if site is None:
        with progress(f"{trait.name}: sites", None, "tokens") as advance:
            checks = check_sites(model, found, scorer, on_tokens=advance)
        site = chosen(checks, model.anatomy.blocks)
    provenance = {
        "seed": seed,
        "scorer_auroc": round(scorer.auroc, 4),
        "site_checks": [asdict(c) for c in checks],
    }
    return Found(finished_direction(model, found, site, provenance), scorer, found, tuple(checks))


def contrast_for(
    model: SteeredModel,
    trait: Trait,
    *,
    seed: int = 0,
    neutral: Sequence[Reply] | None = None,
    progress: Bar = bar,
) -> Contrast:
    """The replies that directions and scorers are made from, while a bar tells how far they are."""
    sampler = replace(SAMPLER, seed=seed)
    shared = NeutralPrompts.load().fit if neutral is None else ()
    replies = 2 * (FIT_SAMPLES * len(trait.fit) + len(trait.held_out)) + len(shared)
    with progress(f"{trait.name}: replies", replies * sampler.max_new_tokens, "tokens") as advance:
        contrast = contrast_replies(model, trait, sampler=sampler, neutral=neutral, on_tokens=advance)
    contrast.check()
    return contrast

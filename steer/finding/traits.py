"""`steer find`: from a trait's instructions to a Direction and a text scorer.

The steps: contrast replies (`steer.measure.contrast`), a scorer (`steer.measure.scorer`), difference-of-means vectors
at every site, and the choice of the site that steers best (both in `directions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from steer.core.direction import Direction
from steer.core.trait import NeutralPrompts, Trait
from steer.errors import TraitNotFoundError, UsageError
from steer.finding.directions import Candidates, SiteCheck, candidates, check_sites, chosen, finished_direction
from steer.measure.contrast import FIT_SAMPLES, SAMPLER, Contrast, Reply, contrast_replies
from steer.measure.scorer import Scorer, clear_replies
from steer.model.steered import SteeredModel
from steer.progress import Advance, bar

Bar = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""Makes a progress bar from (title, total or None, unit); `steer.progress.bar` is one."""


@dataclass(frozen=True, eq=False)
class FoundDirection:
    """The result of `find_trait`."""

    direction: Direction
    scorer: Scorer
    candidates: Candidates
    """The vectors and AUROCs of all sites."""
    checks: tuple[SiteCheck, ...]
    """The measured effect of steering at each site tried; empty when the site was given."""

    def check(self) -> None:
        """Check that scorer and direction tell held-out replies under the two instructions apart.

        Errors: TraitNotFoundError if either AUROC is within two standard errors (Mann-Whitney) of chance.
        """
        auroc = min(self.scorer.auroc, self.candidates.auroc[self.direction.site])
        _, _, shown, hidden = map(len, self.candidates.contrast.sides)
        least = 0.5 + 2 * math.sqrt((shown + hidden + 1) / (12 * shown * hidden))
        if not auroc > least:
            raise TraitNotFoundError(
                f"trait {self.direction.name!r}: expected replies that differ between its two instructions, found an "
                f"AUROC of {auroc:.2f} on {shown + hidden} held-out replies, where chance reaches {least:.2f}"
            )

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, machine-readable."""
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

    `trait` is the name of a built-in trait, a trait file, or a Trait. Options are those of `find_trait`.
    Errors: UsageError for an unknown trait or site.

        model = steer.load("path-or-hub-id")
        moral = steer.find(model, "moralizing")
        with model.steered({moral: -1.5}):
            print(model.chat("My friend lied to me."))
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
) -> FoundDirection:
    """Compute the difference of means at every site and choose the site, first by held-out AUROC, then by its effect.

    Replies that do not follow their instruction are left out of the means. Persona vectors (Chen et al. 2025) decides
    this with a judge model; here a classifier on words does, trained without the reply's topic.

    Sites whose held-out AUROC is within 0.06 of the best are tried on fit topics at amounts -1 and 1. The best site is
    the one where the two amounts change the trait most, less a penalty for KL and repetition; among sites that cannot
    be distinguished from it, the one nearest to the middle of the model is taken.

    `site` skips this choice. `contrast` gives contrast replies that were generated before; `neutral` gives only the
    replies to neutral prompts, which several traits can share. `seed` is that of sampling.
    Errors: UsageError for an unknown trait or site, TraitNotFoundError without replies to compare.
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
    shown = [asdict(c) for c in checks]
    provenance = {"seed": seed, "scorer_auroc": round(scorer.auroc, 4), "site_checks": shown}
    return FoundDirection(finished_direction(model, found, site, provenance), scorer, found, tuple(checks))


def contrast_for(
    model: SteeredModel,
    trait: Trait,
    *,
    seed: int = 0,
    neutral: Sequence[Reply] | None = None,
    progress: Bar = bar,
) -> Contrast:
    """Generate the contrast replies of a trait, with a progress bar. Arguments are those of `find_trait`.

    Errors: TraitNotFoundError when the model ends its replies at once.
    """
    sampler = replace(SAMPLER, seed=seed)
    shared = NeutralPrompts.load().fit if neutral is None else ()
    replies = 2 * (FIT_SAMPLES * len(trait.fit) + len(trait.held_out)) + len(shared)
    with progress(f"{trait.name}: replies", replies * sampler.max_new_tokens, "tokens") as advance:
        contrast = contrast_replies(model, trait, sampler=sampler, neutral=neutral, on_tokens=advance)
    contrast.check()
    return contrast

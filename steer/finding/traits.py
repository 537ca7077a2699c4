"""`steer find`: from a trait's instructions to a Direction and a text scorer.

The steps: contrast replies (`steer.measure.contrast`), a scorer (`steer.measure.scorer`), difference-of-means vectors
at every site, and the choice of the site that steers best (both in `directions`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steer.core.direction import Direction
from steer.core.trait import NeutralPrompts, Trait
from steer.core.votes import Vote
from steer.errors import TraitNotFoundError, UsageError
from steer.finding.directions import (
    Candidates,
    SiteCheck,
    candidates,
    check_sites,
    chosen,
    finished_direction,
    middle,
    steerable,
)
from steer.finding.measuring import FULL, QUICK, Effort, calibrated, judged
from steer.finding.taste import find_taste
from steer.measure.contrast import SAMPLER, Contrast, Reply, contrast_replies
from steer.measure.scorer import Scorer, chance_auroc, clear_replies
from steer.measure.verdict import READS, Verdict
from steer.model.steered import SteeredModel
from steer.progress import Bar, bar

FIT_REPLIES, HELD_OUT_REPLIES = 16, 4
"""Fewest replies under each instruction, for fitting and held out: traits with few topics get several to each."""
STAGES = (0.3, 0.02, 0.2, 0.48)
"""Shares of the time of a quick search with verdict and calibration: replies, residual streams, verdict, range."""


@dataclass(frozen=True, eq=False)
class FoundDirection:
    """The result of `find_trait`."""

    direction: Direction
    scorer: Scorer
    candidates: Candidates
    """The vectors and AUROCs of all sites."""
    checks: tuple[SiteCheck, ...]
    """The measured effect of steering at each site tried; empty when the site was given, and in a quick search."""
    verdict: Verdict | None = None
    """What the slider does on held-out topics, if it was asked for."""

    @property
    def auroc(self) -> float:
        """The lower of the held-out AUROCs of scorer and direction."""
        return min(self.scorer.auroc, self.candidates.auroc[self.direction.site])

    @property
    def chance(self) -> float:
        """The AUROC that chance reaches on these held-out replies: two standard errors (Mann-Whitney) above 0.5."""
        _, _, shown, hidden = map(len, self.candidates.contrast.sides)
        return chance_auroc(shown, hidden)

    def check(self) -> None:
        """Check that scorer and direction distinguish held-out replies under the two instructions.

        Errors: TraitNotFoundError if either AUROC is within two standard errors (Mann-Whitney) of chance.
        """
        if not self.auroc > self.chance:
            replies = sum(map(len, self.candidates.contrast.sides[2:]))
            raise TraitNotFoundError(
                f"trait {self.direction.name!r}: expected replies that differ between its two instructions, found an "
                f"AUROC of {self.auroc:.2f} on {replies} held-out replies, where chance reaches {self.chance:.2f}"
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
            "marker_auroc": self.scorer.marker_auroc if self.scorer.trait.markers else None,
            "site_checks": [asdict(c) for c in self.checks],
            "keep": d.provenance.get("keep"),
            "calibrated": d.calibrated,
            "verdict": self.verdict and self.verdict.as_json(),
        }


def find(
    model: SteeredModel,
    trait: str | Trait | None = None,
    *,
    votes: str | Path | Sequence[Vote] | None = None,
    **options: Any,
) -> Direction:
    """Return the direction of a trait, or of the taste that votes show, in the untouched `model`.

    The direction's provenance has the held-out AUROC per site under "auroc", or the held-out accuracy under "votes".

    `trait`: the name of a built-in trait, a trait file, or a Trait. `votes`: in its place, votes or a file of them.
    `options`: those of `find_trait` or `find_taste`.
    Errors: UsageError for an unknown trait or site, and for votes that are too few.

        model = steer.load("path-or-hub-id")
        moral = steer.find(model, "moralizing")
        with model.steered({moral: -1.5}):
            print(model.chat("My friend lied to me."))
    """
    if votes is not None and trait is None:
        return find_taste(model, votes, **options).direction
    if trait is None or votes is not None:
        raise UsageError("find: expected a trait or votes, found both or neither; give one of them")
    return find_trait(model, trait, **options).direction


def find_trait(
    model: SteeredModel,
    trait: str | Trait,
    *,
    site: int | None = None,
    seed: int = 0,
    quick: bool = False,
    verdict: bool = False,
    calibrate: bool = False,
    keep: Sequence[str | Trait] = (),
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

    `quick` works with the `QUICK` effort, which tries no sites. `verdict` measures on held-out topics what the slider
    does; the direction's provenance keeps it. `calibrate` measures between which amounts replies hold together
    (`Direction.calibrated`).

    `keep`: other traits, whose directions at the same site are projected out, so that the slider does not move along
    them. Their replies are generated too. The provenance has the cost, under "keep": the cosine to the direction as
    it was, and both held-out AUROCs.

    `site` skips the choice of a site. `contrast` gives contrast replies that were generated before; `neutral` gives
    only the replies to neutral prompts, which several traits can share. `seed` is that of sampling.
    Errors: UsageError for an unknown trait or site, TraitNotFoundError without replies to compare, or if nothing is
    left of the direction without those of `keep`.
    """
    trait, *others = [t if isinstance(t, Trait) else Trait.load(t) for t in (trait, *keep)]
    for each in (trait, *others):
        each.check()
    if len({t.name for t in (trait, *others)}) <= len(others):
        raise UsageError(f"keep: expected traits beside {trait.name}, each once, found {[t.name for t in others]}")
    effort = QUICK if quick else FULL
    if site is not None and not 0 <= site < model.anatomy.blocks:
        raise UsageError(f"site: expected 0 to {model.anatomy.blocks - 1} for {model.name}, found {site}")
    if contrast is None:
        contrast = contrast_for(model, trait, seed=seed, effort=effort, neutral=neutral, progress=progress)
    vectors = []
    for other in others:
        other_contrast = contrast_for(
            model, other, seed=seed, effort=effort, neutral=contrast.neutral, progress=progress
        )
        vectors.append(candidates(model, clear_replies(other_contrast)).vectors)
    with progress(f"{trait.name}: residual streams", None, "replies") as advance:
        found = candidates(model, clear_replies(contrast), keep=vectors, on_rows=advance)
    scorer = Scorer.train(contrast)
    checks: list[SiteCheck] = []
    if site is None and not effort.check_sites:
        site = middle(steerable(found.auroc), model.anatomy.blocks)
    elif site is None:
        with progress(f"{trait.name}: sites", None, "tokens") as advance:
            checks = check_sites(model, found, scorer, on_tokens=advance)
        site = chosen(checks, model.anatomy.blocks)
    shown = [asdict(c) for c in checks]
    provenance = {"seed": seed, "scorer_auroc": round(scorer.auroc, 4), "site_checks": shown}
    if quick:
        provenance["quick"] = True
    if found.plain is not None:
        cosine = float(found.vectors[site] @ found.plain.vectors[site])
        names = [t.name for t in others]
        if not cosine > 1e-3:
            raise TraitNotFoundError(
                f"trait {trait.name!r}: expected a direction that is not made of those of {', '.join(names)}, found a "
                f"cosine of {cosine:.4f} to the remainder; keep fewer"
            )
        before, after = (round(c.auroc[site], 4) for c in (found.plain, found))
        provenance["keep"] = {"traits": names, "cosine": round(cosine, 4), "auroc_before": before, "auroc": after}
    direction = finished_direction(model, found, site, provenance)
    made = FoundDirection(direction, scorer, found, tuple(checks))
    if verdict:
        judging = {"auroc": made.auroc, "least": max(READS, made.chance), "effort": effort}
        direction, assessed = judged(model, direction, scorer, **judging, seed=seed, progress=progress)
        made = replace(made, direction=direction, verdict=assessed)
    if calibrate:
        made = replace(made, direction=calibrated(model, direction, seed=seed, progress=progress))
    return made


def contrast_for(
    model: SteeredModel,
    trait: Trait,
    *,
    seed: int = 0,
    effort: Effort = FULL,
    neutral: Sequence[Reply] | None = None,
    progress: Bar = bar,
) -> Contrast:
    """Generate the contrast replies of a trait, with a progress bar. Arguments are those of `find_trait`. The trait of
    the contrast has the topics that were used.

    Errors: TraitNotFoundError when the model ends its replies at once.
    """
    sampler = replace(SAMPLER, seed=seed, max_new_tokens=effort.tokens)
    trait = trait.shortened(effort.fit_topics, effort.held_out_topics)
    prompts = NeutralPrompts.load().fit[: effort.neutral] if neutral is None else ()
    fit = max(effort.samples, math.ceil(FIT_REPLIES / len(trait.fit)))
    held_out = math.ceil(HELD_OUT_REPLIES / len(trait.held_out))
    replies = 2 * (fit * len(trait.fit) + held_out * len(trait.held_out)) + len(prompts)
    with progress(f"{trait.name}: replies", replies * sampler.max_new_tokens, "tokens") as advance:
        contrast = contrast_replies(
            model, trait, sampler=sampler, samples=(fit, held_out), prompts=prompts, neutral=neutral, on_tokens=advance
        )
    contrast.check()
    return contrast

"""How much is written and read to find a direction, and what is measured of its slider then: a verdict and a range.

The direction's provenance keeps both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from steer.core.direction import Direction
from steer.core.trait import NeutralPrompts
from steer.finding.directions import TOKENS
from steer.measure.calibrate import calibrate_direction, expected_tokens
from steer.measure.contrast import FIT_SAMPLES, SAMPLER
from steer.measure.harness import neutral_replies
from steer.measure.scorer import Scorer
from steer.measure.verdict import SETTINGS, Verdict, judge, samples_for
from steer.model.steered import SteeredModel
from steer.progress import Bar, bar

VERDICT_TOPICS, VERDICT_PROMPTS = 24, 12
"""Held-out topics and neutral prompts that the verdict is measured on, at most."""


@dataclass(frozen=True)
class Effort:
    """How much is written and read to find a direction."""

    fit_topics: int
    """At most so many topics, spread over those of the trait."""
    held_out_topics: int
    samples: int
    """Replies to each fit topic under each instruction."""
    tokens: int
    """Length of the contrast replies."""
    verdict_tokens: int
    """Length of the replies that the verdict is measured on."""
    neutral: int
    """Neutral prompts that are answered."""
    check_sites: bool
    """Whether sites are tried by steering. If not, the site nearest to the middle is taken, of those in `BAND` that
    read the trait as well as the best. Trying sites mostly chooses the same one."""


FULL = Effort(999, 999, FIT_SAMPLES, SAMPLER.max_new_tokens, TOKENS, 999, check_sites=True)
QUICK = Effort(40, 16, 1, 32, 32, 16, check_sites=False)
"""On the default merge 70 s of two cores for the whole process, verdict included; tests/bench/find.py."""


def judged(
    model: SteeredModel,
    direction: Direction,
    scorer: Scorer,
    *,
    auroc: float,
    least: float,
    effort: Effort = QUICK,
    seed: int = 0,
    progress: Bar = bar,
) -> tuple[Direction, Verdict]:
    """Return the direction with its verdict in its provenance, and the verdict.

    `auroc`, `least`: as for `judge`. `seed` is that of the replies.
    """
    prompts = NeutralPrompts.load().held_out[: min(VERDICT_PROMPTS, effort.neutral // 2)]
    topics = min(VERDICT_TOPICS, effort.held_out_topics, len(scorer.trait.held_out))
    total = (len(prompts) + SETTINGS * topics * samples_for(topics)) * effort.verdict_tokens
    with progress(f"{direction.name}: verdict", total, "tokens") as advance, model.untouched():
        neutral = neutral_replies(model, prompts, tokens=effort.verdict_tokens, on_tokens=advance)
        verdict = judge(
            model, direction, scorer, neutral, auroc=auroc, least=least, topics=topics, tokens=effort.verdict_tokens,
            seed=seed, on_tokens=advance,
        )  # fmt: skip
    return replace(direction, provenance=direction.provenance | {"verdict": verdict.as_json()}), verdict


def calibrated(model: SteeredModel, direction: Direction, *, seed: int = 0, progress: Bar = bar) -> Direction:
    """Return the direction with the range of its slider (`Direction.calibrated`) in its provenance.

    `seed` is that of the replies. Errors: MismatchError for a direction that does not fit the model.

        calibrated(model, steer.find(model, "moralizing")).calibrated  # (-1.6, 1.4)
    """
    with progress(f"{direction.name}: range", expected_tokens(1), "tokens") as advance:
        measured = calibrate_direction(model, direction, seed=seed, on_tokens=advance)
    return replace(direction, provenance=direction.provenance | {"calibrated": measured.range and list(measured.range)})

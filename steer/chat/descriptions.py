"""Titles and descriptions of sliders for people: what a trait is, what each end of its slider does, whether it works,
and what a latent fires on and makes likelier.

The page and the feature index use them.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS as STOP_WORDS

from steer.core.dictionary_files import FEATURES
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.slider import Slider, slider_rows
from steer.core.small_files import stamp
from steer.core.trait import END, Trait, shipped_traits
from steer.errors import SteerError, skip
from steer.sae.records import FeatureRecord, read_records

_WORDS = 4
"""Tokens that a title or a description names at most."""
INDICATES, CERTAIN = 0.2, 0.05
"""Distance of a latent's AUROC from chance at which its title names the trait, and the largest false discovery rate."""
_READABLE = re.compile(r"\w{2,}")
_SPECIAL = re.compile(r"<.*>")


def title_of(slider: Slider) -> str:
    """Return the title that the page shows for a slider."""
    target = slider.target
    if isinstance(target, Direction):
        return target.name.replace("-", " ").replace("_", " ")
    row = _slider_row(target)
    if row is not None:
        many = f", {len(target.indices)} features" if len(target.indices) > 1 else ", one feature"
        return f"{row.get('trait') or target.name}{many}"
    record = record_of(target)
    return target.name if record is None else title(record)


def ends_of(slider: Slider) -> tuple[str, str]:
    """Return what the model does at the low and at the high end of a slider, in a few words, as "never lectures" and
    "preaches"."""
    if slider.operation == "ablate":
        return "left as it is", "taken out"
    name, sentences = slider.target.name, {}
    if isinstance(slider.target, Direction):
        if name in shipped_traits() and (trait := _trait(name)) and trait.low_end and trait.high_end:
            return trait.low_end, trait.high_end
        sentences = slider.target.provenance
        if "votes" in sentences:
            return "less to your taste", "more to your taste"
    low, high = (_short(sentences[key]) if isinstance(sentences.get(key), str) else None for key in ("without", "with"))
    return low or "less", high or "more"


@dataclass(frozen=True)
class PlainVerdict:
    """The verdict of `steer find` on a slider, for people."""

    works: bool
    short: str
    """In a few words."""
    sentence: str
    auroc: float | None
    """Held-out AUROC."""


def verdict_of(slider: Slider) -> PlainVerdict | None:
    """Return what `steer find` measured of a slider; None for a slider of features, and where it measured nothing."""
    about = slider.target.provenance if isinstance(slider.target, Direction) else {}
    return plain_verdict(about.get("verdict"), of_votes="votes" in about)


def plain_verdict(found: Any, of_votes: bool = False) -> PlainVerdict | None:
    """Return a verdict that `Verdict.as_json` returned, for people; None for anything else. `of_votes`: the slider is
    made of votes."""
    if not isinstance(found, dict):
        return None
    says, auroc = str(found.get("says")), found.get("auroc")
    known = (_TASTE_VERDICTS if of_votes else {}).get(says) or _VERDICTS.get(says)
    if known is None:  # "steers but drags X along"
        drags = found.get("drags")
        along = [_DRAGGED.get(str(d), str(d)) for d in drags] if isinstance(drags, list) else []
        known = "changes more than it should", f"It works, and changes this too: {', '.join(along) or says}."
    return PlainVerdict(says == "works", *known, auroc if isinstance(auroc, float) else None)


_VERDICTS = {
    "works": ("works", "It works: on messages that the search never saw, moving it changed the replies as it should."),
    "reads but does not steer": (
        "does not steer",
        "It does not steer: it recognises such replies, and moving it changes them hardly more than chance.",
    ),
    "too weak for this model": (
        "too weak", "It is too weak for this model, whose replies hardly differ under the two sentences.",
    ),
}  # fmt: skip
_TASTE_VERDICTS = {
    "works": ("works", "It works: on messages without a vote, moving it brought the words of replies that you like."),
    "too weak for this model": (
        "no better than a coin", "Your votes do not show yet what you like: go on voting, and make it again.",
    ),
}  # fmt: skip
"""Verdict -> (in a few words, as a sentence); the second of a slider that is made of votes."""
_DRAGGED = {"KL": "the wording in general", "repetition": "how much it repeats itself"}


def description_of(slider: Slider) -> str:
    """Describe what a slider moves, in a sentence or two."""
    target = slider.target
    if isinstance(target, Direction):
        if isinstance(votes := target.provenance.get("votes"), dict) and isinstance(votes.get("says"), str):
            return f"Your taste: {target.name} {votes['says']}."
        if target.name in shipped_traits():
            return _summary(target.name)
        sentences = target.provenance
        if not isinstance(sentences.get("with"), str):
            return f"The direction {target.name!r}."
        low = sentences.get("without")
        opposite = f"instructed \u201c{low}\u201d" if isinstance(low, str) else "not instructed"
        return f"At the high end as if instructed \u201c{sentences['with']}\u201d, at the low end as if {opposite}."
    row, record = _slider_row(target), record_of(target)
    parts = []
    if row is not None and row.get("trait"):
        summary = _summary(str(row["trait"]))
        parts.append(f"{'Features' if len(target.indices) > 1 else 'A feature'} that indicate the trait: {summary}")
    if record is not None:
        parts.append(description(record))
    return " ".join(parts) or f"A feature of {target.dictionary.name}."


def title(record: FeatureRecord) -> str:
    """Return a latent's title: the trait that it indicates, or the words that it fires on repeatedly, or its number.

    A latent indicates a trait if its held-out AUROC is at least `INDICATES` from chance, beyond the false discovery
    rate `CERTAIN`. Words that any text has, and a word that it fired on once, say nothing about a latent.
    """
    trait = record.best_trait
    if trait is not None and record.distance(trait) >= INDICATES and record.traits[trait].q <= CERTAIN:
        side = "with" if record.traits[trait].auroc > 0.5 else "without"
        return f"{side} {trait.replace('-', ' ')} (feature {record.index})"
    counts = _firing_tokens(record)
    words = [t for t, n in counts.most_common() if n > 1 and len(t) > 2 and t.isalpha() and t.lower() not in STOP_WORDS]
    return f"on {_quoted(words[:3])}" if words else f"feature {record.index}"


def description(record: FeatureRecord) -> str:
    """Describe what a latent fires on, how often, and which tokens it makes likelier."""
    frequency = f"on one token in {round(1 / record.rate):,}" if record.rate > 1e-12 else "on none"
    tokens, raised = _fires_on(record), _raises(record)
    sentence = f"Fires {frequency}" + (f", as on {_quoted(tokens)}" if tokens else "")
    return f"{sentence}; adding it makes {_quoted(raised)} likelier." if raised else f"{sentence}."


def _fires_on(record: FeatureRecord) -> list[str]:
    """Return the tokens on which a latent fires in its stored contexts, the most frequent first: words that not any
    text has; where there are none, words; and where there are none, all."""
    tokens = [t for t, _ in _firing_tokens(record).most_common()]
    words = [t for t in tokens if _READABLE.search(t)]
    return ([t for t in words if t.lower() not in STOP_WORDS] or words or tokens)[:_WORDS]


def _firing_tokens(record: FeatureRecord) -> Counter[str]:
    return Counter(shown for c in record.contexts if (shown := c.token.strip().strip("\u21b5")))


def _raises(record: FeatureRecord) -> list[str]:
    """Return the words that a latent makes likelier, but for those that any text has. Where tokens have a space before
    them, those without one are the rests of words, and say nothing."""
    tokens = [t for t, _ in record.top_tokens if _READABLE.search(t) and not _SPECIAL.fullmatch(t.strip())]
    begin = [t for t in tokens if t[0].isspace()] or tokens
    return list(dict.fromkeys(w for t in begin if (w := t.strip()).lower() not in STOP_WORDS))[:_WORDS]


def record_of(feature: Feature) -> FeatureRecord | None:
    """Return the labels of a feature's first latent; None if its dictionary has no labels."""
    place = feature.dictionary.place
    return None if place is None else records_at(Path(place)).get(feature.indices[0])


def records_at(place: Path) -> dict[int, FeatureRecord]:
    """Return a dictionary's labels by latent index. The file is read again only after it has changed.

    Without a file there are no labels; a broken file gives none, with a warning.
    """
    return _records(place / FEATURES, stamp(place / FEATURES))[0]


def labels_problem(place: Path) -> str | None:
    """Return what is wrong with a dictionary's label file, in one line that names file and line; None if nothing is."""
    return _records(place / FEATURES, stamp(place / FEATURES))[1]


@lru_cache(maxsize=4)
def _records(file: Path, stamp: tuple[int, ...]) -> tuple[dict[int, FeatureRecord], str | None]:
    if not stamp:
        return {}, None
    try:
        return {r.index: r for r in read_records(file)}, None
    except (SteerError, OSError) as e:
        skip(file, e)
        return {}, str(e)


def _slider_row(feature: Feature) -> dict[str, Any] | None:
    place = feature.dictionary.place
    try:
        rows = [] if place is None else slider_rows(Path(place))
    except SteerError:  # the library warns about the file
        return None
    return next((r for r in rows if r["name"] == feature.name), None)


def _summary(trait: str) -> str:
    loaded = _trait(trait)
    return trait if loaded is None else loaded.summary


@lru_cache(maxsize=64)
def _trait(name: str) -> Trait | None:
    try:
        return Trait.load(name)
    except SteerError:
        return None


def _short(text: str) -> str:
    """Shorten a sentence to the length of a slider's end, at a word."""
    return textwrap.shorten(text, END, placeholder="\u2026") or f"{text[: END - 1]}\u2026"


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f"\u201c{t}\u201d" for t in tokens)

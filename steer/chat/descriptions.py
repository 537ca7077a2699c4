"""Titles and descriptions of sliders for people: what a trait is, and what a latent fires on and makes likelier.

The page and the feature index use them. A latent is shown by a description, never by its index.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from steer.core.dictionary_files import FEATURES
from steer.core.direction import Direction
from steer.core.feature import Feature
from steer.core.slider import Slider, slider_rows
from steer.core.small_files import stamp
from steer.core.trait import Trait, shipped_traits
from steer.errors import SteerError, skip
from steer.sae.records import FeatureRecord, read_records

_WORDS = 4
"""Tokens that a title or a description names at most."""
_READABLE = re.compile(r"\w{2,}")


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


def description_of(slider: Slider) -> str:
    """Describe what a slider moves, in a sentence or two."""
    target = slider.target
    if isinstance(target, Direction):
        if isinstance(votes := target.provenance.get("votes"), dict) and isinstance(votes.get("says"), str):
            return f"Your taste: {target.name} {votes['says']}."
        return _summary(target.name) if target.name in shipped_traits() else f"The direction {target.name!r}."
    row, record = _slider_row(target), record_of(target)
    parts = []
    if row is not None and row.get("trait"):
        summary = _summary(str(row["trait"]))
        parts.append(f"{'Features' if len(target.indices) > 1 else 'A feature'} that tell the trait: {summary}")
    if record is not None:
        parts.append(description(record))
    return " ".join(parts) or f"A feature of {target.dictionary.name}."


def title(record: FeatureRecord) -> str:
    """Return a latent's title: tokens that it fires on, or else tokens that it makes likelier."""
    tokens, raised = _fires_on(record)[:3], _raises(record)[:3]
    return f"on {_quoted(tokens)}" if tokens else f"for {_quoted(raised)}" if raised else "without words"


def description(record: FeatureRecord) -> str:
    """Describe what a latent fires on, how often, and which tokens it makes likelier."""
    frequency = f"on one token in {round(1 / record.rate):,}" if record.rate > 1e-12 else "on none"
    tokens, raised = _fires_on(record), _raises(record)
    sentence = f"Fires {frequency}" + (f", as on {_quoted(tokens)}" if tokens else "")
    return f"{sentence}; adding it makes {_quoted(raised)} likelier." if raised else f"{sentence}."


def _fires_on(record: FeatureRecord) -> list[str]:
    """Return the tokens on which a latent fires in its stored contexts, the most frequent first."""
    tokens = Counter(shown for c in record.contexts if (shown := c.token.strip().strip("\u21b5")))
    return [t for t, _ in tokens.most_common(_WORDS)]


def _raises(record: FeatureRecord) -> list[str]:
    """Return the tokens that a latent makes likelier; only those that look like words, if there are any."""
    tokens = list(dict.fromkeys(t.strip() for t, _ in record.top_tokens if t.strip() and "\ufffd" not in t))
    return ([t for t in tokens if _READABLE.search(t)] or tokens)[:_WORDS]


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


@lru_cache(maxsize=64)
def _summary(trait: str) -> str:
    try:
        return Trait.load(trait).summary
    except SteerError:
        return trait


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f"\u201c{t}\u201d" for t in tokens)

"""Records of a dictionary's latents: features.jsonl, one line per live latent.

`steer.sae.labels` makes the records, `steer find --dictionary` adds trait scores, `steer features` searches them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from steer.errors import SteerError, UsageError
from steer.files import one_line, parse_json, replacing

if TYPE_CHECKING:  # listing and searching labels must not import torch
    from steer.sae.ranking import Ranking

Tokens = list[tuple[str, float]]
"""(text, logit) of tokens, strongest first."""


@dataclass(frozen=True)
class Context:
    """A place in the text where a latent fires."""

    before: str
    """Text before the token. Line breaks are shown as ↵ in all three texts."""
    token: str
    """The token that the latent fires on."""
    after: str
    activation: float


@dataclass(frozen=True)
class TraitScore:
    """How well a latent separates held-out replies with a trait from those without."""

    auroc: float
    """Held-out AUROC, by the pooling that separates the fit replies better."""
    auroc_max: float
    """Held-out AUROC of the largest activation over response tokens."""
    auroc_mean: float
    """Held-out AUROC of the mean activation over response tokens."""
    q: float
    """False discovery rate over all latents of the dictionary."""


@dataclass(frozen=True)
class FeatureRecord:
    """The label of one latent, computed from the model and text without a judge model."""

    index: int
    rate: float
    """Share of tokens that the latent fires on."""
    unit: float
    """The 0.99 quantile of its positive activations: amount 1 of its slider."""
    max: float
    """Its largest activation."""
    top_tokens: Tokens
    """The tokens whose logits its decoder row raises most, through the final norm and the unembedding."""
    bottom_tokens: Tokens
    """The tokens whose logits it lowers most."""
    contexts: list[Context]
    """Text around tokens that it fires on: the highest activations first, then lower quantiles."""
    nearest: list[tuple[int, float]]
    """(latent, cosine of the decoder rows) of the most similar latents."""
    traits: dict[str, TraitScore] = field(default_factory=dict)
    """Trait name -> score, for the traits measured so far."""

    @property
    def best_trait(self) -> str | None:
        """The trait whose AUROC is furthest from chance, for or against; None if no trait was measured."""
        return max(self.traits, key=self.distance, default=None)

    @property
    def best_auroc(self) -> float | None:
        """The held-out AUROC for that trait."""
        best = self.best_trait
        return None if best is None else self.traits[best].auroc

    def distance(self, trait: str) -> float:
        """Distance of the held-out AUROC for a trait from chance (0.5); 0 if the trait was not measured."""
        return abs(self.traits[trait].auroc - 0.5) if trait in self.traits else 0.0

    def to_json(self) -> dict[str, Any]:
        """The record's line in features.jsonl as JSON, numbers rounded to five significant digits: the file is for
        people to read, and is a tenth of the dictionary's size."""
        return _rounded(vars(self) | {"best_trait": self.best_trait, "best_auroc": self.best_auroc})


_RECORD = TypeAdapter(FeatureRecord)


def write_records(path: str | Path, records: Iterable[FeatureRecord]) -> Path:
    """Write features.jsonl and return its path. An old file is replaced in one step when the new one is complete."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return Path(path)


def read_records(path: str | Path) -> list[FeatureRecord]:
    """Read features.jsonl. Errors: SteerError that names file and line."""
    path = Path(path)
    if not path.is_file():
        raise SteerError(f"{path}: expected the labels of a dictionary, found no file; label the dictionary first")
    out = []
    # Split at line feeds only: a context may contain other characters that `splitlines` takes as line ends.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            out.append(_RECORD.validate_python(parse_json(line)))
        except ValueError as e:
            found = one_line(e)
            if isinstance(e, ValidationError):
                first = e.errors()[0]
                name = ".".join(map(str, first["loc"]))
                found = f"no {name!r}" if first["type"] == "missing" else f"{name} {first['input']!r:.60}".strip()
            raise SteerError(
                f"{path}, line {number}: expected a latent's record, found {found}; label the dictionary again"
            ) from e
    return out


def with_trait(records: Sequence[FeatureRecord], trait: str, ranking: Ranking) -> list[FeatureRecord]:
    """The records with the scores of one trait added, or replaced if they had some."""

    def score(latent: int) -> TraitScore:
        return TraitScore(*(float(getattr(ranking, f.name)[latent]) for f in fields(TraitScore)))

    return [replace(r, traits=r.traits | {trait: score(r.index)}) for r in records]


def search(
    records: Sequence[FeatureRecord], words: str | None = None, trait: str | None = None, limit: int | None = None
) -> list[FeatureRecord]:
    """The first `limit` records in which every one of `words` occurs (in top tokens, contexts or names of traits),
    ignoring case.

    With `trait` they are ordered by how far its AUROC is from chance; without it by how often the words occur, then by
    firing rate. Error: UsageError for a trait that no record has been measured on.

        search(read_records("dictionary/features.jsonl"), "sorry apologise", limit=10)
    """
    known = sorted({t for r in records for t in r.traits})
    if trait is not None and trait not in known:
        raise UsageError(
            f"trait {trait!r}: expected one of {', '.join(known) or 'none so far'}; "
            f"measure it first: steer find MODEL {trait} --dictionary DIR"
        )
    wanted = (words or "").lower().split()
    found = []
    for record in records:
        text = _text(record)
        counts = [text.count(w) for w in wanted]
        if all(counts):
            found.append((record, sum(counts)))

    def key(entry: tuple[FeatureRecord, int]) -> tuple[float, float, int]:
        record, count = entry
        return (-record.distance(trait) if trait else -count, -record.rate, record.index)

    return [record for record, _ in sorted(found, key=key)][:limit]


def _text(record: FeatureRecord) -> str:
    tokens = [text for text, _ in record.top_tokens]
    return "\n".join([*tokens, *(c.before + c.token + c.after for c in record.contexts), *record.traits]).lower()


def _rounded(value: Any) -> Any:
    if isinstance(value, Context | TraitScore):
        value = vars(value)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

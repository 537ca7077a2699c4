"""Search in the features of a model's dictionaries: by words, by trait, or by what fires on a message.

It reads the labels that `steer features --label` and `steer find --dictionary` wrote beside each dictionary. The page
part `features` shows the results.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.chat.descriptions import description, labels_problem, records_at, title
from steer.chat.local import turns_of
from steer.chat.readout import pieces_of
from steer.checkpoint.library import dictionaries_of, dictionary_at
from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import read_manifest
from steer.core.feature import Feature
from steer.errors import SteerError, UsageError
from steer.files import read_json_object
from steer.model.fit_check import check_fits
from steer.model.forward import read_residuals
from steer.model.steering.low_rank import encoder_rows
from steer.sae.pooling import encoded, inliers
from steer.sae.records import FeatureRecord, search

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel


@dataclass(frozen=True)
class FeatureCard:
    """A latent's record, and what the page shows with it."""

    record: FeatureRecord
    name: str
    """Name of its slider, as in `L14/123`, for pinning."""
    title: str
    description: str
    site: int
    share: float
    """How far amount 1 moves the residual stream, as a share of its median norm; nan if unknown."""
    nearest: list[tuple[str, str, float]]
    """(name, title, cosine similarity) of the most similar latents."""
    output_score: dict[str, float]
    """Trait -> output score: how much likelier adding the latent makes its own top tokens. Only for measured traits."""


@dataclass(frozen=True)
class TopActivation:
    """A latent that fires on a message."""

    card: FeatureCard
    strength: float
    """Its largest activation on the message, in units."""
    marks: list[tuple[str, float]]
    """The message token by token: text, and the latent's activation in units."""


class FeatureIndex:
    """The features of a model's dictionaries."""

    def __init__(self, model: SteeredModel) -> None:
        self.model = model
        self._in_use: dict[Path, Dictionary] = {}
        self.places: dict[str, Path] = {}
        """Dictionary name -> directory. Of several at one site only the one that names like `L14/123` refer to."""
        self.problems: list[str] = []
        """One line for each dictionary that is left out because its labels are broken."""
        sites = set()
        for name, place in dictionaries_of(model.sketch()).items():
            if (problem := labels_problem(place)) is not None:
                self.problems.append(problem)
            site = read_manifest(place).get("site")
            if site not in sites and records_at(place):
                sites.add(site)
                self.places[name] = place

    @property
    def dictionaries(self) -> list[str]:
        """The dictionaries' names."""
        return list(self.places)

    def traits(self) -> list[str]:
        """Return the traits by which features were ranked."""
        return sorted({t for p in self.places.values() for r in records_at(p).values() for t in r.traits})

    def search(self, words: str = "", trait: str | None = None, limit: int = 20) -> list[FeatureCard]:
        """Return features whose tokens or contexts contain every word, those with the most occurrences first.

        Without words: the features that indicate a trait. `trait`: those that indicate it or its absence. Both with the
        most certain first. Errors: UsageError for a trait by which no features were ranked.
        """
        traits = self.traits()
        if trait is not None and trait not in traits:
            raise UsageError(
                f"trait {trait!r}: expected one of {', '.join(traits) or 'none so far'}; rank the features first: "
                f"steer find {self.model.name} {trait} --dictionary DIR"
            )
        found: list[tuple[Path, FeatureRecord]] = []
        for place in self.places.values():
            latents = dictionary_at(place).latents
            # The file may come from a stranger: a latent without a unit, or outside the dictionary, cannot be moved.
            records = [r for r in records_at(place).values() if r.index < latents and 0 < abs(r.unit) < math.inf]
            if trait is None or any(trait in r.traits for r in records):
                found += [(place, r) for r in search(records, words, trait, limit if words or trait else None)]
        if trait is not None:
            found.sort(key=lambda f: -f[1].distance(trait))
        elif not words:
            found.sort(key=lambda f: -max((f[1].distance(t) for t in f[1].traits), default=0.0))
        return [self._card(place, record) for place, record in found[:limit]]

    def fires_on(self, text: str, limit: int = 12) -> list[TopActivation]:
        """Return the features that fire most on a user's message, by their largest activation, the strongest first.

        The model reads it without sliders; special tokens and tokens whose residual norm is an outlier are ignored.
        Errors: UsageError for a message that is empty or longer than the context.
        """
        ids, pieces, start = self._message(text)
        out: list[TopActivation] = []
        for place in self.places.values():
            dictionary = self._in_use[place] = dictionary_at(place)
            check_fits(self.model, dictionary)
            out += self._firings(place, dictionary, ids, pieces, start, limit)
        return sorted(out, key=lambda f: -f.strength)[:limit]

    @torch.inference_mode()
    def _firings(
        self, place: Path, dictionary: Dictionary, ids: list[int], pieces: list[str], start: int, limit: int
    ) -> list[TopActivation]:
        assert dictionary.site is not None
        records = records_at(place)
        h = self._residual(ids, dictionary.site)[start : start + len(pieces)].float()
        fine = inliers(dictionary, h)
        highest = torch.zeros(dictionary.latents)
        for _, acts in encoded(dictionary, h[fine]):
            highest = torch.maximum(highest, acts.amax(0).float().cpu())
        units = torch.full((dictionary.latents,), math.inf)  # as for latents that never fired
        for record in records.values():
            if record.index < dictionary.latents and record.unit > 0:
                units[record.index] = record.unit
        strength, latents = (highest / units).topk(min(limit, dictionary.latents))
        chosen = [(float(s), j) for s, j in zip(strength, latents.tolist(), strict=True) if s > 0]
        if not chosen:
            return []
        rows = encoder_rows(dictionary, tuple(j for _, j in chosen), h.device, h.dtype)(h) * fine[:, None]
        out = []
        for column, (most, j) in enumerate(chosen):
            marks = [(p, float(a) / records[j].unit) for p, a in zip(pieces, rows[:, column], strict=True)]
            out.append(TopActivation(self._card(place, records[j]), most, marks))
        return out

    def _residual(self, ids: list[int], site: int) -> Float[Tensor, "seq d"]:
        found: list[Tensor] = []
        with turns_of(self.model).turn(), self.model.untouched():
            row = torch.tensor([ids], device=self.model.device)
            read_residuals(self.model, row, [site], lambda _, h: found.append(h[0].clone()))
        return found[0]

    def _message(self, text: str) -> tuple[list[int], list[str], int]:
        """Return a chat with just the message as token ids, the text of each of the message's tokens, and the index of
        the first one."""
        text = text.strip()
        if not text:
            raise UsageError("message: expected some text, found none; write something")
        ids = self.model.prompt_ids([{"role": "user", "content": text}])
        if len(ids) > self.model.context:
            raise UsageError(f"message: expected at most {self.model.context} tokens, found {len(ids)}; shorten it")
        pieces = pieces_of(self.model, ids)
        ends = list(accumulate(map(len, pieces)))
        at = "".join(pieces).rfind(text)
        start = bisect_right(ends, at)
        message_ids = ids[start : bisect_left(ends, at + len(text)) + 1]
        return ids, pieces_of(self.model, message_ids), start

    def _card(self, place: Path, record: FeatureRecord) -> FeatureCard:
        dictionary, records = dictionary_at(place), records_at(place)
        feature = Feature.latent(dictionary, record.index, record.unit)

        def name(index: int) -> str:
            return f"L{dictionary.site}/{index}"

        nearest = [(name(j), title(records[j]), cosine) for j, cosine in record.nearest if j in records]
        return FeatureCard(
            record, name(record.index), title(record), description(record), feature.site, feature.share(1.0), nearest,
            _output_scores(place, record.index),
        )  # fmt: skip


def _output_scores(place: Path, index: int) -> dict[str, float]:
    """Return trait -> output score of a latent, for the traits that `steer find --dictionary` measured it on."""
    out = {}
    for file in sorted((place / "traits").glob("*.json")):
        found = _ranking(file, file.stat().st_mtime_ns)
        for row in found.get("top", []):
            if isinstance(row, dict) and row.get("index") == index and isinstance(row.get("output_score"), float):
                out[str(found.get("trait", file.stem))] = row["output_score"]
    return out


@lru_cache(maxsize=32)
def _ranking(file: Path, stamp: int) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except SteerError:
        return {}

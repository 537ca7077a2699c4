"""Finding features: by words, by trait, or by what fires on a message; and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.chat.inside import pieces_of
from steer.chat.turns import turns_of
from steer.chat.words import description, labels_problem, records_at, title
from steer.errors import SteerError, UsageError
from steer.features.pooling import check_fits, encoded, kept
from steer.features.records import Context, FeatureRecord, Tokens, search
from steer.files import read_json_object
from steer.live.forward import read_residuals
from steer.live.library import dictionaries_of, dictionary_at
from steer.live.readings import encoder_rows
from steer.values.dictionary import Dictionary
from steer.values.dictionary_files import read_manifest
from steer.values.feature import Feature

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


@dataclass(frozen=True)
class FeatureCard:
    """What is known of one latent."""

    name: str
    """What its slider is called, to be pinned by."""
    title: str
    description: str
    dictionary: str
    site: int
    index: int
    rate: float
    """Share of tokens it fires on."""
    unit: float
    """Amount 1 of its slider, as an activation."""
    share: float
    """How far amount 1 moves the residual stream, as a share of its median norm; nan where that is not known."""
    top_tokens: Tokens
    bottom_tokens: Tokens
    contexts: list[Context]
    nearest: list[tuple[str, str, float]]
    """(name, title, cosine) of the latents most like it."""
    auroc: dict[str, tuple[float, float]]
    """Trait -> (held-out AUROC, false discovery rate)."""
    output_score: dict[str, float]
    """Trait -> how much likelier adding it makes the tokens that it should; for those that were tried."""


@dataclass(frozen=True)
class Firing:
    """A latent that fires on a message."""

    card: FeatureCard
    strength: float
    """Its largest activation there, in units."""
    marks: list[tuple[str, float]]
    """The message in pieces, and how strongly it fires on each, in units."""


class Shelf:
    """The features of a model's dictionaries."""

    def __init__(self, model: SteeredModel) -> None:
        self.model = model
        self._used: dict[Path, Dictionary] = {}
        self.places: dict[str, Path] = {}
        """Dictionaries by name: of several at one site the one that `L14/123` means."""
        self.problems: list[str] = []
        """A line for each dictionary that is left out, as its labels are broken."""
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
        """Their names."""
        return list(self.places)

    def traits(self) -> list[str]:
        """Traits that features were ranked by."""
        return sorted({t for p in self.places.values() for r in records_at(p).values() for t in r.traits})

    def by_words(self, words: str, limit: int = 20) -> list[FeatureCard]:
        """Features in whose tokens or contexts every word occurs, those first where they occur most; without words
        those that fire most often."""
        return self._found(words, None, limit)

    def by_trait(self, trait: str, limit: int = 20) -> list[FeatureCard]:
        """Features that tell a trait, for or against, the surest first.

        Errors: UsageError for one that none was ranked by.
        """
        if trait not in self.traits():
            there = ", ".join(self.traits()) or "none so far"
            raise UsageError(
                f"trait {trait!r}: expected one of {there}; rank the features first: "
                f"steer find {self.model.name} {trait} --dictionary DIR"
            )
        return self._found(None, trait, limit)

    def card(self, dictionary: str, index: int) -> FeatureCard:
        """One latent. Errors: UsageError for one that is not there, or never fired."""
        place = self.places.get(dictionary)
        record = None if place is None else records_at(place).get(index)
        if place is None or record is None:
            raise UsageError(f"latent {index} of {dictionary!r}: expected one that fires, found none; choose another")
        return self._card(place, record)

    def fires_on(
        self, text: str, before: Sequence[Mapping[str, str]] = (), role: str = "user", limit: int = 12
    ) -> list[Firing]:
        """The features that fire most on a message, in units, the strongest first.

        `before`: the chat that it follows. The model reads it without sliders; special tokens and those with the norm
        of an outlier are left out. Errors: UsageError for an empty message.
        """
        ids, pieces, start = self._message(text, before, role)
        out: list[Firing] = []
        for place in self.places.values():
            dictionary = self._used[place] = dictionary_at(place)
            check_fits(self.model, dictionary)
            out += self._firings(place, dictionary, ids, pieces, start, limit)
        return sorted(out, key=lambda f: -f.strength)[:limit]

    @torch.inference_mode()
    def _firings(
        self, place: Path, dictionary: Dictionary, ids: list[int], pieces: list[str], start: int, limit: int
    ) -> list[Firing]:
        assert dictionary.site is not None
        records = records_at(place)
        h = self._residual(ids, dictionary.site)[start : start + len(pieces)].float()
        fine = kept(dictionary, h)
        highest = torch.zeros(dictionary.latents)
        for _, acts in encoded(dictionary, h[fine]):
            highest = torch.maximum(highest, acts.amax(0).float().cpu())
        units = _units(place, (place / "features.jsonl").stat().st_mtime_ns, dictionary.latents)
        strength, latents = (highest / units).topk(min(limit, dictionary.latents))
        chosen = [(float(s), j) for s, j in zip(strength, latents.tolist(), strict=True) if s > 0]
        if not chosen:
            return []
        rows = encoder_rows(dictionary, tuple(j for _, j in chosen), h.device, h.dtype)(h) * fine[:, None]
        out = []
        for column, (most, j) in enumerate(chosen):
            marks = [(p, float(a) / records[j].unit) for p, a in zip(pieces, rows[:, column], strict=True)]
            out.append(Firing(self._card(place, records[j]), most, marks))
        return out

    def _residual(self, ids: list[int], site: int) -> Float[Tensor, "seq d"]:
        found: list[Tensor] = []
        with turns_of(self.model).turn(), self.model.untouched():
            row = torch.tensor([ids], device=self.model.device)
            read_residuals(self.model, row, [site], lambda _, h: found.append(h[0].clone()))
        return found[0]

    def _message(self, text: str, before: Sequence[Mapping[str, str]], role: str) -> tuple[list[int], list[str], int]:
        """A chat that ends in the message as tokens, the message's own pieces, and where they begin."""
        text = text.strip()
        if not text:
            raise UsageError("message: expected some text, found none; write something")
        model = self.model
        if role == "assistant" and before:
            prompt, own = model.prompt_ids(before), model.encode(text)
            ids, start = [*prompt, *own], len(prompt)
        else:
            ids = model.prompt_ids([*before, {"role": "user", "content": text}])
            pieces = pieces_of(model, ids)
            whole = "".join(pieces)
            # The last time that it stands there: the chat before may quote it.
            at = whole.rfind(text)
            ends, start, stop = 0, None, len(ids)
            for i, piece in enumerate(pieces):
                ends += len(piece)
                if start is None and ends > at:
                    start = i
                if ends >= at + len(text):
                    stop = i + 1
                    break
            start = start or 0
            own = ids[start:stop]
        most = model.context
        if len(ids) > most:
            if before:
                return self._message(text, (), role)
            raise UsageError(f"message: expected at most {most} tokens, found {len(ids)}; shorten it")
        return ids, pieces_of(model, own), start

    def _found(self, words: str | None, trait: str | None, limit: int) -> list[FeatureCard]:
        found: list[tuple[Path, FeatureRecord]] = []
        for place in self.places.values():
            latents = dictionary_at(place).latents
            # Of a stranger's file: one that has no unit, or is not in the dictionary, cannot be moved.
            records = [r for r in records_at(place).values() if r.index < latents and 0 < abs(r.unit) < math.inf]
            if trait is None or any(trait in r.traits for r in records):
                found += [(place, r) for r in search(records, words, trait, limit)]
        if trait is not None:
            found.sort(key=lambda f: -f[1].distance(trait))
        return [self._card(place, record) for place, record in found[:limit]]

    def _card(self, place: Path, r: FeatureRecord) -> FeatureCard:
        dictionary, records = dictionary_at(place), records_at(place)
        feature = Feature.latent(dictionary, r.index, r.unit)

        def name(index: int) -> str:
            return f"L{dictionary.site}/{index}"

        return FeatureCard(
            name(r.index), title(r), description(r), dictionary.name, feature.site, r.index, r.rate, r.unit,
            feature.share(1.0), r.top_tokens, r.bottom_tokens, r.contexts,
            [(name(j), title(records[j]), cosine) for j, cosine in r.nearest if j in records],
            {t: (s.auroc, s.q) for t, s in r.traits.items()}, _output_scores(place, r.index),
        )  # fmt: skip


@lru_cache(maxsize=8)
def _units(place: Path, stamp: int, latents: int) -> Float[Tensor, " latents"]:
    """The unit of each latent; infinite where it never fired."""
    out = torch.full((latents,), float("inf"))
    for index, record in records_at(place).items():
        if index < latents and record.unit > 0:
            out[index] = record.unit
    return out


def _output_scores(place: Path, index: int) -> dict[str, float]:
    """Of a latent that `steer find --dictionary` has tried."""
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

"""Whether a dictionary fits the checkpoint it is used on, measured on a few thousand tokens of plain prose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import MismatchError, UsageError
from steer.live.forward import read_residuals
from steer.values.dictionary import Dictionary
from steer.values.edit import Edit
from steer.values.feature import Feature
from steer.values.fit import Fit, measure_fit

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

FACTOR, MARGIN = 1.5, 0.1
"""A fit is poor when its FVU is over the reference times the one, and over the reference plus the other."""
WITHOUT_REFERENCE = 0.5
"""The FVU from which a dictionary that brings no figures of its own fits poorly."""
_PASSAGE, _ROWS = 256, 4


class FitWarning(UserWarning):
    """A dictionary fits the checkpoint poorly: its features may not mean there what they say."""


@dataclass(frozen=True)
class FitReport:
    """A dictionary's fit on a checkpoint, beside its own."""

    dictionary: str
    model: str
    fit: Fit
    """Measured here."""
    reference: float | None
    """The FVU that the dictionary's manifest gives: on the same prose where it has one, else on held-out tokens."""

    @property
    def poor(self) -> bool:
        """Whether the features may not mean what they say."""
        if self.reference is None:
            return not self.fit.fvu <= WITHOUT_REFERENCE
        return not self.fit.fvu <= max(FACTOR * self.reference, self.reference + MARGIN)

    def __str__(self) -> str:
        own = "it brings no figure of its own" if self.reference is None else f"its own is {self.reference:.2f}"
        return (
            f"dictionary {self.dictionary!r} on {self.model}: {self.fit.fvu:.2f} of the variance unexplained, {own}; "
            f"{self.fit.l0:.0f} latents a token, {self.fit.tokens:,} tokens"
        )


def check_fit(model: SteeredModel, dictionary: Dictionary) -> FitReport:
    """Measure the fit on the prose that ships; sliders are left out of it.

    Errors: MismatchError for a dictionary of another width, UsageError for one without a site that the model has.
    """
    if dictionary.width != model.anatomy.width:
        raise MismatchError(
            f"dictionary {dictionary.name!r} has width {dictionary.width}, {model.name} has residual width "
            f"{model.anatomy.width}; use a dictionary of this checkpoint"
        )
    if dictionary.site is None or not 0 <= dictionary.site < model.anatomy.blocks:
        raise UsageError(
            f"dictionary {dictionary.name!r}: expected a site from 0 to {model.anatomy.blocks - 1} for {model.name}, "
            f"found {dictionary.site}; use a dictionary of this checkpoint"
        )
    # Outliers by this model's own median: the dictionary's may be on another scale, which is what is to be told.
    here = replace(dictionary.to(model.device), norm=None)
    fit = measure_fit(here, _residuals(model, dictionary.site))
    return FitReport(dictionary.name, model.name, fit, _reference(dictionary))


def warn_of_poor_fits(model: SteeredModel, edit: Edit) -> None:
    """Check every dictionary that an edit uses on this model for the first time; warn of each that fits poorly."""
    reports = _REPORTS.setdefault(model, WeakKeyDictionary())
    targets = [t for m in edit.moves if not m.neutral for t in (m.target, m.when.gate and m.when.gate.on)]
    for dictionary in {t.dictionary: None for t in targets if isinstance(t, Feature)}:
        if dictionary not in reports:
            reports[dictionary] = check_fit(model, dictionary)
            if reports[dictionary].poor:
                warnings.warn(f"{reports[dictionary]}; its features may not mean what they say", FitWarning, 3)


_REPORTS: WeakKeyDictionary[SteeredModel, WeakKeyDictionary[Dictionary, FitReport]] = WeakKeyDictionary()


def _reference(dictionary: Dictionary) -> float | None:
    for key in ("fit_on_plain", "fit"):
        figures = dictionary.manifest.get(key)
        if isinstance(figures, dict) and isinstance(figures.get("fvu"), int | float):
            return float(figures["fvu"])
    return None


@torch.inference_mode()
def _residuals(model: SteeredModel, site: int) -> Iterator[Float[Tensor, "n d"]]:
    """The unsteered residual stream of the prose, a batch of passages at a time, BOS left out."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    ids = model.encode(text)
    bos = model.tokenizer.bos_token_id
    first = [bos] if bos is not None and model.encode("a", frame=True)[:1] == [bos] else []
    length = min(_PASSAGE, len(ids), model.context - len(first))
    passages = [first + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    for start in range(0, len(passages), _ROWS):
        read: list[Tensor] = []

        rows = torch.tensor(passages[start : start + _ROWS], device=model.device)
        with model.untouched():
            read_residuals(model, rows, [site], lambda _, h, read=read: read.append(h))
        yield read[0][:, len(first) :].reshape(-1, model.anatomy.width)

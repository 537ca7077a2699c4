"""Whether a dictionary fits the checkpoint that it is used on, measured on a few thousand tokens of plain prose.

Sliders call `warn_of_poor_fits` whenever an edit is set, which checks each dictionary once per model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.fit import Fit, measure_fit
from steer.errors import MismatchError, UsageError
from steer.model.forward import read_residuals
from steer.model.loaded import LoadedModel

FACTOR, MARGIN = 1.5, 0.1
"""A fit is poor when its FVU is above reference * FACTOR and above reference + MARGIN."""
WITHOUT_REFERENCE = 0.5
"""A dictionary without a reference fits poorly when its FVU is above this."""
_PASSAGE, _ROWS = 256, 4


class FitWarning(UserWarning):
    """A dictionary fits the checkpoint poorly: its features may not mean what their descriptions say."""


@dataclass(frozen=True)
class FitReport:
    """A dictionary's fit on a checkpoint, and the fit that its manifest gives for comparison."""

    dictionary: str
    model: str
    fit: Fit
    reference: float | None
    """The FVU in the dictionary's manifest: on the same prose if it has one, else on held-out tokens; None without."""

    @property
    def poor(self) -> bool:
        """Whether the fit is so poor that the features may not mean what their descriptions say."""
        reference = self.reference
        most = WITHOUT_REFERENCE if reference is None else max(FACTOR * reference, reference + MARGIN)
        return not self.fit.fvu <= most

    def __str__(self) -> str:
        given = "it brings no such figure" if self.reference is None else f"its own is {self.reference:.2f}"
        return (
            f"dictionary {self.dictionary!r} on {self.model}: {self.fit.fvu:.2f} of the variance unexplained, {given}; "
            f"{self.fit.l0:.0f} latents a token, {self.fit.tokens:,} tokens"
        )


def check_fits(model: LoadedModel, dictionary: Dictionary) -> int:
    """Check that the dictionary fits the model and return the dictionary's site.

    Errors: MismatchError for another width, UsageError for no site or one that the model lacks.
    """
    if dictionary.width != model.anatomy.width:
        raise MismatchError(
            f"dictionary {dictionary.name} has width {dictionary.width}, {model.name} has residual width "
            f"{model.anatomy.width}; use a dictionary trained on this checkpoint"
        )
    if dictionary.site is None or not 0 <= dictionary.site < model.anatomy.blocks:
        found = "none" if dictionary.site is None else dictionary.site
        raise UsageError(
            f"dictionary {dictionary.name}: expected a site from 0 to {model.anatomy.blocks - 1} for {model.name}, "
            f"found {found}; name the site it was trained on in its manifest.json"
        )
    return dictionary.site


def check_fit(model: LoadedModel, dictionary: Dictionary) -> FitReport:
    """Measure the fit on the prose that ships with steer, without any slider.

    Errors: those of `check_fits`.
    """
    site = check_fits(model, dictionary)
    # Without the dictionary's norm, outliers are found by this model's median. The norm of a dictionary that does not
    # fit may be on another scale, which this check has to report.
    without_norm = replace(dictionary.to(model.device), norm=None)
    fit = measure_fit(without_norm, _residuals(model, site))
    return FitReport(dictionary.name, model.name, fit, _reference(dictionary))


def warn_of_poor_fits(model: LoadedModel, edit: Edit) -> None:
    """Check each dictionary in an edit that is new on this model; warn (FitWarning) of each that fits poorly.

    Nothing is checked on a model that is only described, which no pass can be made with.
    """
    if model.hf.device.type == "meta":
        return
    reports = _REPORTS.setdefault(model, WeakKeyDictionary())
    targets = [t for m in edit.moves if m.acts for t in (m.target, m.when.gate and m.when.gate.on)]
    for dictionary in {t.dictionary: None for t in targets if isinstance(t, Feature)}:
        if dictionary not in reports:
            reports[dictionary] = check_fit(model, dictionary)
            if reports[dictionary].poor:
                warnings.warn(f"{reports[dictionary]}; its features may not mean what they say", FitWarning, 3)


_REPORTS: WeakKeyDictionary[LoadedModel, WeakKeyDictionary[Dictionary, FitReport]] = WeakKeyDictionary()


def _reference(dictionary: Dictionary) -> float | None:
    for key in ("fit_on_plain", "fit"):
        figures = dictionary.manifest.get(key)
        if isinstance(figures, dict) and isinstance(figures.get("fvu"), int | float):
            return float(figures["fvu"])
    return None


@torch.inference_mode()
def _residuals(model: LoadedModel, site: int) -> Iterator[Float[Tensor, "n d"]]:
    """Yield the unsteered residual stream of the prose, one batch of passages at a time, without BOS."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    ids = model.encode(text)
    first = list(model.frame)
    length = min(_PASSAGE, len(ids), model.context - len(first))
    passages = [first + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    for rows in torch.tensor(passages, device=model.device).split(_ROWS):
        read: list[Tensor] = []
        with model.untouched():
            read_residuals(model, rows, [site], lambda _, h, read=read: read.append(h))
        yield read[0][:, len(first) :].reshape(-1, model.anatomy.width)

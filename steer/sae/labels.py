"""Labels for every live latent, computed from the model and a harvest, without a judge model.

`steer features --label` writes them to features.jsonl: firing rate, unit, top tokens, contexts, nearest latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.errors import MismatchError
from steer.model.fit_check import check_fits
from steer.model.steered import SteeredModel
from steer.progress import Advance, bar
from steer.sae.logit_lens import logit_lens
from steer.sae.pooling import encoded, inliers
from steer.sae.records import Context, FeatureRecord
from steer.sae.shards import Activations, Harvest

BEFORE, AFTER = 12, 6
"""Tokens of context shown before and after the token."""
UNIT_QUANTILE = 0.99
"""Quantile of a latent's positive activations that is its unit."""
CONTEXTS = 6
"""Contexts in a record."""
LOWER_QUANTILES = (0.9, 0.5)
"""Quantiles that the last contexts of a latent come from: the highest activations alone make a latent look more
specific than it is."""
LOOKED_AT = 256
"""Number of firings searched, at each quantile, for contexts from different documents."""
NEAREST = 5
"""Number of most similar latents in a record."""
MOST_FIRINGS = 40_000_000
"""Largest number of firings in memory, twenty bytes each, several times that while they are sorted. For a dictionary
with more firings, fewer tokens are read."""
_CHUNK = 4096
"""Tokens read at a time."""


def label_latents(
    model: SteeredModel,
    dictionary: Dictionary,
    harvest: Harvest,
    *,
    tokens: int = 300_000,
    progress: Callable[..., AbstractContextManager[Advance]] = bar,
) -> list[FeatureRecord]:
    """A record of each latent that fires on about `tokens` tokens of the harvest (whole documents, evenly spread).

    Firing rate, 0.99 quantile and maximum are exact over those tokens. A record has up to `CONTEXTS` contexts, at
    most one per document and no two alike: those of the highest activations, and the last two from near the 0.9 and the
    0.5 quantile of the latent's positive activations.
    Errors: those of `check_fits`, and MismatchError for a harvest of another width or of other sites.
    """
    site = check_fits(model, dictionary)
    if harvest.width != dictionary.width:
        raise MismatchError(
            f"{harvest.place}: expected a harvest of width {dictionary.width}, that of dictionary {dictionary.name}, "
            f"found {harvest.width}; harvest the checkpoint that the dictionary was trained on"
        )
    stream = harvest.activations(site)
    rows = _rows_to_read(dictionary, stream, harvest.document.numpy(), tokens)
    with progress("Label", len(rows), "tokens") as advance:
        latents = list(_by_latent(dictionary, stream, rows, advance))
    live = [j for j, _, _ in latents]
    decoder = dictionary.decoder_rows(live)
    top, bottom = logit_lens(model, decoder)
    near = nearest(decoder, NEAREST)
    text = _Text(model, harvest)
    return [
        FeatureRecord(
            index=j,
            rate=len(fired) / len(rows),
            unit=float(np.quantile(values, UNIT_QUANTILE)),
            max=float(values[0]),
            top_tokens=top[i],
            bottom_tokens=bottom[i],
            contexts=[text.context(fired[at], values[at]) for at in text.spread(fired)],
            nearest=[(live[n], cosine) for n, cosine in near[i]],
        )
        for i, (j, fired, values) in enumerate(latents)
    ]


def _rows_to_read(
    dictionary: Dictionary, stream: Activations, document: Int[np.ndarray, " tokens"], tokens: int
) -> Int[np.ndarray, " rows"]:
    """Rows of whole documents with about `tokens` tokens in total, fewer if the firings would not fit in memory."""
    rows = spread_rows(document, tokens)
    probe = rows[:: max(1, len(rows) // _CHUNK)]
    l0 = sum(len(values) for _, _, values in _firings(dictionary, stream, probe)) / len(probe)
    return rows if l0 * len(rows) <= MOST_FIRINGS else spread_rows(document, int(MOST_FIRINGS / l0))


def _by_latent(
    dictionary: Dictionary, stream: Activations, rows: Int[np.ndarray, " rows"], advance: Advance
) -> Iterator[tuple[int, Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """Yield (latent, rows it fires on, activations from the highest down) of each latent that fires on `rows`."""
    found = []
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        found += _firings(dictionary, stream, part)
        advance(len(part))
    row, latent, value = (np.concatenate(column) for column in zip(*found, strict=True))
    del found
    order = np.lexsort((-value, latent))
    row, latent, value = row[order], latent[order], value[order]
    live, starts, counts = np.unique(latent, return_index=True, return_counts=True)
    for j, start, end in zip(live.tolist(), starts, starts + counts, strict=True):
        yield j, row[start:end], value[start:end]


@torch.inference_mode()
def _firings(
    dictionary: Dictionary, stream: Activations, rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (row, latent, value) of the firings on `rows`. On outliers no latent fires; a harvest should have none."""
    x = stream[torch.from_numpy(rows)]
    x = torch.where(inliers(dictionary, x)[:, None], x, torch.nan)
    for start, acts in encoded(dictionary, x):
        at, latent = (acts > 0).nonzero(as_tuple=True)
        yield rows[start:][at.numpy()], latent.numpy(), acts[at, latent].numpy()


def spread_rows(document: Int[np.ndarray, " tokens"], tokens: int) -> Int[np.ndarray, " rows"]:
    """Rows of whole documents, spread evenly over the text, with about `tokens` tokens in total."""
    if tokens >= len(document):
        return np.arange(len(document))
    number = np.cumsum(np.diff(document, prepend=document[:1]) != 0)
    share = tokens / len(document)
    # Document n is included whenever n * share passes a whole number; the first one always is.
    return np.flatnonzero((np.floor((number + 1) * share) > np.floor(number * share)) | (number == 0))


def nearest(rows: Float[Tensor, "n d"], count: int) -> list[list[tuple[int, float]]]:
    """Per row, (index, cosine) of the `count` most similar other rows."""
    count = min(count, len(rows) - 1)
    if count < 1:
        return [[] for _ in rows]
    found = NearestNeighbors(n_neighbors=count, metric="cosine").fit(rows.float().cpu().numpy())
    distances, indices = found.kneighbors()  # without rows to look up, each fitted row's neighbours except itself
    return [list(zip(i, c, strict=True)) for i, c in zip(indices.tolist(), (1 - distances).tolist(), strict=True)]


class _Text:
    """The text around rows of a harvest."""

    def __init__(self, model: SteeredModel, harvest: Harvest) -> None:
        self.tokenizer = model.tokenizer
        self.ids = harvest.token_ids.numpy()
        self.document = harvest.document.numpy()

    def spread(self, rows: Int[np.ndarray, " n"]) -> list[int]:
        """Indices of up to `CONTEXTS` of a latent's firings to show, `rows` being sorted by descending activation: one
        per document, and no two with the same passage."""
        lower = [int((1 - q) * (len(rows) - 1)) for q in LOWER_QUANTILES]
        taken: list[int] = []
        seen: set[Any] = set()
        for start, wanted in [(0, CONTEXTS - len(lower)), *((at, 1) for at in lower), (0, CONTEXTS)]:
            for at in range(start, min(start + LOOKED_AT, len(rows))):
                if wanted == 0 or len(taken) == CONTEXTS:
                    break
                row = int(rows[at])
                marks = {int(self.document[row]), self._passage(row)}
                if not marks & seen:
                    seen |= marks
                    taken.append(at)
                    wanted -= 1
        return sorted(taken)

    def context(self, row: int, activation: float) -> Context:
        """The text around a row."""
        first, last = self._bounds(int(row))
        # Decode the whole and cut it: a tokenizer may decode tokens differently together than one by one.
        before, through, whole = (self._decode(first, end) for end in (row, row + 1, last))
        if through.startswith(before) and whole.startswith(through):
            return Context(before, through[len(before) :], whole[len(through) :], float(activation))
        # A character spans several tokens, so the cut fails: decode the three parts separately.
        return Context(before, self._decode(row, row + 1), self._decode(row + 1, last), float(activation))

    def _decode(self, first: int, last: int) -> str:
        return self.tokenizer.decode(self.ids[first:last].tolist()).replace("\n", "↵")

    def _bounds(self, row: int) -> tuple[int, int]:
        """(first row of the context, one past its last row), within the document of `row`."""
        window = slice(max(0, row - BEFORE), row + AFTER + 1)
        same = self.document[window] == self.document[row]
        inside = np.flatnonzero(same) + window.start
        return int(inside[0]), int(inside[-1]) + 1

    def _passage(self, row: int) -> tuple[int, ...]:
        """The tokens around a row, to recognise equal contexts: many documents begin with the same prompt."""
        first, last = self._bounds(row)
        return tuple(self.ids[max(first, row - 4) : min(last, row + 3)].tolist())

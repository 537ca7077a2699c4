"""Labels for every live latent, from the model and its text alone; no judge reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.errors import MismatchError
from steer.features.logit_lens import logit_lens
from steer.features.pooling import check_fits, encoded, kept
from steer.features.records import Context, FeatureRecord
from steer.features.shards import Harvest
from steer.live.model import SteeredModel
from steer.progress import Advance, bar
from steer.values.dictionary import Dictionary

BEFORE, AFTER = 12, 6
"""Tokens of context shown on either side."""
UNIT_QUANTILE = 0.99
LOWER_QUANTILES = (0.9, 0.5)
"""Where the last contexts of a latent come from: what it fires on most alone would flatter it."""
LOOKED_AT = 256
"""Firings looked through for contexts from different documents, at each quantile."""
NEAREST = 5
MOST_FIRINGS = 40_000_000
"""Firings kept in memory, sixteen bytes each, a few times over while they are sorted. A dense dictionary reads
fewer tokens."""
_CHUNK = 4096
"""Tokens read at a time."""
_TOP = np.int64(0x7FFFFFFF)


@dataclass(frozen=True, eq=False)
class Firings:
    """Every activation above zero, by latent, the highest first."""

    latent: Int[np.ndarray, " firings"]
    row: Int[np.ndarray, " firings"]
    """The token's row in the harvest."""
    value: Float[np.ndarray, " firings"]
    tokens: int
    """How many tokens were read."""

    def each(self) -> Iterator[tuple[int, Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """(latent, rows, activations) of each live latent."""
        live, starts, counts = np.unique(self.latent, return_index=True, return_counts=True)
        for j, start, end in zip(live.tolist(), starts, starts + counts, strict=True):
            yield j, self.row[start:end], self.value[start:end]


def label_latents(
    model: SteeredModel,
    dictionary: Dictionary,
    harvest: Harvest,
    *,
    tokens: int = 300_000,
    per_latent: int = 6,
    progress: Callable[..., AbstractContextManager[Advance]] = bar,
) -> list[FeatureRecord]:
    """A record of each latent that fires on about `tokens` tokens of the harvest (whole documents, evenly spread).

    Firing rate, 0.99 quantile and maximum are exact over those tokens. Contexts are at most one a document, no two
    alike: the highest ones, the last two from near the 0.9 and the 0.5 quantile of the latent's positive
    activations.
    Errors: those of `check_fits`, and MismatchError for a harvest of another width or of other sites.
    """
    check_fits(model, dictionary)
    rows = rows_to_read(dictionary, harvest, tokens)
    with progress("Label", len(rows), "tokens") as advance:
        found = firings(dictionary, harvest, rows, advance)
    latents = list(found.each())
    live = [j for j, _, _ in latents]
    decoder = dictionary.decoder_rows(live)
    top, bottom = logit_lens(model, decoder)
    near = nearest(decoder, NEAREST)
    text = _Text(model, harvest)
    return [
        FeatureRecord(
            index=j,
            rate=len(rows) / found.tokens,
            unit=float(np.quantile(values, UNIT_QUANTILE)),
            max=float(values[0]),
            top_tokens=top[i],
            bottom_tokens=bottom[i],
            contexts=[text.context(rows[at], values[at]) for at in text.spread(rows, per_latent)],
            nearest=[(live[n], cosine) for n, cosine in near[i]],
        )
        for i, (j, rows, values) in enumerate(latents)
    ]


@torch.inference_mode()
def rows_to_read(dictionary: Dictionary, harvest: Harvest, tokens: int) -> Int[np.ndarray, " rows"]:
    """Rows of whole documents that come to about `tokens` tokens, fewer where the firings would not fit in memory."""
    if harvest.width != dictionary.width:
        raise MismatchError(
            f"{harvest.place}: expected a harvest of width {dictionary.width}, that of dictionary {dictionary.name}, "
            f"found {harvest.width}; harvest the checkpoint that the dictionary was trained on"
        )
    assert dictionary.site is not None
    document = harvest.document.numpy()
    rows = spread_rows(document, tokens)
    probe = rows[:: max(1, len(rows) // _CHUNK)]
    stream = harvest.activations(dictionary.site)
    l0 = sum(len(values) for _, _, values in _fired(dictionary, stream, probe)) / len(probe)
    return rows if l0 * len(rows) <= MOST_FIRINGS else spread_rows(document, int(MOST_FIRINGS / l0))


@torch.inference_mode()
def firings(
    dictionary: Dictionary, harvest: Harvest, rows: Int[np.ndarray, " rows"], advance: Advance = lambda n: None
) -> Firings:
    """Encode these rows of the harvest and keep what is above zero."""
    assert dictionary.site is not None
    stream = harvest.activations(dictionary.site)
    keys, where = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for at, latent, value in _fired(dictionary, stream, part):
            # One number sorts by latent and then from the highest value: the bits of positive floats are in order.
            keys.append(latent.astype(np.int64) << 32 | (_TOP - value.view(np.int32)))
            where.append(at)
        advance(len(part))
    key, row = np.concatenate(keys), np.concatenate(where)
    order = np.argsort(key, kind="stable")
    key, row = key[order], row[order]
    value = (_TOP - (key & 0xFFFFFFFF)).astype(np.int32).view(np.float32)
    return Firings(key >> 32, row, value, len(rows))


def _fired(
    dictionary: Dictionary, stream: Any, rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row, latent, value) of the firings on some tokens. Outliers, which a harvest has none of, fire nothing."""
    x = stream[torch.from_numpy(rows)]
    x = torch.where(kept(dictionary, x)[:, None], x, torch.nan)
    for start, acts in encoded(dictionary, x):
        at, latent = (acts > 0).nonzero(as_tuple=True)
        yield rows[start:][at.numpy()], latent.numpy(), acts[at, latent].numpy()


def spread_rows(document: Int[np.ndarray, " tokens"], tokens: int) -> Int[np.ndarray, " rows"]:
    """Rows of whole documents, spread evenly over all, that come to about `tokens` tokens."""
    if tokens >= len(document):
        return np.arange(len(document))
    number = np.cumsum(np.diff(document, prepend=document[:1]) != 0)
    share = tokens / len(document)
    # The n-th document is in whenever n * share passes a whole number; the first one always is.
    return np.flatnonzero((np.floor((number + 1) * share) > np.floor(number * share)) | (number == 0))


@torch.inference_mode()
def nearest(rows: Float[Tensor, "n d"], count: int) -> list[list[tuple[int, float]]]:
    """(index, cosine) of the rows most like each row, itself left out."""
    unit = rows.float() / rows.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    out = []
    for start in range(0, len(unit), 2048):
        cosine = unit[start : start + 2048] @ unit.T
        own = torch.arange(len(cosine))
        cosine[own, own + start] = -torch.inf
        values, at = cosine.topk(min(count, len(unit) - 1))
        out += [list(zip(a, v, strict=True)) for a, v in zip(at.tolist(), values.tolist(), strict=True)]
    return out


class _Text:
    """The text around rows of a harvest."""

    def __init__(self, model: SteeredModel, harvest: Harvest) -> None:
        self.tokenizer = model.tokenizer
        self.ids = harvest.token_ids.numpy()
        self.document = harvest.document.numpy()

    def spread(self, rows: Int[np.ndarray, " n"], count: int) -> list[int]:
        """Which of a latent's firings to show, from its highest: one a document, none that reads like another."""
        lower = [int((1 - q) * (len(rows) - 1)) for q in LOWER_QUANTILES] if count > len(LOWER_QUANTILES) else []
        taken: list[int] = []
        seen: set[Any] = set()
        for start, wanted in [(0, count - len(lower)), *((at, 1) for at in lower), (0, count)]:
            for at in range(start, min(start + LOOKED_AT, len(rows))):
                if wanted == 0 or len(taken) == count:
                    break
                row = int(rows[at])
                marks = {int(self.document[row]), self._passage(row)}
                if not marks & seen:
                    seen |= marks
                    taken.append(at)
                    wanted -= 1
        return sorted(taken)

    def context(self, row: int, activation: float) -> Context:
        first, last = self._bounds(int(row))
        # Decoded together and then cut: a tokenizer may join tokens otherwise than one by one.
        before, through, whole = (self._decode(first, end) for end in (row, row + 1, last))
        if through.startswith(before) and whole.startswith(through):
            return Context(before, through[len(before) :], whole[len(through) :], float(activation))
        # A character of several tokens.
        return Context(before, self._decode(row, row + 1), self._decode(row + 1, last), float(activation))

    def _decode(self, first: int, last: int) -> str:
        return self.tokenizer.decode(self.ids[first:last].tolist()).replace("\n", "↵")

    def _bounds(self, row: int) -> tuple[int, int]:
        """First and one past the last row of the context, in the row's own document."""
        window = slice(max(0, row - BEFORE), row + AFTER + 1)
        same = self.document[window] == self.document[row]
        inside = np.flatnonzero(same) + window.start
        return int(inside[0]), int(inside[-1]) + 1

    def _passage(self, row: int) -> tuple[int, ...]:
        """What a context is known by: the same prompt opens many documents."""
        first, last = self._bounds(row)
        return tuple(self.ids[max(first, row - 4) : min(last, row + 3)].tolist())

"""Reading many texts at once, with every beginning that several of them share read once.

`decode.generate` reads its prompts here, and scoring (`measure.harness`) its replies. Prompts share a system prompt;
replies that are scored share their prompt. A beginning is shared only between texts under the same edit, since an edit
changes the keys and values of the tokens that it acts on. No edit acts on the blocks before the first edited one, so
there one text under several edits is read as one row (`Spread`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from steer.model.kv_cache import (
    STEP,
    GrowingCache,
    GrowingLayer,
    Piece,
    branched,
    growing_cache,
    has_only_states,
    has_states,
)
from steer.model.loaded import LoadedModel
from steer.model.steering.low_rank import ForwardContext
from steer.model.steering.receipts import Tally
from steer.model.tokens import common_length, padded
from steer.model.written import WrittenText

PASS = 64
"""The cost of a pass, in tokens: a pass over few tokens takes as long as one over this many more, since every weight is
read from memory."""
LEVELS = 2
"""How deep shared beginnings may be nested within shared beginnings, as far as `_heads` looks ahead."""
AT_ONCE = 1024
"""How many tokens a CPU reads at a time. What is computed between two layers then stays in its caches; for a whole
batch it would be memory that is new to the process at every layer."""


@dataclass(eq=False)
class Prefill:
    """Texts that the model has read, padded on their left to one length."""

    cache: GrowingCache
    mask: Int[Tensor, "rows seq"]
    """0 for padding, else 1."""
    hidden: Float[Tensor, "rows fed d"]
    """The input of the LM head at the last tokens of each text."""


@dataclass(eq=False)
class Beginning:
    """Tokens that the texts of several calls of `prefill` begin with, read once for all of them."""

    ids: tuple[int, ...]
    cache: GrowingCache

    @classmethod
    def of(cls, model: LoadedModel, texts: Sequence[Sequence[int]]) -> Beginning | None:
        """Read the beginning that all texts share; None where that is too short to be worth a pass, or where the
        model keeps more than keys and values."""
        ends = [tuple(t) for t in texts]
        ids = min(ends)[: common_length(min(ends), max(ends))]
        if len(ids) < max(1, PASS) or not _only_growing(growing_cache(model.hf.config)):
            return None
        return cls(ids, prefill(model, [ids], prompts=[len(ids)], ahead=1).cache)


@torch.inference_mode()
def prefill(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    *,
    prompts: Sequence[int],
    which: Sequence[int] | None = None,
    begun: Beginning | None = None,
    ahead: int = STEP,
) -> Prefill:
    """Read texts given as token ids, in as few tokens as their shared beginnings allow.

    `prompts`: how many tokens come before each text's reply, at least 1. Hidden states are returned for the last of
    them and all tokens after it, or for the text's last token if the text ends earlier. `which`: the index of the
    applied edit that each text is under; None where all are under one edit, or none. `begun`: what all texts begin
    with, read before under the same edit, which must not depend on where a reply begins. `ahead`: how many more tokens
    the cache gets room for.
    """
    rows = list(which) if which is not None else [0] * len(texts)
    texts = [tuple(t) for t in texts]
    fed = max(map(len, texts))
    # Read in parts, the first ones would be rotated for a shorter text.
    whole = fed > (model.anatomy.rotary_limit or fed)
    at_once = max(1, AT_ONCE // len(texts)) if model.device.type == "cpu" and not whole else fed
    cache = growing_cache(model.hf.config, ahead + max(0, fed - at_once))
    if (len(texts) > 1 or begun is not None) and not whole and _only_growing(cache):
        limits = [min(p, len(t)) - 1 for p, t in zip(prompts, texts, strict=True)]
        heads, sources, tail = _heads(texts, limits, rows)
        if begun is not None and max(heads) <= len(begun.ids):
            tail = max(fed - len(begun.ids), *(len(t) - limit for t, limit in zip(texts, limits, strict=True)))
            if tail < fed:
                heads = [max(len(t) - tail, 0) for t in texts]
                cache, fed = _branched(begun.cache, [(0, 0)] * len(texts), heads, tail + ahead), tail
        elif any(heads):
            cache, fed = _begun(model, texts, heads, sources, prompts, which, begun, tail + ahead), tail
    ids, mask = padded(texts, left=True, device=model.device)
    ids = ids[:, -fed:]
    row = torch.tensor(rows, device=model.device) if which is not None else None
    written = [WrittenText(model.tokenizer, t, p) for t, p in zip(texts, prompts, strict=True)]
    # Some classes begin their states anew in a pass of several tokens.
    step = fed if has_states(cache) else at_once
    before = mask.shape[1] - fed
    spread = Spread.of(model, texts, cache) if which is not None else None
    with spread.narrowed(cache) if spread is not None else nullcontext():
        hidden = [
            decoder_pass(model, ids[:, i : i + step], mask[:, : before + i + step], cache, row, written, spread)
            for i in range(0, fed, step)
        ]
    return Prefill(cache, mask, torch.cat(hidden, dim=1))


@dataclass(eq=False)
class Spread:
    """How texts under several edits are read: one row per text before `block`, one per text and edit from there on."""

    block: int
    first: Int[Tensor, " texts"]
    """The first row of each distinct text."""
    place: Int[Tensor, " rows"]
    """For each row, the index of its text in `first`."""

    @classmethod
    def of(cls, model: LoadedModel, texts: Sequence[tuple[int, ...]], cache: Cache) -> Spread | None:
        """The Spread for the applied edits; None where it would save nothing. `texts`: one per row."""
        block, places = model.steering.untouched_blocks, {t: i for i, t in enumerate(dict.fromkeys(texts))}
        if not block or len(places) == len(texts) or not _only_growing(cache):
            return None
        first, place = [texts.index(t) for t in places], [places[t] for t in texts]
        return cls(block, torch.tensor(first, device=model.device), torch.tensor(place, device=model.device))

    @contextmanager
    def narrowed(self, cache: Cache) -> Iterator[None]:
        """Inside, the cache of the blocks before `block` has one row per text; afterwards one per row again."""
        layers = [layer for layer in cache.layers[: self.block] if isinstance(layer, GrowingLayer)]
        for layer in layers:
            layer.batch_select_indices(self.first)
        yield
        for layer in layers:
            layer.batch_select_indices(self.place)

    @contextmanager
    def widened(self, model: LoadedModel) -> Iterator[None]:
        """Inside, passes over one row per text go on with all rows from `block` on."""
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def widen(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(widen(part) for part in x)
            if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] != len(self.first):
                return x
            if id(x) not in made:  # every block gets the same mask and rotary angles
                made[id(x)] = x, x.index_select(0, self.place)
            return made[id(x)][1]

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            return tuple(map(widen, args)), {name: widen(value) for name, value in kwargs.items()}

        with ExitStack() as hooks:
            for block in range(self.block, model.anatomy.blocks):
                module = model.hf.get_submodule(model.anatomy.block_module(block))
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield


def decoder_pass(
    model: LoadedModel,
    ids: Int[Tensor, "rows new"],
    mask: Int[Tensor, "rows seq"],
    cache: GrowingCache,
    row: Int[Tensor, " rows"] | None,
    texts: Sequence[WrittenText],
    spread: Spread | None = None,
    tally: Tally | None = None,
) -> Float[Tensor, "rows new d"]:
    """Run the decoder over new tokens, add them to the cache and return the input of the LM head.

    Where the rotary frequencies become those of a longer text, or of a shorter one again, all tokens are read anew.

    `row`: as `ForwardContext.row`. `texts`: each text up to the new tokens, or further. `spread`: how
    the cache is narrowed, inside of `Spread.narrowed`. `tally`: records what the sliders do.
    """
    decoder = model.hf.get_submodule(model.anatomy.decoder_module)
    new = ids.shape[1]
    if (limit := model.anatomy.rotary_limit) is not None:
        stretched = int(mask.sum(1).max()) > limit
        if stretched != cache.stretched and cache.get_seq_length():
            ids = _all_ids(model, cache, mask, texts)
        cache.stretched = stretched
    with model.steering.lock:
        seen = mask[:, -ids.shape[1] :]
        if ids.shape[1] > new:  # tokens that are read again are in the receipt already
            seen = torch.cat([torch.zeros_like(seen[:, :-new]), seen[:, -new:]], dim=1)
        # In new memory: the strides of a slice differ from step to step, and compiled code would see new cases.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].clone(memory_format=torch.contiguous_format)
        index = answer = None
        if model.steering.timed:
            index = positions - torch.tensor([[t.start] for t in texts], device=ids.device) + 1
        if model.steering.splits_reply:
            answer = torch.tensor([[t.answer] for t in texts], device=ids.device)
        context = ForwardContext(
            row,
            index,
            answer,
            valid=None if tally is None or bool(seen.all()) else seen.bool(),
            tally=tally,
        )
        if spread is not None:
            ids, mask, positions = ids[spread.first], mask[spread.first], positions[spread.first]
        with model.steering.passing(context), spread.widened(model) if spread is not None else nullcontext():
            # States know nothing of padding that was read before, so that a mask is for the new tokens.
            whole = bool(mask.all()) or (ids.shape[1] == 1 and has_only_states(cache))
            return decoder(
                input_ids=ids,
                attention_mask=None if whole else mask,
                use_cache=True,
                **model.cache_arguments(cache, positions),
            ).last_hidden_state[:, -new:]


def _all_ids(
    model: LoadedModel, cache: GrowingCache, mask: Int[Tensor, "rows seq"], texts: Sequence[WrittenText]
) -> Int[Tensor, "rows seq"]:
    """Empty a cache, and return all tokens that the next pass then reads: the texts as far as the mask reaches."""
    cache.layers = growing_cache(model.hf.config).layers
    if model.compiled is not None:  # the step was to run compiled code, which reads one token
        model.compiled.leave_blocks()
    ids = torch.zeros_like(mask)
    counts = mask.sum(1).tolist()
    ids[mask.bool()] = torch.tensor([i for t, n in zip(texts, counts, strict=True) for i in t.ids[:n]]).to(mask)
    return ids


def _begun(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    heads: Sequence[int],
    sources: Sequence[int],
    prompts: Sequence[int],
    which: Sequence[int] | None,
    begun: Beginning | None,
    ahead: int,
) -> GrowingCache:
    """A cache with the first `heads` tokens of every text, as many as given for each, and room for `ahead` more; only
    the `sources` are read."""
    read = sorted({s for s, head in zip(sources, heads, strict=True) if head})
    first = prefill(
        model,
        [texts[s][: heads[s]] for s in read],
        prompts=[prompts[s] for s in read],
        which=None if which is None else [which[s] for s in read],
        begun=begun,
        ahead=1,
    )
    width = first.mask.shape[1]
    places = [
        (read.index(source), width - heads[source]) if head else (0, 0)
        for source, head in zip(sources, heads, strict=True)
    ]
    return _branched(first.cache, places, heads, ahead)


def _branched(cache: Cache, places: Sequence[tuple[int, int]], heads: Sequence[int], ahead: int) -> GrowingCache:
    """A cache of texts that begin with `heads` tokens each of another cache, and room for `ahead` more. `places`: the
    row of the other cache that holds them, and the column of the first."""
    pieces: dict[tuple[int, int, int], list[int]] = {}
    for i, ((row, column), head) in enumerate(zip(places, heads, strict=True)):
        if head:
            pieces.setdefault((row, column, head), []).append(i)
    taken: list[Piece] = [(rows, row, slice(column, column + head)) for (row, column, head), rows in pieces.items()]
    return branched(cache, taken, len(heads), max(heads), ahead)


def _only_growing(cache: Cache) -> bool:
    """Whether every block keeps its keys and values in a GrowingLayer, whose rows can be taken apart."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def _heads(
    texts: Sequence[Sequence[int]], limits: Sequence[int], rows: Sequence[int]
) -> tuple[list[int], list[int], int]:
    """Which beginnings to read ahead of the rest: those for which the fewest tokens are read in all.

    The beginnings are read by `prefill` too, so that what these share is read once as well: a story, then its
    questions, then their answers. `limits`: how many tokens of each text may be read ahead at most. `rows`: the edit of
    each text. Returns, for each text, how many of its first tokens are read ahead, and the text from which it takes
    them (itself if it shares none); and how many of the remaining tokens are fed, the same number for every text.
    """
    lengths, order = [len(t) for t in texts], sorted(range(len(texts)), key=lambda i: (rows[i], texts[i]))
    common = [common_length(texts[a], texts[b]) if rows[a] == rows[b] else 0 for a, b in pairwise(order)]
    least = max(n - limit for n, limit in zip(lengths, limits, strict=True))
    tail = _fewest([lengths[i] for i in order], common, least, LEVELS)[1]
    heads, sources = [max(n - tail, 0) for n in lengths], list(range(len(texts)))
    for k, i in enumerate(order):
        # Those that begin with the same tokens stand next to it.
        first = next((j + 1 for j in range(k - 1, -1, -1) if common[j] < heads[i]), 0)
        last = next((j for j in range(k, len(common)) if common[j] < heads[i]), len(common))
        sources[i] = max(order[first : last + 1], key=heads.__getitem__)
    return heads, sources, tail


def _fewest(lengths: Sequence[int], common: Sequence[int], least: int, levels: int) -> tuple[int, int]:
    """The fewest tokens for which texts in order can be read, and how many of each are then fed after the beginnings.

    `common`: how many first tokens each text shares with the next. `least`: how many are fed at least. `levels`: how
    deep shared beginnings may be nested.
    """
    best, tail = len(lengths) * max(lengths), max(lengths)
    if levels == 0:
        return best, tail
    bounds = []
    for fed in {max(least, lengths[k + side] - c) for k, c in enumerate(common) for side in (0, 1)}:
        heads = [max(n - fed, 0) for n in lengths]
        read = sum(heads) - sum(map(min, common, heads, heads[1:]))  # if nothing were filled up
        bounds.append((fed * len(lengths) + read + PASS, -fed, heads))
    for bound, fed, heads in sorted(bounds):
        if bound >= best:
            break
        cost = -fed * len(lengths) + PASS + _fewest(*_distinct(heads, common), 1, levels - 1)[0]
        if cost < best:
            best, tail = cost, -fed
    return best, tail


def _distinct(heads: Sequence[int], common: Sequence[int]) -> tuple[list[int], list[int]]:
    """Beginnings of texts in order, without those that begin another: their lengths, and what each shares with the
    next."""
    lengths, shared, now = [heads[0]], list[int](), max(heads)
    for c, head in zip(common, heads[1:], strict=True):
        now = min(now, c)  # what the last of `lengths` shares with this one
        if head <= min(now, lengths[-1]):
            continue
        if lengths[-1] <= now:
            lengths[-1] = head
        else:
            shared.append(min(now, lengths[-1], head))
            lengths.append(head)
        now = max(heads)
    return lengths, shared

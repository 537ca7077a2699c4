"""Reading many texts at once: what several of them share goes through the model once.

Prompts share a system prompt, replies that are scored share their prompt. A text's beginning is shared only with texts
under the same edit, since an edit changes the keys and values of the tokens that it acts on. Blocks before the first
that any edit acts on know nothing of edits: there one text under several of them is one row (`Spread`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from steer.live.cache import GrowingLayer, Piece, branched, growing_cache
from steer.live.frame import TextPass

if TYPE_CHECKING:
    from steer.live.model import SteeredModel

PASS = 64
"""A pass over few tokens takes as long as so many more would: every weight is read from memory."""
AT_ONCE = 1024
"""Tokens that a CPU reads at a time: what is worked out between two layers then stays in its caches, where that of a
whole batch would be memory that is new to the process at every layer."""


@dataclass(eq=False)
class Prefill:
    """Texts that the model has read, filled up on their left to one length."""

    cache: Cache
    mask: Int[Tensor, "rows seq"]
    """0 for the filling."""
    hidden: Float[Tensor, "rows fed d"]
    """What the LM head is given at the last tokens of each text."""


@torch.inference_mode()
def prefill(
    model: SteeredModel,
    texts: Sequence[Sequence[int]],
    *,
    prompts: Sequence[int],
    which: Sequence[int] | None = None,
) -> Prefill:
    """Read texts given as token ids, in as few tokens as their shared beginnings allow.

    `prompts`: how many tokens come before each text's reply, at least 1. The hidden states of the last of them and of
    all tokens after it are returned; of the text's last token, where the text ends earlier. `which`: the row of the
    applied edits that each text is under; None where all are under one edit, or none.
    """
    rows = list(which) if which is not None else [0] * len(texts)
    texts = [tuple(t) for t in texts]
    cache, fed = growing_cache(model.hf.config), max(map(len, texts))
    if len(texts) > 1 and all(isinstance(layer, GrowingLayer) for layer in cache.layers):
        heads, sources, tail = _heads(texts, [min(p, len(t)) - 1 for p, t in zip(prompts, texts, strict=True)], rows)
        if any(heads):
            cache, fed = _begun(model, texts, heads, sources, prompts, which), tail
    mask = _mask(texts, max(map(len, texts)), model.device)
    ids = [[*t[-fed:]] for t in texts]
    # Filled up with the text's own first token: it is one that the embedding has.
    padded = torch.tensor([[i[0]] * (fed - len(i)) + i for i in ids], device=model.device)
    row = torch.tensor(rows, device=model.device) if which is not None else None
    starts = torch.tensor([[p] for p in prompts], device=model.device)
    step = max(1, AT_ONCE // len(texts)) if model.device.type == "cpu" else fed
    before = mask.shape[1] - fed
    spread = Spread.of(model, texts, cache) if which is not None else None
    with spread.narrowed(cache) if spread is not None else nullcontext():
        hidden = [
            decoder_pass(model, padded[:, i : i + step], mask[:, : before + i + step], cache, row, starts, spread)
            for i in range(0, fed, step)
        ]
    return Prefill(cache, mask, torch.cat(hidden, dim=1))


@dataclass(eq=False)
class Spread:
    """Rows of one text under several edits: one row up to `block`, one for each edit from there on."""

    block: int
    kept: Int[Tensor, " texts"]
    """A row of each different text."""
    place: Int[Tensor, " rows"]
    """For each row, the place of its text in `kept`."""

    @classmethod
    def of(cls, model: SteeredModel, texts: Sequence[tuple[int, ...]], cache: Cache) -> Spread | None:
        """None where nothing would be saved."""
        block, first = model.steering.untouched_blocks, {t: i for i, t in reversed(list(enumerate(texts)))}
        kept = sorted(first.values())
        if not block or len(kept) == len(texts) or not all(isinstance(layer, GrowingLayer) for layer in cache.layers):
            return None
        places = {row: place for place, row in enumerate(kept)}
        place = [places[first[t]] for t in texts]
        return cls(block, torch.tensor(kept, device=model.device), torch.tensor(place, device=model.device))

    @contextmanager
    def narrowed(self, cache: Cache) -> Iterator[None]:
        """Inside, the cache of the first blocks holds a row a text; afterwards as many as that of the others."""
        for layer in cache.layers[: self.block]:
            layer.batch_select_indices(self.kept)
        yield
        for layer in cache.layers[: self.block]:
            layer.batch_select_indices(self.place)

    @contextmanager
    def widened(self, model: SteeredModel) -> Iterator[None]:
        """Passes over a row a text go on inside with a row an edit from `block` on."""
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def widen(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(widen(part) for part in x)
            if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] != len(self.kept):
                return x
            if id(x) not in made:  # the mask and the rotary angles are those of every block
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
    model: SteeredModel,
    ids: Int[Tensor, "rows new"],
    mask: Int[Tensor, "rows seq"],
    cache: Cache,
    row: Int[Tensor, " rows"] | None,
    starts: Int[Tensor, "rows 1"],
    spread: Spread | None = None,
) -> Float[Tensor, "rows new d"]:
    """One pass of the decoder over new tokens, which the cache takes up: what the LM head is given. `row`: as
    `TextPass.row`; `starts`: how many tokens of each text come before its reply. `spread`: the cache is narrowed."""
    decoder = model.hf.get_submodule(model.anatomy.decoder_module)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    steering = model.steering
    with steering.lock:
        index = positions - starts + 1 if steering.timed else None
        if spread is not None:
            ids, mask, positions = ids[spread.kept], mask[spread.kept], positions[spread.kept]
        with (
            steering.passing(TextPass(row, index)),
            spread.widened(model) if spread is not None else nullcontext(),
        ):
            return decoder(
                input_ids=ids,
                attention_mask=None if bool(mask.all()) else mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state


def _begun(
    model: SteeredModel,
    texts: Sequence[Sequence[int]],
    heads: Sequence[int],
    sources: Sequence[int],
    prompts: Sequence[int],
    which: Sequence[int] | None,
) -> Cache:
    """A cache that holds the first `heads` tokens of every text; a text is read that far if it is one of `sources`."""
    read = sorted({s for s, head in zip(sources, heads, strict=True) if head})
    begun = prefill(
        model,
        [texts[s][: heads[s]] for s in read],
        prompts=[prompts[s] for s in read],
        which=None if which is None else [which[s] for s in read],
    )
    width = begun.mask.shape[1]
    pieces: dict[tuple[int, int], list[int]] = {}
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        if head:
            pieces.setdefault((source, head), []).append(i)
    taken: list[Piece] = []
    for (source, head), rows in pieces.items():
        start = width - heads[source]
        taken.append((rows, read.index(source), slice(start, start + head)))
    return branched(begun.cache, taken, len(texts), max(heads))


def _mask(texts: Sequence[Sequence[int]], width: int, device: Any) -> Int[Tensor, "rows width"]:
    lengths = torch.tensor([len(t) for t in texts], device=device)
    return (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def _heads(
    texts: Sequence[Sequence[int]], limits: Sequence[int], rows: Sequence[int]
) -> tuple[list[int], list[int], int]:
    """How many tokens at the beginning of each text are read ahead of the rest, at most `limits`; the text that each
    shares them with, itself where it does not; and how many of the rest are fed, as many of every text.
    """
    shared, groups = _shared(texts, limits, rows)
    lengths = [len(t) for t in texts]

    def split(tail: int) -> tuple[list[int], list[int]]:
        heads = [max(n - tail, 0) for n in lengths]
        longest: dict[int, int] = {}
        for i, head in enumerate(heads):
            if head <= shared[i] and head > heads[longest.setdefault(groups[i], i)]:
                longest[groups[i]] = i
        return heads, [longest[groups[i]] if head <= shared[i] else i for i, head in enumerate(heads)]

    def cost(tail: int) -> int:
        heads, sources = split(tail)
        read = sum(heads[s] for s in set(sources))
        return tail * len(texts) + read + (PASS if read else 0)

    least = max(n - limit for n, limit in zip(lengths, limits, strict=True))
    tails = {max(least, n - s) for n, s in zip(lengths, shared, strict=True)}
    tail = min(sorted({*tails, max(lengths)}, reverse=True), key=cost)
    return *split(tail), tail


def _shared(texts: Sequence[Sequence[int]], limits: Sequence[int], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """How many first tokens each text has in common with its group, and the group; in the groups that save most."""
    order = sorted(range(len(texts)), key=lambda i: (rows[i], texts[i]))
    common = [
        min(_common(texts[a], texts[b]), limits[a], limits[b]) if rows[a] == rows[b] else 0 for a, b in pairwise(order)
    ]

    def best(first: int, last: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Tokens saved, and groups (first, last, length) of `order[first : last + 1]`."""
        if first == last:
            return 0, [(first, last, 0)]
        weakest = min(range(first, last), key=common.__getitem__)
        whole = common[weakest] * (last - first)
        left, right = best(first, weakest), best(weakest + 1, last)
        if left[0] + right[0] > whole:
            return left[0] + right[0], left[1] + right[1]
        return whole, [(first, last, common[weakest])]

    shared, groups = [0] * len(texts), [0] * len(texts)
    for group, (first, last, length) in enumerate(best(0, len(order) - 1)[1]):
        for i in order[first : last + 1]:
            shared[i], groups[i] = length, group
    return shared, groups


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n

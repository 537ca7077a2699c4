"""The decode loop: one token a step for a batch, under a lock that slider changes wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from steer.live.cache import growing_cache
from steer.live.frame import TextPass
from steer.live.memory import Memory
from steer.live.receipts import Tally
from steer.live.sampling import Draw, choose_each
from steer.values.sampler import Sampler

if TYPE_CHECKING:
    from steer.live.model import SteeredModel


@dataclass(frozen=True)
class Step:
    """The tokens of one step."""

    rows: tuple[int, ...]
    """Which rows of the batch are still being written."""
    tokens: tuple[int, ...]
    """The new token of each of them; an end token is yielded too."""


def decode(
    model: SteeredModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    keys: Sequence[int] | None = None,
    *,
    tally: Tally | None = None,
    memory: Memory | None = None,
    begun: int = 0,
) -> Iterator[Step]:
    """Yield a Step a token for prompts given as token ids.

    Rows are left-padded, positions are absolute, a row that ends leaves the batch. Each row draws from
    its own random stream, seeded by (sampler.seed, keys[row]), so a row alone gives the same text as
    in a batch, up to rounding.

    `tally` is told what the sliders do. `memory`, of a single prompt, keeps what was read for the next reply.
    `begun`: how many tokens at the end of the prompts belong to the reply already.
    """
    hf, steering, device = model.hf, model.steering, model.device
    ends = model.end_token_ids
    width = max(len(p) for p in prompts)
    seeds = keys if keys is not None else range(len(prompts))
    draws = [Draw(sampler, p, k, model.tokenizer, begun) for p, k in zip(prompts, seeds, strict=True)]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.tensor([[len(p) - begun] for p in prompts], device=device)
    alive, row = list(range(len(prompts))), None
    text = list(prompts[0])

    def empty() -> Cache:
        return growing_cache(hf.config)

    if memory is None:
        cache, fed = empty(), padded
    else:
        memory.read = 0
        cache, unread = memory.recall(text, empty)
        fed = torch.tensor([unread], device=device)
    for _ in range(sampler.max_new_tokens):
        if memory is not None and not memory.holds(cache):
            cache, unread = memory.recall(text, empty)
            fed = torch.tensor([unread], device=device)
        new = fed.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        with steering.lock, torch.inference_mode():
            several = len(steering.rows) > 1
            if tally is not None:
                counts = mask[:, -new:].sum(1).tolist()
                rows = [(i, i if several else 0, n) for i, n in zip(alive, counts, strict=True)]
                tally.begin(rows, steering.rows)
            passing = TextPass(
                row if several else None,
                positions - starts + 1 if steering.timed else None,
                valid=None if tally is None or bool(mask[:, -new:].all()) else mask[:, -new:].bool(),
                tally=tally,
            )
            with steering.passing(passing):
                compiled = model.compiled if len(prompts) == 1 else None
                if compiled is not None:
                    logits = compiled(fed, positions, cache)
                else:
                    logits = hf(
                        input_ids=fed,
                        attention_mask=None if bool(mask.all()) else mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    ).logits[:, -1]
        if memory is not None and memory.holds(cache):
            memory.add(fed[0].tolist())
        tokens = choose_each(logits, [draws[i] for i in alive])
        text.append(tokens[0])
        yield Step(tuple(alive), tuple(tokens))
        going = [j for j, t in enumerate(tokens) if t not in ends]
        if not going:
            return
        fed = torch.tensor(tokens, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            mask, fed, starts = mask[keep], fed[keep], starts[keep]
            cache.batch_select_indices(keep)
            alive = [alive[j] for j in going]
            row = torch.tensor(alive, device=device)

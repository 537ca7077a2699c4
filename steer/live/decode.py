"""The decode loop: one token a step for a batch, under a lock that slider changes wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from steer.live.cache import growing_cache
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
    model: SteeredModel, prompts: Sequence[Sequence[int]], sampler: Sampler, keys: Sequence[int] | None = None
) -> Iterator[Step]:
    """Yield a Step a token for prompts given as token ids.

    Rows are left-padded, positions are absolute, a row that ends leaves the batch. Each row draws from
    its own random stream, seeded by (sampler.seed, keys[row]), so a row alone gives the same text as
    in a batch, up to rounding.
    """
    hf, steering, device = model.hf, model.steering, model.device
    ends = model.end_token_ids
    width = max(len(p) for p in prompts)
    # Padded with a token of its own, so that the repetition penalty sees no token that the row alone has not.
    ids = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    seeds = keys if keys is not None else range(len(prompts))
    streams = [torch.Generator().manual_seed((sampler.seed * 1_000_003 + k) % 2**63) for k in seeds]
    penalise = penalties(sampler)
    cache = growing_cache(hf.config)
    alive = list(range(len(prompts)))
    fed = ids
    try:
        for _ in range(sampler.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            with steering.lock, torch.inference_mode():
                logits = hf(
                    input_ids=fed,
                    attention_mask=None if bool(mask.all()) else mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            scores = penalise(ids, logits.float())  # pyright: ignore[reportArgumentType]
            drawn = draw(scores, sampler, [streams[i] for i in alive])
            tokens = drawn.tolist()
            yield Step(tuple(alive), tuple(tokens))
            going = [j for j, t in enumerate(tokens) if t not in ends]
            if not going:
                return
            fed = drawn.to(device)[:, None]
            ids = torch.cat([ids, fed], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
            if len(going) < len(alive):
                keep = torch.tensor(going, device=device)
                ids, mask, fed = ids[keep], mask[keep], fed[keep]
                cache.batch_select_indices(keep)
                alive = [alive[j] for j in going]
                steering.select(alive)
    finally:
        # A single row selects nothing, and its stream may be closed while another batch is being written.
        if len(prompts) > 1:
            steering.select(None)


def penalties(sampler: Sampler) -> LogitsProcessorList:
    """What depends on the text so far."""
    out = LogitsProcessorList()
    if sampler.repetition_penalty != 1:
        out.append(RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty))
    return out


def warpers(sampler: Sampler) -> LogitsProcessorList:
    """What drops unlikely tokens after top-k; they look at the scores alone."""
    out = LogitsProcessorList()
    if sampler.top_p < 1:
        out.append(TopPLogitsWarper(sampler.top_p))
    if sampler.min_p:
        out.append(MinPLogitsWarper(sampler.min_p))
    return out


def draw(
    scores: Float[Tensor, "rows vocab"], sampler: Sampler, streams: Sequence[torch.Generator]
) -> Int[Tensor, " rows"]:
    """One token a row, by inverting the cumulative distribution at one uniform number a row.

    transformers' order: temperature, top-k, top-p, min-p. Top-k leaves the other tokens out of the tensor instead
    of masking them: with a large vocabulary that is most of the work.
    """
    if sampler.temperature == 0:
        return scores.argmax(-1).cpu()
    tokens = None
    if 0 < sampler.top_k < scores.shape[-1]:
        scores, tokens = scores.topk(sampler.top_k, dim=-1)
    scores = scores / sampler.temperature
    scores = warpers(sampler)(tokens, scores)  # pyright: ignore[reportArgumentType]
    u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in streams])
    total = scores.softmax(-1).cumsum(-1, dtype=torch.float64).cpu()
    drawn = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).clamp(max=scores.shape[-1] - 1)
    return (drawn if tokens is None else tokens.cpu().gather(1, drawn)).squeeze(1)


def generate(
    model: SteeredModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    keys: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The replies' token ids, end tokens left out. `on_tokens` is told how many were made each step."""
    out: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampler, keys):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token not in model.end_token_ids:
                out[row].append(token)
        if on_tokens is not None:
            on_tokens(len(step.rows))
    return out

"""The decode loop for replies that are streamed: one token per text and step, with sliders that may move in between.

`SteeredModel.stream` and chat sessions run it. Each forward pass holds `Steering.lock`, so that a slider change waits
for the token being made. Many replies at once come from `batch.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from steer.core.sampler import Sampler
from steer.model.forward import logits
from steer.model.kv_cache import PrefixCache, growing_cache
from steer.model.loaded import LoadedModel
from steer.model.prefill import decoder_pass, described
from steer.model.sampling import Draw, choose_each
from steer.model.steering.receipts import Tally
from steer.model.tokens import check_length, filled, padded, warn_filled


@dataclass(frozen=True)
class Step:
    """The tokens that one step of `decode` has made."""

    rows: tuple[int, ...]
    """The rows of the batch that are still being written."""
    tokens: tuple[int, ...]
    """The new token of each of these rows, end tokens included."""


def decode(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    keys: Sequence[int] | None = None,
    *,
    tally: Tally | None = None,
    memory: PrefixCache | None = None,
    begun: int = 0,
) -> Iterator[Step]:
    """Yield a Step for each token that is made, for prompts given as token ids.

        for step in decode(model, [model.prompt_ids(chat)], Sampler(max_new_tokens=20)):
            print(step.tokens[0])

    Rows are left-padded, positions are absolute, a row that ends leaves the batch. Each row draws from
    its own random stream, seeded by (sampler.seed, keys[row]), so a row alone gives the same text as
    in a batch, up to rounding.

    `tally` records what the sliders do, for receipts. `memory`, for a single prompt, keeps keys and values for the next
    reply. `begun`: how many tokens at the end of the prompts belong to the reply already.

    A row whose text fills the model's context ends there; its receipt says so, or a ContextWarning without `tally`.
    Errors: UsageError for a prompt that leaves no room for a reply, CheckpointError for logits that are not finite.
    """
    steering, device, ends = model.steering, model.device, model.end_token_ids
    lengths = [len(p) for p in prompts]
    check_length(model.name, max(lengths), model.context)
    seeds = keys if keys is not None else range(len(prompts))
    draws = [Draw(sampler, p, k, model.tokenizer, begun) for p, k in zip(prompts, seeds, strict=True)]
    ids, mask = padded(prompts, left=True, device=device)
    starts = torch.tensor([[n - begun] for n in lengths], device=device)
    alive, row = list(range(len(prompts))), None
    text = list(prompts[0])

    fed, cache = ids, growing_cache(model.hf.config)
    if memory is not None:
        memory.read = 0
    for made in range(1, sampler.max_new_tokens + 1):
        if memory is not None and not memory.holds(cache):
            cache, unread = memory.recall(text, model.hf.config)
            fed = torch.tensor([unread], device=device)
        new = fed.shape[1]
        with steering.lock, torch.inference_mode():
            several = len(steering.rows) > 1
            if tally is not None:
                counts = mask[:, -new:].sum(1).tolist()
                rows = [(i, i if several else 0, n) for i, n in zip(alive, counts, strict=True)]
                tally.begin(rows, steering.rows)
            if model.compiled is not None and len(prompts) == 1:
                positions, context = described(model, mask, new, None, starts, tally)
                with steering.passing(context):
                    scores = model.compiled(fed, positions, cache)
            else:
                hidden = decoder_pass(model, fed, mask, cache, row if several else None, starts, tally=tally)
                scores = logits(model, hidden[:, -1:])[:, -1]
        if memory is not None and memory.holds(cache):
            memory.add(fed[0].tolist())
        model.check_finite(scores)
        tokens = choose_each(scores, [draws[i] for i in alive])
        text.append(tokens[0])
        yield Step(tuple(alive), tuple(tokens))
        going = []
        for j, token in enumerate(tokens):
            if token in ends:
                continue
            if lengths[alive[j]] + made < model.context:
                going.append(j)
            elif made < sampler.max_new_tokens:
                if tally is None:
                    warn_filled(model.name, model.context)
                else:
                    tally.remark(filled(model.name, model.context), alive[j])
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

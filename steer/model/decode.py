"""The decode loops: `decode` for replies that are streamed, `generate` for many at once.

`SteeredModel.stream` and chat sessions run `decode`, which makes one token per text and step; sliders may move in
between. `SteeredModel.replies` sorts its chats into batches and calls `generate` for each: it reads the prompts
(`prefill.py`) and then writes one token per row and step. Each forward pass holds `Steering.lock`, so that a slider
change waits for the token being made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.core.sampler import Sampler
from steer.model.forward import logits
from steer.model.kv_cache import PrefixCache, growing_cache, select_rows
from steer.model.loaded import LoadedModel
from steer.model.prefill import decoder_pass, prefill
from steer.model.record import reading
from steer.model.sampling import Draw, choose_each
from steer.model.steering.receipts import Tally
from steer.model.tokens import check_length, filled, padded, warn_filled
from steer.model.written import WrittenText


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
    texts = [WrittenText(model.tokenizer, p, len(p) - begun) for p in prompts]
    alive, row = list(range(len(prompts))), None
    fed, cache = ids, growing_cache(model.hf.config)
    if memory is not None:
        memory.read = 0
    for made in range(1, sampler.max_new_tokens + 1):
        if memory is not None and not memory.holds(cache):
            cache, unread = memory.recall(texts[0].ids, model.hf.config)
            fed = torch.tensor([unread], device=device)
        new = fed.shape[1]
        with steering.lock, torch.inference_mode():
            several = len(steering.rows) > 1
            if tally is not None:
                counts = mask[:, -new:].sum(1).tolist()
                rows = [(i, i if several else 0, n) for i, n in zip(alive, counts, strict=True)]
                tally.begin(rows, steering.rows)
            one_token = len(prompts) == 1 and new == 1 and mask.shape[1] > 1
            compiled = model.compiled if one_token else None
            with compiled.running(cache) if compiled is not None else nullcontext():
                hidden = decoder_pass(model, fed, mask, cache, row if several else None, texts, tally=tally)
                scores = logits(model, hidden[:, -1:])[:, -1]
        if memory is not None and memory.holds(cache):
            memory.add(fed[0].tolist())
        model.check_finite(scores)
        tokens = choose_each(scores, [draws[i] for i in alive])
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
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
            mask, fed = mask[keep], fed[keep]
            select_rows(cache, keep)
            alive, texts = [alive[j] for j in going], [texts[j] for j in going]
            row = torch.tensor(alive, device=device)


@torch.inference_mode()
def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    keys: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    *,
    which: Sequence[int] | None = None,
    sums: Float[Tensor, "sites rows d"] | None = None,
) -> list[list[int]]:
    """The replies' token ids, without end tokens.

    Rows with one prompt under one edit are read once; a row that ends leaves the batch. Each row draws from its own
    random stream, seeded by (sampler.seed, keys[row]), so a row alone gives the same text as in a batch, up to
    rounding. By default the keys are the rows' numbers.

    `which`: the index of the applied edit that each row is under; by default row i is under edit i, or all rows are
    under the only edit. `on_tokens` is called at each step with the number of tokens made. `sums`: the residual stream
    of every reply token is added to it, by site and row.

    A reply also ends at `model.end_text`. A row whose text fills the model's context ends there, with a ContextWarning;
    with `sums` all rows end where the first would. Errors: UsageError for a prompt that leaves no room for a reply and
    where no token can be drawn, CheckpointError for logits that are not finite.
    """
    longest, most = max(map(len, prompts)), sampler.max_new_tokens
    check_length(model.name, longest, model.context)
    if sums is not None and longest + most > model.context:
        most = model.context - longest
        warn_filled(model.name, model.context)
    several, device, ends = len(model.steering.rows) > 1, model.device, model.end_token_ids
    which = (which or range(len(prompts))) if several else None
    edit_and_prompt = [(which[i] if which is not None else 0, tuple(p)) for i, p in enumerate(prompts)]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(edit_and_prompt))}
    read = prefill(
        model,
        [p for _, p in distinct],
        prompts=[len(p) for _, p in distinct],
        which=[w for w, _ in distinct] if several else None,
        ahead=most if len(distinct) == len(prompts) else 1,
    )
    expand = torch.tensor([distinct[key] for key in edit_and_prompt], device=device)
    scores, mask, cache = logits(model, read.hidden[:, -1:])[:, -1], read.mask[expand], read.cache
    if len(distinct) < len(edit_and_prompt):
        scores = scores[expand]
        select_rows(cache, expand, ahead=most)
    seeds = keys if keys is not None else range(len(prompts))
    draws = [Draw(sampler, p, k, model.tokenizer) for p, k in zip(prompts, seeds, strict=True)]
    row = torch.tensor(list(which), device=device) if which is not None else None
    texts = [WrittenText(model.tokenizer, p, len(p)) for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    pieces = [model.detokeniser() for _ in prompts] if model.end_text else []

    def ended(row: int, token: int) -> bool:
        """Add a token to a row's reply; return whether it ends the reply."""
        if token in ends:
            return True
        out[row].append(token)
        if pieces:
            pieces[row].add(token)
            if pieces[row].ended:
                out[row] = model.without_end(out[row])
                return True
        return False

    with ExitStack() as hooks:
        if sums is not None:

            def add(site: int, h: Tensor) -> None:
                sums[site].index_add_(0, torch.tensor(alive, device=sums.device), h[:, 0].to(sums))

            hooks.enter_context(reading(model.hf, model.anatomy, range(model.anatomy.blocks), add))
        for step in range(most):
            model.check_finite(scores)
            tokens = choose_each(scores, [draws[i] for i in alive])
            if on_tokens is not None:
                on_tokens(len(alive))
            over = [ended(i, token) for i, token in zip(alive, tokens, strict=True)]
            last = step + 1 == most
            full = [sums is None and len(prompts[i]) + len(out[i]) >= model.context for i in alive]
            if not last and any(full):
                warn_filled(model.name, model.context)
            stay = _order([not o and not f for o, f in zip(over, full, strict=True)])
            if not stay or (last and sums is None):
                break
            if len(stay) < len(alive):
                keep = torch.tensor(stay, device=device)
                mask, row = mask[keep], None if row is None else row[keep]
                select_rows(cache, keep)
                alive, tokens = [alive[j] for j in stay], [tokens[j] for j in stay]
                texts = [texts[j] for j in stay]
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            hidden = decoder_pass(model, torch.tensor(tokens, device=device)[:, None], mask, cache, row, texts)
            if not last:
                scores = logits(model, hidden[:, -1:])[:, -1]
    return out


def _order(stays: Sequence[bool]) -> list[int]:
    """The rows that stay, in an order that moves few of them in the cache: the last ones take the places of those that
    leave."""
    count = sum(stays)
    last = iter(j for j in range(count, len(stays)) if stays[j])
    return [j if stays[j] else next(last) for j in range(count)]

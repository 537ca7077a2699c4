"""The next token of every text that is being written, drawn as each one's sampler says."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from steer.errors import UsageError
from steer.live.dry import Repeats, breaker_ids
from steer.values.sampler import Sampler

BAN = -100.0
"""The logit bias that leaves a token no chance at any temperature."""


class Draw:
    """What one text that is being written is drawn with: its tokens so far, its sampler, its own random stream."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int], key: int, tokenizer: Any, begun: int = 0) -> None:
        """Its random stream is seeded by (sampler.seed, key); `tokenizer` knows DRY's breakers and the vocabulary.
        The last `begun` tokens of the prompt belong to the reply already.

        Errors: UsageError for an empty prompt, and for a logit bias on a token that is not in the vocabulary.
        """
        if not prompt:
            raise UsageError("prompt: expected at least one token, found none; begin with the BOS token")
        unknown = [token for token, _ in sampler.logit_bias if token >= len(tokenizer)]
        if unknown:
            raise UsageError(
                f"logit_bias: expected token ids below {len(tokenizer)}, the size of the vocabulary, found {unknown[0]}"
            )
        self.sampler = sampler
        self.stream = torch.Generator().manual_seed((sampler.seed * 1_000_003 + key) % 2**63)
        self.kind = replace(sampler, seed=0, max_new_tokens=1)
        """What it must have in common with others to be drawn together with them."""
        # Different tokens of the whole text, and how often the reply has each: penalties touch no others.
        self.tokens = array("q", dict.fromkeys(prompt))
        self.counts = array("q", bytes(8 * len(self.tokens)))
        self._places = {token: i for i, token in enumerate(self.tokens)}
        for token in prompt[len(prompt) - begun :]:
            self.counts[self._places[token]] += 1
        self.repeats = None
        if sampler.dry_multiplier:
            breakers = breaker_ids(tokenizer, sampler.dry_sequence_breakers)
            self.repeats = Repeats(prompt, breakers, sampler.dry_range)

    def append(self, token: int) -> None:
        """Take the next token of the reply."""
        if token not in self._places:
            self._places[token] = len(self.tokens)
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[self._places[token]] += 1
        if self.repeats is not None:
            self.repeats.append(token)


@torch.inference_mode()
def choose(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> list[int | None]:
    """The next token of each text, which is appended to it; None where no token can be drawn, as all of them are banned
    or the logits are not finite. The logits stay as they are.

    Rows whose samplers differ in no more than seed and length are drawn together; a row gets the same token in any
    company.
    """
    alike: dict[Sampler, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(row.kind, []).append(i)
    out: list[int | None] = [None] * len(rows)
    for sampler, members in alike.items():
        scores = logits if len(members) == len(rows) else logits[torch.tensor(members, device=logits.device)]
        for i, token in zip(members, _drawn(scores, sampler, [rows[i] for i in members]), strict=True):
            out[i] = token
            if token is not None:
                rows[i].append(token)
    return out


def choose_each(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> list[int]:
    """As `choose`. Errors: UsageError where a text has no token that can be drawn."""
    tokens = [token for token in choose(logits, rows) if token is not None]
    if len(tokens) < len(rows):
        raise nothing_to_draw()
    return tokens


def nothing_to_draw() -> UsageError:
    """What to raise where `choose` gives None."""
    return UsageError(
        "sampler: expected a token that can be drawn, found every one banned or a logit that is no number; take back "
        "some of logit_bias, or bring the sliders nearer to 0"
    )


def logprobs(logits: Float[Tensor, " vocab"], token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's log-probability in nats, and the `top` likeliest tokens with theirs, likeliest first.

    Of the model's own distribution, before any bias, penalty or temperature, which is what OpenAI's API reports.
    """
    own = logits.float().log_softmax(-1)
    values, tokens = own.topk(min(top, own.shape[-1]))
    return float(own[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))


def _drawn(logits: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> list[int | None]:
    """A token a row, under one sampler."""
    scores, tokens = process(logits, sampler, rows)
    drawn = scores.argmax(-1) if sampler.temperature == 0 else invert(scores, rows)
    place = drawn.clamp(min=0)[:, None]
    # Written so that NaN is none.
    fine = (drawn >= 0) & (scores.gather(1, place).squeeze(1) > -torch.inf)
    found = (place if tokens is None else tokens.gather(1, place)).squeeze(1)
    return [token if token >= 0 else None for token in torch.where(fine, found, -1).tolist()]


def process(
    logits: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]
) -> tuple[Float[Tensor, "rows kept"], Int[Tensor, "rows kept"] | None]:
    """The scores after every stage, whose softmax is drawn from, and the tokens they belong to; None for all tokens in
    their order. A token that is dropped has -inf, or no column. The logits stay as they are."""
    stages = _quickest(sampler.stages)
    scores = logits.float()
    if scores is logits and (sampler.logit_bias or {"penalties", "dry"} & set(stages)):
        scores = scores.clone()
    if sampler.logit_bias:
        bias_(scores, sampler)
    tokens = None
    for i, stage in enumerate(stages):
        if stage == "penalties":
            penalise_(scores, sampler, rows)
        elif stage == "dry":
            avoid_repeats_(scores, sampler, rows)
        elif stage == "temperature":
            scores = scores / sampler.temperature
        elif stage == "top_k" and sampler.top_k < scores.shape[-1]:
            # The other tokens are left out of the tensor instead of masked: with a large vocabulary that is most of
            # the work. Stages that know tokens by their id want them all back.
            kept, tokens = scores.topk(sampler.top_k, dim=-1)
            if {"penalties", "dry"} & set(stages[i:]):
                kept, tokens = torch.full_like(scores, -torch.inf).scatter(1, tokens, kept), None
            scores = kept
        elif stage == "top_p":
            scores = TopPLogitsWarper(sampler.top_p)(tokens, scores)  # pyright: ignore[reportArgumentType]
        elif stage == "min_p":
            scores = MinPLogitsWarper(sampler.min_p)(tokens, scores)  # pyright: ignore[reportArgumentType]
        elif stage == "typical_p":
            scores = TypicalLogitsWarper(sampler.typical_p)(tokens, scores)  # pyright: ignore[reportArgumentType]
        elif stage == "xtc":
            scores = exclude_top_choices(scores, sampler, rows)
    return scores, tokens


def _quickest(stages: tuple[str, ...]) -> tuple[str, ...]:
    """The same stages with top-k before temperature where they are neighbours: dividing changes no order, and of k
    tokens it is less work than of a vocabulary."""
    out = list(stages)
    for i in range(len(out) - 1):
        if out[i : i + 2] == ["temperature", "top_k"]:
            out[i : i + 2] = ["top_k", "temperature"]
    return tuple(out)


def invert(scores: Float[Tensor, "rows kept"], rows: Sequence[Draw]) -> Int[Tensor, " rows"]:
    """One column a row, by inverting the cumulative distribution at one uniform number of the row's stream; -1 where it
    is none, as every score is -inf or one is no number."""
    total = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    u = _uniform(rows).to(total.device)
    drawn = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)
    drawn = drawn.clamp(max=scores.shape[-1] - 1).squeeze(1)
    return torch.where(total[:, -1] > 0, drawn, -1)


def _uniform(rows: Sequence[Draw]) -> Float[Tensor, " rows"]:
    """A number in [0, 1) of each row's stream."""
    return torch.stack([torch.rand((), generator=row.stream, dtype=torch.float64) for row in rows])


def bias_(scores: Float[Tensor, "rows vocab"], sampler: Sampler) -> None:
    """Add the logit bias, in place."""
    # A tokenizer may know tokens that the model has no logit for.
    biases = [(token, bias) for token, bias in sampler.logit_bias if token < scores.shape[-1]]
    added = torch.tensor([-torch.inf if bias <= BAN else bias for _, bias in biases], device=scores.device)
    scores[:, [token for token, _ in biases]] += added


def penalise_(scores: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> None:
    """Repetition, frequency and presence penalty, in place, on the tokens that the texts have.

    With c times in the reply: `score / repetition` (`score * repetition` below 0) for a token of prompt or reply, then
    `- frequency * c - presence * (c > 0)`.
    """
    width = max(len(row.tokens) for row in rows)
    tokens, counts = np.empty((2, len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], counts[i, :n] = row.tokens, row.counts
        # Filled up with a token of its own: the same score is written twice.
        tokens[i, n:], counts[i, n:] = row.tokens[0], row.counts[0]
    places = torch.from_numpy(tokens).to(scores.device)
    there = scores.gather(1, places)
    if sampler.repetition_penalty != 1:
        there = torch.where(there < 0, there * sampler.repetition_penalty, there / sampler.repetition_penalty)
    if sampler.frequency_penalty or sampler.presence_penalty:
        often = torch.from_numpy(counts).to(scores)
        there = there - sampler.frequency_penalty * often - sampler.presence_penalty * (often > 0)
    scores.scatter_(1, places, there)


def avoid_repeats_(scores: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> None:
    """DRY, in place."""
    found = [
        (i, token, penalty)
        for i, row in enumerate(rows)
        if row.repeats is not None
        for token, penalty in row.repeats.penalties(sampler).items()
    ]
    if found:
        where, tokens, penalties = (torch.tensor(column, device=scores.device) for column in zip(*found, strict=True))
        scores[where, tokens] -= penalties.to(scores.dtype)


def exclude_top_choices(
    scores: Float[Tensor, "rows kept"], sampler: Sampler, rows: Sequence[Draw]
) -> Float[Tensor, "rows kept"]:
    """XTC: in a row whose number of its stream falls below xtc_probability, every token of at least xtc_threshold is
    dropped except the least likely of them; of equally likely ones the first stays."""
    p = scores.softmax(-1)
    top = (p >= sampler.xtc_threshold) & (p > 0)
    least = p.masked_fill(~top, 2.0).argmin(-1, keepdim=True)
    acts = (_uniform(rows) < sampler.xtc_probability).to(scores.device)
    return scores.masked_fill(top.scatter(1, least, False) & acts[:, None], -torch.inf)

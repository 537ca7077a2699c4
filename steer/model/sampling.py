"""Drawing the next token of each row from its logits: penalties, DRY, temperature, truncation, XTC.

The decode loops (`decode.py`, the server) keep a `Draw` per text and call `choose` at every step. What each
stage does is set by a `Sampler`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from steer.core.sampler import Sampler
from steer.errors import UsageError

_WARPERS: dict[str, Any] = {"top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper, "typical_p": TypicalLogitsWarper}
"""Stages that transformers has: they set the score of each token that they drop to -inf."""
HARDEST = 60.0
"""Natural logarithm of DRY's largest penalty: it rules out any token, and is still finite in fp32."""


class Repeats:
    """For each position of a text but the last, how many tokens up to there equal the last tokens of the text.

    Setting it up takes time linear in the text; appending a token takes one pass over an array.
    """

    def __init__(self, text: Sequence[int], breakers: frozenset[int], reach: int = 0) -> None:
        """`reach`: how many of the last tokens are searched for repeats; 0 means all."""
        self.breakers, self.reach = breakers, reach
        self.text = np.asarray(text, dtype=np.int64)
        since_breaker = next((i for i, t in enumerate(reversed(text)) if t in breakers), len(text))
        # The z-function of the reversed text, read backwards.
        lengths = np.asarray(common_prefixes(text[::-1])[:0:-1], dtype=np.int64)
        self.lengths = np.minimum(lengths, since_breaker)

    def append(self, token: int) -> None:
        same = (self.text == token) & (token not in self.breakers)
        self.lengths = same * np.insert(self.lengths + 1, 0, 1)
        self.text = np.append(self.text, token)

    def continuations(self, shortest: int = 1) -> dict[int, int]:
        """{token: length of the longest match that it followed}; matches of `shortest` tokens or more, no breakers."""
        start = max(len(self.text) - self.reach, 0) if self.reach else 0
        # A match has to begin within reach.
        lengths = np.minimum(self.lengths[start:], np.arange(1, len(self.text) - start))
        found: dict[int, int] = {}
        for i in np.flatnonzero(lengths >= max(shortest, 1)).tolist():
            token, length = int(self.text[start + i + 1]), int(lengths[i])
            if token not in self.breakers:
                found[token] = max(found.get(token, 0), length)
        return found

    def penalties(self, sampler: Sampler) -> dict[int, float]:
        """{token: what DRY subtracts from its logit}"""
        base, multiplier = math.log(sampler.dry_base), math.log(sampler.dry_multiplier)
        return {
            token: math.exp(min(multiplier + base * (length - sampler.dry_allowed_length), HARDEST))
            for token, length in self.continuations(sampler.dry_allowed_length).items()
        }


def common_prefixes(text: Sequence[int]) -> list[int]:
    """The z-function: for every i, how many tokens of text[i:] equal the text's first ones (Gusfield 1997, 1.4).

    It takes linear time: inside the match that reaches furthest right, lengths are known from the text's beginning.
    """
    lengths = [len(text)] + [0] * (len(text) - 1)
    left = right = 0
    for i in range(1, len(text)):
        n = min(right - i, lengths[i - left]) if i < right else 0
        while i + n < len(text) and text[n] == text[i + n]:
            n += 1
        lengths[i] = n
        if i + n > right:
            left, right = i, i + n
    return lengths


@lru_cache(maxsize=4)
def _token_texts(tokenizer: Any) -> list[str]:
    return tokenizer.batch_decode([[i] for i in range(len(tokenizer))])


@lru_cache(maxsize=16)  # one set may hold most of the vocabulary
def breaker_ids(tokenizer: Any, breakers: tuple[str, ...]) -> frozenset[int]:
    """The tokens that break a match. Finding them takes part of a second; the last few sets are cached.

    For each breaker these are the last token of "a" + breaker, as DRY defines it (the letter keeps the tokenizer from
    treating the breaker as the beginning of a text), and every token whose text contains the breaker, because
    tokenizers join it with its neighbours: a full stop and a quote, two line ends.
    """
    letter = tokenizer("a", add_special_tokens=False).input_ids
    after_letter = [tokenizer("a" + breaker, add_special_tokens=False).input_ids for breaker in breakers]
    # Where they are equal, there is no such token: some tokenizers split at spaces and have none for a space.
    ids = {after[-1] for after in after_letter if after != letter}
    ids |= {i for i, text in enumerate(_token_texts(tokenizer)) if any(b in text for b in breakers)}
    return frozenset(ids - {tokenizer.unk_token_id})


BAN = -100.0
"""The logit bias at or below which a token cannot be drawn at any temperature."""


class Draw:
    """The state that one text's tokens are drawn with: its tokens so far, its sampler and its random stream."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int], key: int, tokenizer: Any, begun: int = 0) -> None:
        """The random stream is seeded by (sampler.seed, key). `tokenizer`: gives DRY's breakers and the vocabulary.
        `begun`: how many tokens at the end of the prompt belong to the reply already.

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
        """The sampler without seed and length: texts for which it is equal are drawn together."""
        # The distinct tokens of the whole text, and how often each is in the reply: penalties change no other logits.
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
        """Add the next token of the reply."""
        if token not in self._places:
            self._places[token] = len(self.tokens)
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[self._places[token]] += 1
        if self.repeats is not None:
            self.repeats.append(token)


@torch.inference_mode()
def choose(logits: Float[Tensor, "rows vocab"], rows: Sequence[Draw]) -> list[int | None]:
    """Draw the next token of each text and append it to the text. The logits are not changed.

    An entry is None where no token can be drawn, because all of them are banned or the logits are not finite. Rows
    whose samplers differ in seed and length only are drawn together; a row gets the same token whichever other rows are
    drawn with it.
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
    """The error to raise where `choose` returns None."""
    return UsageError(
        "sampler: expected a token that can be drawn, found every one banned or a logit that is no number; take back "
        "some of logit_bias, or bring the sliders nearer to 0"
    )


def logprobs(logits: Float[Tensor, " vocab"], token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's log-probability in nats, and the `top` likeliest tokens with theirs, likeliest first.

    They are of the model's distribution before any bias, penalty or temperature, as in OpenAI's API.
    """
    log_p = logits.float().log_softmax(-1)
    values, tokens = log_p.topk(min(top, log_p.shape[-1]))
    return float(log_p[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))


def _drawn(logits: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> list[int | None]:
    """One token per row, all under one sampler; None where none can be drawn."""
    scores, tokens = process(logits, sampler, rows)
    drawn = scores.argmax(-1) if sampler.temperature == 0 else invert(scores, rows)
    place = drawn.clamp(min=0)[:, None]
    # Written so that a score of NaN counts as no token.
    fine = (drawn >= 0) & (scores.gather(1, place).squeeze(1) > -torch.inf)
    found = (place if tokens is None else tokens.gather(1, place)).squeeze(1)
    return [token if token >= 0 else None for token in torch.where(fine, found, -1).tolist()]


def process(
    logits: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]
) -> tuple[Float[Tensor, "rows kept"], Int[Tensor, "rows kept"] | None]:
    """Apply every stage of the sampler. The logits are not changed.

    Returns the scores, whose softmax is drawn from, and the token of each column; None if the columns are all tokens in
    their order. A token that is dropped has a score of -inf, or no column.
    """
    stages, scores = sampler.stages, logits.float()
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
            # The other tokens are left out of the tensor instead of masked, which saves most of the work with a large
            # vocabulary. Stages that address tokens by id need all columns back.
            top, tokens = scores.topk(sampler.top_k, dim=-1)
            if {"penalties", "dry"} & set(stages[i:]):
                top, tokens = torch.full_like(scores, -torch.inf).scatter(1, tokens, top), None
            scores = top
        elif stage in _WARPERS:
            # They look at the scores alone.
            scores = _WARPERS[stage](getattr(sampler, stage))(tokens, scores)  # pyright: ignore[reportArgumentType]
        elif stage == "xtc":
            scores = exclude_top_choices(scores, sampler, rows)
    return scores, tokens


def invert(scores: Float[Tensor, "rows kept"], rows: Sequence[Draw]) -> Int[Tensor, " rows"]:
    """Draw one column per row by inverting the cumulative distribution at a uniform number from the row's stream.

    -1 where no column can be drawn, because every score is -inf or one is NaN.
    """
    total = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    u = _uniform(rows).to(total.device)
    drawn = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)
    drawn = drawn.clamp(max=scores.shape[-1] - 1).squeeze(1)
    return torch.where(total[:, -1] > 0, drawn, -1)


def _uniform(rows: Sequence[Draw]) -> Float[Tensor, " rows"]:
    """A uniform number in [0, 1) from each row's stream."""
    return torch.stack([torch.rand((), generator=row.stream, dtype=torch.float64) for row in rows])


def bias_(scores: Float[Tensor, "rows vocab"], sampler: Sampler) -> None:
    """Add the logit bias, in place."""
    # A tokenizer may know tokens for which the model has no logit.
    biases = [(token, bias) for token, bias in sampler.logit_bias if token < scores.shape[-1]]
    added = torch.tensor([-torch.inf if bias <= BAN else bias for _, bias in biases], device=scores.device)
    scores[:, [token for token, _ in biases]] += added


def penalise_(scores: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> None:
    """Repetition, frequency and presence penalty, in place, on the tokens of each text.

    The score of a token of prompt or reply becomes `score / repetition` (`score * repetition` below 0), then
    `- frequency * c - presence * (c > 0)` is added, with c how often it is in the reply.
    """
    width = max(len(row.tokens) for row in rows)
    tokens, counts = np.empty((2, len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], counts[i, :n] = row.tokens, row.counts
        # Filled up with a token that the row has already: the same score is written twice.
        tokens[i, n:], counts[i, n:] = row.tokens[0], row.counts[0]
    places = torch.from_numpy(tokens).to(scores.device)
    values = scores.gather(1, places)
    if sampler.repetition_penalty != 1:
        values = torch.where(values < 0, values * sampler.repetition_penalty, values / sampler.repetition_penalty)
    if sampler.frequency_penalty or sampler.presence_penalty:
        times = torch.from_numpy(counts).to(scores)
        values = values - sampler.frequency_penalty * times - sampler.presence_penalty * (times > 0)
    scores.scatter_(1, places, values)


def avoid_repeats_(scores: Float[Tensor, "rows vocab"], sampler: Sampler, rows: Sequence[Draw]) -> None:
    """DRY, in place: lower the scores of tokens that would continue a repeat."""
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
    """XTC: drop the likeliest tokens of a row with probability `xtc_probability`, drawn from the row's stream.

    Every token with a probability of at least `xtc_threshold` is dropped except the least likely of them; of equally
    likely ones the first stays.
    """
    p = scores.softmax(-1)
    top = (p >= sampler.xtc_threshold) & (p > 0)
    least = p.masked_fill(~top, 2.0).argmin(-1, keepdim=True)
    acts = (_uniform(rows) < sampler.xtc_probability).to(scores.device)
    return scores.masked_fill(top.scatter(1, least, False) & acts[:, None], -torch.inf)

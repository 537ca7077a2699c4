"""`LocalReader`: scores passages and writes replies for the probes, by a model in this process under one edit.

It batches passages that begin alike, so that `prefill` reads their beginning once, and limits the tokens of a batch to
what fits in memory. `steer.measure.endpoint` has the reader that asks a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.dtypes import dtype_name
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.errors import UsageError
from steer.measure.probes.probe import TEMPERATURE, Ability, Chat, LogProbs, Passage
from steer.model.forward import logits_in_chunks
from steer.model.loaded import WITHOUT_THOUGHTS, ChatPrompt, Message
from steer.model.loading import release_memory
from steer.model.prefill import Beginning, prefill
from steer.model.steered import SteeredModel
from steer.model.tokens import common_length
from steer.progress import Advance

ROWS = 64
"""Passages read together at most."""
TOKENS = 16384
"""Tokens read together at most, padding and shared beginnings counted once per passage, since each has its own copy of
their keys and values: 750 MB for a 135M Llama in fp32."""
FALLBACK = "plain"
"""The shipped template with which a model that has none reads chats."""
ABILITIES: frozenset[Ability] = frozenset(("logprobs", "replies", "divergences", "weights"))


@dataclass(frozen=True)
class PassageTokens:
    """A passage as token ids."""

    ids: tuple[int, ...]
    start: int
    """The first token that is scored, at least 1."""
    reply: int
    """How many tokens come before the reply."""


class LocalReader:
    """A model under one edit, in this process. Errors of its methods: SteerError of one line that names the model."""

    abilities: frozenset[Ability] = ABILITIES
    dtype: str | None

    def __init__(self, model: SteeredModel, edit: Edit | None = None, name: str = "") -> None:
        """`edit`: None for the model as it is; its standing sliders never act."""
        self.model, self.edit, self.name = model, edit, name or model.name
        self.context, self.dtype = model.context, dtype_name(model.hf.dtype)
        self.notes = with_template(model)
        self._prompt = lru_cache(4096)(self._render)
        self.tokens = lru_cache(16384)(self._tokenise)
        """A passage as token ids."""

    def length(self, passage: Passage) -> int:
        """Return how many tokens a passage takes, all of it."""
        return len(self.tokens(passage).ids)

    @torch.inference_mode()
    def logprobs(self, passages: Sequence[Passage], advance: Advance | None = None) -> list[LogProbs]:
        """Return the log-probability of each token of each passage's `text`."""
        rows = [self.tokens(p) for p in passages]
        out: list[LogProbs] = [np.zeros(0)] * len(rows)
        for batch, hidden in self._hidden(rows):
            # All at once, since each product with the head reads all of its weights.
            targets = torch.tensor([t for i in batch for t in rows[i].ids[rows[i].start :]], device=self.model.device)
            found = [
                self._log_softmax(scores).gather(-1, targets[part, None])
                for part, scores in logits_in_chunks(self.model, torch.cat(hidden))
            ]
            scored = torch.cat(found).squeeze(-1).double().cpu().numpy() if found else np.zeros(0)
            for i, values in zip(batch, np.split(scored, np.cumsum([len(h) for h in hidden])[:-1]), strict=True):
                out[i] = values
            if advance is not None:
                advance(len(batch))
        return out

    def replies(
        self,
        chats: Sequence[Chat],
        *,
        tokens: int,
        seeds: Sequence[int],
        advance: Advance | None = None,
    ) -> list[str]:
        """Return a reply of at most `tokens` tokens to each chat, without thoughts, drawn by temperature alone."""
        if not chats:
            return []
        prompts = [self._prompt(chat, "") for chat in chats]
        longest = max(len(p.ids) for p in prompts) + tokens
        made = self.model.replies(
            [as_chat(chat) for chat in chats],
            Sampler(max_new_tokens=tokens, temperature=TEMPERATURE, repetition_penalty=1.0),
            [self.edit] * len(chats),
            keys=seeds,
            batch=max(1, min(3 * ROWS, TOKENS // longest)),
            thoughts=False,
        )
        if advance is not None:
            advance(len(chats))
        return [
            self.model.text(ids[self.model.answer_start(ids, prompt.opening) :]).strip()
            for ids, prompt in zip(made, prompts, strict=True)
        ]

    @torch.inference_mode()
    def divergences(
        self, pairs: Sequence[tuple[Passage, Passage]], advance: Advance | None = None
    ) -> list[Float[np.ndarray, " tokens"]]:
        """Return KL(first || second) in nats at each token of a text that both passages of a pair score.

        The tokens are those at the end of both passages that are the same: what is read before a text may change how
        its first token is cut.
        """
        rows = [self.tokens(p) for pair in pairs for p in pair]
        out: list[Float[np.ndarray, " tokens"]] = [np.zeros(0)] * len(pairs)
        waiting: dict[int, Tensor] = {}
        for batch, read in self._hidden(rows):
            for i, hidden in zip(batch, read, strict=True):
                other = waiting.pop(i ^ 1, None)
                if other is None:
                    waiting[i] = hidden.clone()  # a slice would keep the whole batch in memory
                    continue
                first, second = (other, hidden) if i % 2 else (hidden, other)
                same = common_length(*(rows[j].ids[: rows[j].start - 1 : -1] for j in (i, i ^ 1)))
                out[i // 2] = self._kl(first[len(first) - same :], second[len(second) - same :])
                if advance is not None:
                    advance(1)
        return out

    def applied(self) -> AbstractContextManager[None]:
        """Inside the block the transformers model `self.model.hf` runs under the edit, whoever calls it."""
        return self.model.steering.alone([self.edit])

    def _kl(self, first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[np.ndarray, " n"]:
        out = [np.zeros(0)]
        others = logits_in_chunks(self.model, second)
        for (_, scores), (_, other) in zip(logits_in_chunks(self.model, first), others, strict=True):
            expected = self._log_softmax(scores)
            kl = (expected.exp() * (expected - self._log_softmax(other))).sum(-1)
            out.append(kl.clamp(min=0).double().cpu().numpy())  # rounding takes it below 0 where both agree
        return np.concatenate(out)

    def _log_softmax(self, scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        with self.applied():  # the error says whether sliders may be the cause
            self.model.check_finite(scores)
        return scores.log_softmax(-1)

    def _hidden(self, rows: Sequence[PassageTokens]) -> Iterator[tuple[list[int], list[Float[Tensor, "tokens d"]]]]:
        """Yield (indices of rows, for each the LM head's input at the positions that predict its scored tokens), in any
        order."""
        longest = max((len(r.ids) for r in rows), default=0)
        if longest > self.context:
            raise UsageError(
                f"{self.name}: expected passages of at most {self.context} tokens, its context, found {longest}; "
                "leave out the longest"
            )
        with self.applied():
            timed = self.model.steering.timed
        carried = _carried(rows, timed)
        carriers = list(carried)
        starts = {c: min(rows[i].start for i in carried[c]) for c in carriers}
        read_together = list(batches([rows[c].ids for c in carriers]))
        release_memory(garbage=False)  # passages of other lengths, read before these, have left holes
        begun = None
        if len(read_together) > 1 and not timed:
            with self.applied():
                begun = Beginning.of(self.model, [rows[c].ids[: starts[c]] for c in carriers])
        for batch in read_together:
            read_rows = [carriers[b] for b in batch]
            with self.applied():
                # The last token is left out: its prediction is not scored.
                read = prefill(
                    self.model,
                    [rows[c].ids[:-1] for c in read_rows],
                    prompts=[rows[c].reply if timed else starts[c] for c in read_rows],
                    begun=begun,
                ).hidden
            out = [
                (i, row[len(row) - len(rows[c].ids) + rows[i].start :][: len(rows[i].ids) - rows[i].start])
                for c, row in zip(read_rows, read, strict=True)
                for i in carried[c]
            ]
            yield [i for i, _ in out], [hidden for _, hidden in out]

    def _render(self, chat: Chat, reply: str) -> ChatPrompt:
        return self.model.prompt(as_chat(chat), reply, WITHOUT_THOUGHTS)

    def _tokenise(self, passage: Passage) -> PassageTokens:
        return passage_tokens(
            passage,
            lambda chat, reply: self._prompt(chat, reply).ids,
            self.model.encode,
            first_token(self.model.tokenizer),
        )


def passage_tokens(
    passage: Passage,
    prompt: Callable[[Chat, str], Sequence[int]],
    encode: Callable[[str], Sequence[int]],
    first: Sequence[int],
) -> PassageTokens:
    """Return a passage as token ids. What is read before and what is scored are tokenised together, since a token may
    lie across the boundary: it is scored.

    `prompt`: a chat with the beginning of its reply as ids. `encode`: a plain text as ids, which `first` precedes.
    """
    whole_text = passage.begun + passage.text
    if passage.chat:
        whole = prompt(passage.chat, whole_text)
        begins = common_length(prompt(passage.chat, ""), whole)
        start = common_length(prompt(passage.chat, passage.begun), whole) if passage.begun else begins
        return PassageTokens(tuple(whole), start, begins)
    whole = [*first, *encode(whole_text)]
    before = [*first, *encode(passage.begun)] if passage.begun else first
    start = max(1, common_length(before, whole))
    return PassageTokens(tuple(whole), start, start)


def first_token(tokenizer: Any) -> list[int]:
    """Return the token that a tokenizer puts before a plain text: its BOS, or none. What it puts at the end of a text
    would end a passage there, and is left out."""
    framed = tokenizer("").input_ids[:1]
    return framed if framed == [tokenizer.bos_token_id] else []


def as_chat(chat: Chat) -> list[Message]:
    """Return a chat as messages."""
    return [{"role": role, "content": text} for role, text in chat]


def with_template(model: SteeredModel) -> list[str]:
    """Give a model without a chat template the one that ships as `FALLBACK`; return a note on it, if it had none."""
    if getattr(model.tokenizer, "chat_template", None):
        return []
    template = chosen_template(FALLBACK)
    assert template is not None
    model.use_template(template)
    return [f"it has no chat template: chats are read with the template {FALLBACK!r}, as User: and Assistant:"]


def batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the indices of texts that are read together: at most `ROWS` of them and `TOKENS` tokens, or one text.

    Texts that share at least half of the longer one stay side by side, then texts of similar length do, since every row
    of a batch is as long as its longest.
    """
    families: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        last = texts[families[-1][-1]] if families else ()
        if families and 2 * common_length(last, texts[i]) >= max(len(last), len(texts[i])):
            families[-1].append(i)
        else:
            families.append([i])
    batch: list[int] = []
    for i in (i for family in sorted(families, key=lambda f: max(len(texts[i]) for i in f)) for i in family):
        longest = max(len(texts[j]) for j in [*batch, i])
        if batch and (len(batch) == ROWS or longest * (len(batch) + 1) > TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _carried(rows: Sequence[PassageTokens], timed: bool) -> dict[int, list[int]]:
    """Return, for each row that is read, the rows that are scored in it: itself, and those that it begins with.

    Sentences of one text, and replies of one chat that goes on, are then read once. `timed`: whether the edit depends
    on where the reply begins, which then has to be the same.
    """
    out: dict[int, list[int]] = {}
    after: int | None = None
    # A row is sorted right before those that begin with it.
    for i in sorted(range(len(rows)), key=lambda i: (rows[i].reply if timed else 0, rows[i].ids), reverse=True):
        within = after is not None and rows[after].ids[: len(rows[i].ids)] == rows[i].ids
        if after is None or not within or (timed and rows[after].reply != rows[i].reply):
            after = i
            out[i] = []
        out[after].append(i)
    return out

"""The cost of steering: repetition, perplexity, and KL divergence from the untouched model.

Every other measurement (`dose`, `neutral_costs`, `search`, `steer.finding`) takes its costs from this file. All texts
are read with teacher forcing; logits are computed for `TOKENS` tokens at a time to bound memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from steer.core.edit import Edit
from steer.measure.contrast import Reply
from steer.model.forward import Head, head_of
from steer.model.loaded import Message
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel

ROWS = 64
"""Texts per forward pass, at most, counted once per edit."""
TOKENS = 64
"""Tokens of a text whose logits are in memory at the same time."""


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of a text's n-grams that occurred in it before (seq-rep-n, Welleck et al. 2019)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_repetition(replies: Sequence[Sequence[int]]) -> float:
    """Mean `repetition` over replies; 0 for none."""
    return float(np.mean([repetition(r) for r in replies])) if replies else 0.0


Text = tuple[Sequence[int], Sequence[int]]
"""(context, text) as token ids: the text is what is scored, the context is what precedes it."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The untouched model's replies to neutral prompts and its predictions on them, to compare other models with.

    The predictions are stored as hidden states: probabilities over the vocabulary would take a hundred times the
    memory.
    """

    texts: tuple[Text, ...]
    """(prompt, reply) as token ids."""
    hidden: tuple[Float[Tensor, "tokens d"], ...]
    """Per reply, the input of the LM head at each position that predicts a reply token."""
    head: Head

    @classmethod
    def of(cls, model: SteeredModel, replies: Sequence[Reply]) -> Reference:
        """Run the untouched model over `replies` once and store its predictions."""
        texts = tuple((model.prompt_ids(r.chat), r.ids) for r in replies)
        hidden: dict[int, Tensor] = {i: rows[0].clone() for i, rows in _hidden(model, texts, [None])}
        for rows in hidden.values():
            model.check_finite(rows)
        return cls(texts, tuple(hidden[i] for i in range(len(texts))), head_of(model))

    def kl(self, model: SteeredModel, edit: Edit | None) -> float:
        """KL(untouched || `model` under `edit`), nats per reply token. `model` may be another checkpoint."""
        return self.kls(model, [edit])[0]

    def kls(self, model: SteeredModel, edits: Sequence[Edit | None]) -> list[float]:
        """KL(untouched || `model`) under each edit, nats per reply token."""
        return (self._sums(model, edits).sum(1) / self.lengths.sum()).tolist()

    def kl_sums(self, model: SteeredModel) -> Float[np.ndarray, " replies"]:
        """KL(untouched || `model`) summed over each reply's tokens, nats."""
        return self._sums(model, [None])[0]

    @property
    def lengths(self) -> Float[np.ndarray, " replies"]:
        """Tokens of each reply."""
        return np.array([float(len(text)) for _, text in self.texts])

    @torch.inference_mode()
    def _sums(self, model: SteeredModel, edits: Sequence[Edit | None]) -> Float[np.ndarray, "edits replies"]:
        out, head = np.zeros((len(edits), len(self.texts))), head_of(model)
        for i, rows in _hidden(model, self.texts, edits):
            out[:, i] = [kl for kl, _ in _compared(self.head, self.hidden[i], head, rows, self.texts[i][1])]
        return out


@torch.inference_mode()
def row_costs(
    model: SteeredModel,
    texts: Sequence[Text],
    edits: Sequence[Edit],
    on_tokens: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """(KL(untouched || edited), cross-entropy) in nats per token of the texts: first those of the untouched model, then
    those under each edit. inf where a logit is not a number. `on_tokens` is called once per text with the number of
    tokens that went through the model, context included and counted once per edit."""
    head = head_of(model)
    sums = np.zeros((1 + len(edits), 2))
    for i, rows in _hidden(model, texts, [None, *edits]):
        before, text = texts[i]
        sums += _compared(head, rows[0], head, rows, text)
        if on_tokens is not None:
            on_tokens(len(sums) * (len(before) + len(text)))
    means = sums / max(1, sum(len(text) for _, text in texts))
    return [(divergence, entropy) for divergence, entropy in np.where(np.isnan(means), math.inf, means).tolist()]


@torch.inference_mode()
def _hidden(
    model: SteeredModel, texts: Sequence[Text], edits: Sequence[Edit | None]
) -> Iterator[tuple[int, list[Float[Tensor, "tokens d"]]]]:
    """Yield (index of a text, per edit the LM head's input at the positions that predict the text's tokens).

    The order is not that of `texts`: texts with the same context are read together, so that it is read once.
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i][0]), tuple(texts[i][0]), len(texts[i][1])))
    together = max(1, ROWS // len(edits))
    which = list(range(len(edits))) if len(edits) > 1 else None
    for start in range(0, len(order), together):
        rows = [texts[i] for i in order[start : start + together] for _ in edits]
        with model.steering.alone(edits):
            # The last token is left out: its prediction is not scored.
            read = prefill(
                model,
                [[*before, *text[:-1]] for before, text in rows],
                prompts=[len(before) for before, _ in rows],
                which=None if which is None else which * (len(rows) // len(which)),
            ).hidden
        for j, i in enumerate(order[start : start + together]):
            yield i, [h[-len(texts[i][1]) :] for h in read[j * len(edits) : (j + 1) * len(edits)]]


def _compared(
    base_head: Head, base: Float[Tensor, "tokens d"], head: Head, rows: Sequence[Float[Tensor, "tokens d"]], text: Any
) -> list[tuple[float, float]]:
    """(KL(base || row), cross-entropy of the row) for each row of hidden states, summed over the text's tokens, nats.

    `TOKENS` tokens at a time: the probabilities over the vocabulary at every token would dominate memory."""
    sums = [[0.0, 0.0] for _ in rows]
    said, step = torch.tensor(text, device=base.device)[:, None], 0
    while step < len(said):
        expected = base_head(base[step : step + TOKENS]).log_softmax(-1)
        weights = expected.exp()
        for total, hidden in zip(sums, rows, strict=True):
            logprobs = expected if hidden is base else head(hidden[step : step + TOKENS]).log_softmax(-1)
            total[0] += float((weights * (expected - logprobs)).sum())
            total[1] -= float(logprobs.gather(1, said[step : step + TOKENS]).sum())
        step += TOKENS
    return [(divergence, entropy) for divergence, entropy in sums]


def reply_perplexities(
    model: SteeredModel, chats: Sequence[Sequence[Message]], groups: Sequence[Sequence[Sequence[int]]]
) -> list[float]:
    """Perplexity per token of each group of replies to the same chats, under the untouched model: how surprised it is
    by the replies of a steered model. Each chat is read once for all groups."""
    prompts = [model.prompt_ids(c) for c in chats]
    rows = [[(p, r) for p, r in zip(prompts, replies, strict=True) if r] for replies in groups]
    sums = iter(_entropies(model, [row for group in rows for row in group], None))
    return [float(np.exp(sum(next(sums) for _ in group) / max(sum(len(r) for _, r in group), 1))) for group in rows]


def text_perplexity(model: SteeredModel, texts: Sequence[str], edit: Edit | None = None, *, limit: int = 256) -> float:
    """Perplexity per token of plain texts under `edit`. Each text is cut to `limit` tokens; the first is context."""
    sums, counts = text_entropies(model, texts, edit, limit=limit)
    return float(np.exp(sums.sum() / max(counts.sum(), 1)))


def text_entropies(
    model: SteeredModel, texts: Sequence[str], edit: Edit | None = None, *, limit: int = 256
) -> tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"]]:
    """(cross-entropy of each text in nats, summed over its tokens; number of those tokens). Each text is cut to `limit`
    tokens. The first token is context and not counted; texts of one token are left out."""
    ids = [model.encode(text)[: min(limit, model.context)] for text in texts]
    rows = [(i[:1], i[1:]) for i in ids if len(i) > 1]
    return _entropies(model, rows, edit), np.array([float(len(rest)) for _, rest in rows])


@torch.inference_mode()
def _entropies(model: SteeredModel, rows: Sequence[Text], edit: Edit | None) -> Float[np.ndarray, " rows"]:
    out, head = np.zeros(len(rows)), head_of(model)
    for i, (hidden,) in _hidden(model, rows, [edit]):
        said = torch.tensor(rows[i][1], device=hidden.device)
        for step in range(0, len(said), TOKENS):
            part = slice(step, step + TOKENS)
            out[i] += float(cross_entropy(head(hidden[part]), said[part], reduction="sum"))
    return out


def plain_paragraphs() -> tuple[list[str], list[str]]:
    """Plain prose written for this project, in two halves: one for searching, one for the final measurement."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    paragraphs = [p.replace("\n", " ") for p in text.strip().split("\n\n")]
    return paragraphs[0::2], paragraphs[1::2]

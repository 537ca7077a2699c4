"""Whether text still reads: repetition, and divergence from the untouched model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.features.contrast import Reply
from steer.live.forward import hidden_states, logits, padded
from steer.live.model import Message, SteeredModel
from steer.values.edit import Edit


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Share of a text's n-grams that occurred in it before (seq-rep-n, Welleck et al. 2019)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_repetition(replies: Sequence[Sequence[int]]) -> float:
    """Mean over replies."""
    return float(np.mean([repetition(r) for r in replies])) if replies else 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """The untouched model's replies to neutral prompts and its predictions there: what divergences are taken from."""

    replies: tuple[Reply, ...]
    logprobs: list[Float[Tensor, "tokens vocab"]]

    @classmethod
    def of(cls, model: SteeredModel, replies: Sequence[Reply]) -> Reference:
        """Run the untouched model over its replies once."""
        return cls(tuple(replies), token_logprobs(model, replies, None))

    def kl(self, model: SteeredModel, edit: Edit | None) -> float:
        """KL(untouched || `model` under `edit`), nats per reply token. `model` may be another checkpoint."""
        return kl(self.logprobs, token_logprobs(model, self.replies, edit))

    def kl_sums(self, model: SteeredModel) -> Float[np.ndarray, " replies"]:
        """KL(untouched || `model`) summed over each reply's tokens, nats."""
        return np.array(_kl_sums(self.logprobs, token_logprobs(model, self.replies, None)))

    @property
    def lengths(self) -> Float[np.ndarray, " replies"]:
        """Tokens of each reply."""
        return np.array([float(len(p)) for p in self.logprobs])


def kl(base: Sequence[Float[Tensor, "tokens vocab"]], other: Sequence[Float[Tensor, "tokens vocab"]]) -> float:
    """Mean KL(base || other) over tokens, nats."""
    return sum(_kl_sums(base, other)) / sum(len(p) for p in base)


def _kl_sums(base: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    return [float((p.float().exp() * (p.float() - q.float())).sum()) for p, q in zip(base, other, strict=True)]


Text = tuple[list[int], list[int]]
"""What stands before a text, and the text, as token ids."""


@torch.inference_mode()
def row_costs(
    model: SteeredModel,
    texts: Sequence[Text],
    edits: Sequence[Edit],
    on_tokens: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """(KL(untouched || edited), cross-entropy), nats per token of the texts, of the untouched model and then under each
    edit; inf where a logit is none. One pass a text, its rows the untouched model and every edit."""
    sums = [[0.0, 0.0] for _ in range(1 + len(edits))]
    with model.steering.applied([None, *edits]):
        for before, text in texts:
            ids = torch.tensor([[*before, *text]], device=model.device).repeat(len(sums), 1)
            hidden = hidden_states(model, ids)[:, len(before) - 1 : -1]
            said = ids[0, len(before) :, None]
            base = logits(model, hidden[0]).log_softmax(-1)
            # A row at a time: the logits of all would be far larger than the model's activations.
            for i, total in enumerate(sums):
                logprobs = logits(model, hidden[i]).log_softmax(-1) if i else base
                total[0] += float((base.exp() * (base - logprobs)).sum())
                total[1] -= float(logprobs.gather(1, said).sum())
            if on_tokens is not None:
                on_tokens(ids.numel())
    count = max(1, sum(len(text) for _, text in texts))
    means = [[math.inf if math.isnan(s) else s / count for s in total] for total in sums]
    return [(divergence, entropy) for divergence, entropy in means]


@torch.inference_mode()
def token_logprobs(
    model: SteeredModel, replies: Sequence[Reply], edit: Edit | None, *, batch: int = 16
) -> list[Float[Tensor, "tokens vocab"]]:
    """Log-probabilities at every position that predicts a reply token, one tensor a reply."""
    out: list[Tensor] = []
    with model.steering.applied([edit]):
        for start in range(0, len(replies), batch):
            group = replies[start : start + batch]
            out += forward_logprobs(model, [(model.prompt_ids(r.chat), r.ids) for r in group])
    return out


def forward_logprobs(
    model: SteeredModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Float[Tensor, "tokens vocab"]]:
    """Log-probabilities over the second part of each (context, continuation) row, in one pass."""
    ids, mask = padded([[*context, *rest] for context, rest in rows], model.pad_token_id, model.device)
    hidden = hidden_states(model, ids, mask)
    out = []
    for row, (context, rest) in enumerate(rows):
        at = hidden[row, len(context) - 1 : len(context) + len(rest) - 1]
        # The LM head only where it is wanted: it is a fifth of a small model's work.
        out.append(logits(model, at).log_softmax(-1))
    return out


@torch.inference_mode()
def reply_perplexity(
    model: SteeredModel,
    chats: Sequence[Sequence[Message]],
    replies: Sequence[Sequence[int]],
    *,
    batch: int = 16,
) -> float:
    """Perplexity of replies under the untouched model: how surprised it is by what the steered one wrote."""
    rows = [(model.prompt_ids(c), r) for c, r in zip(chats, replies, strict=True) if r]
    return _perplexity(model, rows, None, batch)


def text_perplexity(
    model: SteeredModel, texts: Sequence[str], edit: Edit | None = None, *, batch: int = 8, limit: int = 256
) -> float:
    """Perplexity per token of plain texts; the first token of each is context."""
    sums, counts = text_entropies(model, texts, edit, batch=batch, limit=limit)
    return float(np.exp(sums.sum() / max(counts.sum(), 1)))


def text_entropies(
    model: SteeredModel, texts: Sequence[str], edit: Edit | None = None, *, batch: int = 8, limit: int = 256
) -> tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"]]:
    """The cross-entropy of each text in nats, summed over its tokens, and how many there are; the first is context."""
    ids = [model.tokenizer(text, add_special_tokens=False).input_ids[:limit] for text in texts]
    rows = [(i[:1], i[1:]) for i in ids if len(i) > 1]
    return _entropies(model, rows, edit, batch), np.array([float(len(rest)) for _, rest in rows])


def _perplexity(
    model: SteeredModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], edit: Edit | None, batch: int
) -> float:
    return float(np.exp(_entropies(model, rows, edit, batch).sum() / max(sum(len(rest) for _, rest in rows), 1)))


@torch.inference_mode()
def _entropies(
    model: SteeredModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], edit: Edit | None, batch: int
) -> Float[np.ndarray, " rows"]:
    out = np.zeros(len(rows))
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    with model.steering.applied([edit]):
        for start in range(0, len(ordered), batch):
            group = ordered[start : start + batch]
            for i, logprobs in zip(group, forward_logprobs(model, [rows[i] for i in group]), strict=True):
                said = torch.tensor(rows[i][1], device=logprobs.device)[:, None]
                out[i] = -float(logprobs.gather(1, said).sum())
    return out


def plain_paragraphs() -> tuple[list[str], list[str]]:
    """Plain prose written for this project, in two halves: one to search with, one to measure with."""
    text = (resources.files("steer") / "measure" / "texts" / "plain.txt").read_text(encoding="utf-8")
    paragraphs = [p.replace("\n", " ") for p in text.strip().split("\n\n")]
    return paragraphs[0::2], paragraphs[1::2]

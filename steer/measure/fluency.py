"""Whether text still reads: repetition, and divergence from the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.features.contrast import Reply
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


def kl(base: Sequence[Float[Tensor, "tokens vocab"]], other: Sequence[Float[Tensor, "tokens vocab"]]) -> float:
    """Mean KL(base || other) over tokens, nats."""
    total = sum(float((p.float().exp() * (p.float() - q.float())).sum()) for p, q in zip(base, other, strict=True))
    return total / sum(len(p) for p in base)


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
    full = [[*context, *rest] for context, rest in rows]
    width = max(map(len, full))
    ids = torch.tensor([s + [model.pad_token_id] * (width - len(s)) for s in full], device=model.device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in full], device=model.device)
    hidden = model.hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    out = []
    for row, (context, rest) in enumerate(rows):
        at = hidden[row, len(context) - 1 : len(context) + len(rest) - 1]
        # The LM head only where it is wanted: it is a fifth of a small model's work.
        out.append(model.hf.lm_head(at).float().log_softmax(-1))
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


@torch.inference_mode()
def text_perplexity(
    model: SteeredModel, texts: Sequence[str], edit: Edit | None = None, *, batch: int = 8, limit: int = 256
) -> float:
    """Perplexity per token of plain texts; the first token of each is context."""
    rows = []
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False).input_ids[:limit]
        rows.append((ids[:1], ids[1:]))
    return _perplexity(model, [r for r in rows if r[1]], edit, batch)


def _perplexity(
    model: SteeredModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], edit: Edit | None, batch: int
) -> float:
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda r: len(r[0]) + len(r[1]))
    with model.steering.applied([edit]):
        for start in range(0, len(ordered), batch):
            group = ordered[start : start + batch]
            for (_, rest), logprobs in zip(group, forward_logprobs(model, group), strict=True):
                picked = logprobs.gather(1, torch.tensor(rest, device=logprobs.device)[:, None])
                total, count = total - float(picked.sum()), count + len(rest)
    return float(np.exp(total / max(count, 1)))

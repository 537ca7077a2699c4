"""KL by its definition, with the log-probabilities of whole vocabularies in memory: what streaming is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.core.edit import Edit
from steer.measure.contrast import Reply
from steer.model.steered import SteeredModel


def kl(base: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL(base || other) over tokens, nats; a tensor `[tokens, vocab]` of log-probabilities a text."""
    sums = [float((p.exp() * (p - q)).sum()) for p, q in zip(base, other, strict=True)]
    return sum(sums) / sum(map(len, base))


@torch.inference_mode()
def token_logprobs(model: SteeredModel, replies: Sequence[Reply], edit: Edit | None) -> list[Tensor]:
    """Log-probabilities at every position that predicts a reply token, each reply in its own full pass."""
    out = []
    with model.steering.applied([edit]):
        for reply in replies:
            prompt = model.prompt_ids(reply.chat)
            whole = model.hf(input_ids=torch.tensor([[*prompt, *reply.ids]])).logits[0].float().log_softmax(-1)
            out.append(whole[len(prompt) - 1 : -1])
    return out

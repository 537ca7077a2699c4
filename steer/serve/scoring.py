"""Log-probabilities of a prompt's own tokens, for completions with `echo` beside `logprobs`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from steer.core.edit import Edit
from steer.model.forward import logits_in_chunks
from steer.model.kv_cache import growing_cache
from steer.model.prefill import decoder_pass
from steer.model.steered import SteeredModel
from steer.model.written import WrittenText
from steer.serve.engine import Token
from steer.serve.errors import invalid

AT_ONCE = 256
"""Tokens that are read before the texts of others are written on."""


@torch.inference_mode()
def prompt_tokens(model: SteeredModel, ids: Sequence[int], edit: Edit | None, top: int) -> tuple[Token, ...]:
    """Return the tokens of a prompt but its first, each with the `top` likeliest tokens at its place.

    The engine writes between the passes, of `AT_ONCE` tokens each. Errors: CheckpointError for logits that are not
    finite, ApiError for a model that is only described.
    """
    if model.hf.device.type == "meta":
        expected = "an engine that scores prompts beside logprobs"
        raise invalid("echo", expected, "another; leave one of them out", "unsupported_value")
    if len(ids) < 2:
        return ()
    out: list[Token] = []
    read = torch.tensor([list(ids[:-1])], device=model.device)
    mask, texts = torch.ones_like(read), [WrittenText(model.tokenizer, ids[:-1], len(ids))]
    cache = growing_cache(model.hf.config, ahead=len(ids))
    for start in range(0, read.shape[1], AT_ONCE):
        end = start + AT_ONCE
        with model.steering.alone([edit]):
            hidden = decoder_pass(model, read[:, start:end], mask[:, :end], cache, None, texts)[0]
        time.sleep(0.001)  # else this thread would take the lock again before the engine's thread wakes
        for part, scores in logits_in_chunks(model, hidden):
            model.check_finite(scores)
            logprobs = scores.log_softmax(-1)
            targets = torch.tensor(ids[start + 1 : end + 1][part], device=logprobs.device)
            likeliest = logprobs.topk(top, dim=-1)
            for token, logprob, values, tokens in zip(
                targets.tolist(), logprobs.gather(-1, targets[:, None])[:, 0].tolist(), likeliest.values.tolist(),
                likeliest.indices.tolist(), strict=True,
            ):  # fmt: skip
                pairs = tuple(zip(tokens, values, strict=True))
                out.append(Token(token, logprob, pairs, token in model.end_token_ids))
    return tuple(out)

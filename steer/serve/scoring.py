"""Log-probabilities of a prompt's own tokens, for completions with `echo` beside `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer.core.edit import Edit
from steer.model.forward import logits_in_chunks
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel
from steer.serve.engine import Token
from steer.serve.errors import invalid


@torch.inference_mode()
def prompt_tokens(model: SteeredModel, ids: Sequence[int], edit: Edit | None, top: int) -> tuple[Token, ...]:
    """Return the tokens of a prompt but its first, each with the `top` likeliest tokens at its place.

    The engine waits meanwhile. Errors: CheckpointError for logits that are not finite, ApiError for a model that is
    only described.
    """
    if model.hf.device.type == "meta":
        expected = "an engine that scores prompts beside logprobs"
        raise invalid("echo", expected, "another; leave one of them out", "unsupported_value")
    if len(ids) < 2:
        return ()
    out: list[Token] = []
    with model.steering.alone([edit]):
        hidden = prefill(model, [ids[:-1]], prompts=[len(ids)]).hidden[0]
        for part, scores in logits_in_chunks(model, hidden):
            model.check_finite(scores)
            logprobs = scores.log_softmax(-1)
            targets = torch.tensor(ids[1:][part], device=logprobs.device)
            likeliest = logprobs.topk(top, dim=-1)
            for token, logprob, values, tokens in zip(
                targets.tolist(), logprobs.gather(-1, targets[:, None])[:, 0].tolist(), likeliest.values.tolist(),
                likeliest.indices.tolist(), strict=True,
            ):  # fmt: skip
                pairs = tuple(zip(tokens, values, strict=True))
                out.append(Token(token, logprob, pairs, token in model.end_token_ids))
    return tuple(out)

"""Replies of a server read again in this process, one text at a time, under anybody's sliders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from load.clients import PROFILES, SETTINGS, Reply

from steer.core.edit import Edit
from steer.model.profiles import use
from steer.model.sliders import Sliders
from steer.model.steered import SteeredModel
from steer.model.steering.low_rank import ForwardContext
from steer.serve.openai_json import token_bytes

Logprobs = np.ndarray[Any, np.dtype[np.float64]]
ENOUGH = 0.1
"""Nats a token by which two clients' sliders must differ on a reply to be distinguishable on it: several times what
rounding to bf16 makes of one."""


class Reader:
    """The model by itself."""

    def __init__(self, live: SteeredModel) -> None:
        self.live = live

    @cached_property
    def edits(self) -> list[Edit | None]:
        """What moves under each client's sliders."""
        out = []
        for setting in SETTINGS:
            sliders = Sliders(self.live, live=False)
            if isinstance(setting, str):
                use(sliders, PROFILES[setting])
            else:
                sliders.update(setting)
            out.append(sliders.current)
        return out

    @cached_property
    def _spelt(self) -> dict[bytes, int]:
        size = len(self.live.tokenizer)
        out = {token_bytes(self.live.tokenizer, token): token for token in range(size)}
        if len(out) != size:
            raise ValueError("expected a tokenizer that spells every token otherwise: replies have no ids")
        return out

    def ids(self, reply: Reply) -> list[int]:
        """A reply's tokens, without the one that ends it."""
        return [self._spelt[spelt] for spelt in reply.tokens]

    def logprobs(self, reply: Reply, client: int | None = None) -> Logprobs:
        """Those of its tokens `[tokens]` in nats, in one pass over all of it, under a client's sliders; without one
        under those of who asked."""
        prompt, ids = self.live.prompt_ids(reply.ask.chat), self.ids(reply)
        text = torch.tensor([prompt + ids], device=self.live.device)
        index = torch.arange(text.shape[1], device=self.live.device)[None] - (len(prompt) - 1)
        steering, edit = self.live.steering, self.edits[reply.ask.client if client is None else client]
        with (
            steering.lock,
            steering.applied([edit]),
            steering.passing(ForwardContext(index=index)),
            torch.inference_mode(),
        ):
            logits = self.live.hf(input_ids=text, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
            own = logits.float().log_softmax(-1).gather(1, text[0, -len(ids) :, None])
        return own.squeeze(1).double().cpu().numpy()

    def off(self, replies: Sequence[Reply]) -> Logprobs:
        """How far each logprob that the server gave is from the one under the sliders of who asked."""
        return np.concatenate([np.abs(self.logprobs(r) - r.logprobs) for r in replies])

    def is_whole(self, reply: Reply) -> bool:
        """Whether a reply has all its parts and says of itself what is so."""
        setting = SETTINGS[reply.ask.client]
        moved = {s.slider: s.amount for s in PROFILES[setting].sliders} if isinstance(setting, str) else setting
        length, stopped = len(reply.tokens), reply.ended == "stop"
        return (
            (stopped or (reply.ended == "length" and length == reply.ask.tokens))
            and length == len(reply.logprobs) > 0
            # The token that ends it is counted, but has no text and no logprob.
            and reply.usage == (len(self.live.prompt_ids(reply.ask.chat)), length + stopped)
            and self.live.text(self.ids(reply)) == reply.text
            and reply.sliders == moved
        )


@dataclass(frozen=True)
class ToldApart:
    """Over all pairs of a reply and another client's sliders."""

    differ: float
    """The share of pairs whose two logprobs of a token are ENOUGH apart, in the mean."""
    nearer: float
    """Of those, the share in which its own sliders are nearer to the logprobs that the server gave."""
    likelier: float
    """And in which the reply is likelier under its own."""

    @classmethod
    def of(cls, replies: Sequence[Reply], read: Sequence[Logprobs], shift: int = 0) -> ToldApart:
        """`read`: logprobs `[clients, tokens]` of each reply, under everybody's sliders. With a `shift` those of a
        later client are taken for its own: the control."""
        pairs, nearer, likelier = [], [], []
        for reply, under in zip(replies, read, strict=True):
            own = under[(reply.ask.client + shift) % len(under)]
            far = np.abs(under - reply.logprobs).mean(1)
            differ = np.abs(under - own).mean(1) >= ENOUGH
            pairs += [*differ]
            nearer += [*(np.abs(own - reply.logprobs).mean() < far[differ])]
            likelier += [*(own.mean() > under[differ].mean(1))]
        # One pair in each compares the sliders with themselves.
        return cls(float(np.sum(pairs) / (len(pairs) - len(read))), float(np.mean(nearer)), float(np.mean(likelier)))

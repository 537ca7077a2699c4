"""Sliders in requests of stock `vllm serve`: `vllm_xargs={"steering": json.dumps({"sliders": {"moralizing": -1}})}`.

The value is the JSON that `steer serve` takes as `steering`. The front end checks it, so that what cannot be done is
an error, and keys the prefix cache by it; the model runner looks it up again and applies it before every step.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from steer.core.edit import Edit
from steer.errors import SteerError, UnsupportedError, UsageError
from steer.model.steered import SteeredModel, describe
from steer.model.steering.low_rank import ForwardContext
from steer.serve.errors import ApiError
from steer.serve.requests import Steering as SteeringRequest
from steer.serve.server import load_profiles
from steer.serve.steering import LiveSettings
from steer.serve.vllm.keys import edit_key, timed
from steer.serve.vllm.taps import TapSteering, steering

FIELD = "steering"
"""The entry of `vllm_xargs`."""
PROFILES = "STEER_PROFILES"
"""The environment variable with a profile or a folder of them, which requests name."""


@lru_cache(maxsize=1)
def _described(place: str) -> SteeredModel:
    return describe(place)


@lru_cache(maxsize=1)
def _settings(place: str) -> LiveSettings:
    profiles = os.environ.get(PROFILES)
    return LiveSettings(_described(place), load_profiles([Path(profiles)] if profiles else []))


@lru_cache(maxsize=1024)
def edit_of(place: str, text: str) -> Edit | None:
    """The edit that a request asks for on the checkpoint at `place`; equal texts give the same edit.

    Errors: UsageError for what is not the JSON of `steering`, and for sliders that do not fit; UnsupportedError for
    sliders on thoughts or answers alone, which vLLM's runner does not distinguish.
    """
    try:
        setting = _settings(place).setting_for(None, SteeringRequest.model_validate_json(text))
    except ValidationError as e:
        raise UsageError(f'{FIELD}: expected JSON as in {{"sliders": {{"NAME": 0.5}}}}, found {text[:80]!r}') from e
    except ApiError as e:
        raise UsageError(str(e)) from e
    edit = None if setting is None else setting.sliders.current
    if edit is not None and any(m.when.part in ("thoughts", "answer") for m in edit.as_moves()):
        raise UnsupportedError(f"{FIELD}: expected parts text or reply, found thoughts or answer; use steer serve")
    return edit


def _check_pipeline(place: str, edit: Edit, ranks: int) -> None:
    """Raise UnsupportedError for sliders that need data of another rank of a pipeline."""
    found = None
    if any(m.when.gate is not None for m in edit.as_moves()):
        found = "a gate, whose site may be on another rank"
    elif any(w.norms for w in _described(place).anatomy.live_writers):
        found = "a model with norms behind its writers"
    if found is not None and ranks > 1:
        raise UnsupportedError(
            f"{FIELD}: expected one pipeline rank, found {ranks} and {found}; use tensor parallelism"
        )


def check_requests(processor: type) -> None:
    """Have vLLM's input processor refuse what cannot be done, and key the prefix cache by what steers."""
    from vllm.exceptions import VLLMValidationError

    process: Callable[..., Any] = processor.process_inputs  # type: ignore[attr-defined]

    @wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        text = (getattr(params, "extra_args", None) or {}).get(FIELD)
        try:
            edit = None if text is None else edit_of(self.model_config.model, str(text))
            if edit is not None:
                ranks = self.vllm_config.parallel_config.pipeline_parallel_size
                _check_pipeline(self.model_config.model, edit, ranks)
        except SteerError as e:
            raise VLLMValidationError(str(e), parameter="vllm_xargs") from e
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if edit is not None:
            key = secrets.token_hex() if timed(edit) else edit_key(edit)
            request.cache_salt = f"{request.cache_salt or ''} {key}"
        return request

    processor.process_inputs = process_inputs  # type: ignore[attr-defined]


def steer_steps(runner: type) -> None:
    """Have vLLM's model runner apply each request's sliders to its tokens in every step."""
    forward: Callable[..., Any] = runner._model_forward  # type: ignore[attr-defined]

    @wraps(forward)
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        requests = [self.requests[id] for id in batch.req_ids]
        texts = [(r.sampling_params.extra_args or {}).get(FIELD) if r.sampling_params else None for r in requests]
        if not any(texts):  # or the engine of steer serve, which applies its own
            return forward(self, *args, **kwargs)
        edits = [None if text is None else edit_of(self.model_config.model, str(text)) for text in texts]
        rows = list(dict.fromkeys(edits))
        ends = self.query_start_loc.np[: len(requests) + 1].tolist()
        read = batch.num_computed_tokens_cpu[: len(requests)].tolist()
        counts = torch.tensor([end - start for start, end in pairwise(ends)])
        taps: TapSteering = steering()
        with taps.alone(rows):
            row = torch.tensor([rows.index(edit) for edit in edits]).repeat_interleave(counts).to(self.device)
            context = ForwardContext(row=row if len(rows) > 1 else None, packed=True)
            if taps.timed:
                # Reply token 0 is written by the pass over the prompt's last token.
                starts = [n - (r.num_prompt_tokens - 1) for n, r in zip(read, requests, strict=True)]
                index = [torch.arange(s, s + n) for s, n in zip(starts, counts.tolist(), strict=True)]
                context.index = torch.cat(index)[None].to(self.device)
            with taps.passing(context), taps.step(ends[-1]):
                return forward(self, *args, **kwargs)

    runner._model_forward = model_forward  # type: ignore[attr-defined]

"""Pydantic models of the request bodies: OpenAI's fields, and fields that other front ends add.

FastAPI parses bodies with them before `steer.serve.replies` plans the request. Unknown fields are ignored, except in
the steering extension, where they are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from steer.core.sampler import MAX_BREAKERS
from steer.plain_text import without_surrogates
from steer.serve.limits import MAX_MESSAGES

MAX_CHOICES = 8
"""Choices (`n`) for one prompt."""
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_PROMPTS = 1000
MAX_TOKENS = 2**21
"""Tokens of a prompt that is given as token ids."""
MAX_BIASES = 2**19
"""Entries of `logit_bias`; no vocabulary is larger."""
MAX_SLIDERS = 64
MAX_NAME = 200
"""Characters of a slider's name."""
MAX_AMOUNT = 10_000.0
"""Largest absolute amount of a slider. Amount 1 is as strong as the model shows the trait itself; far larger amounts
overflow."""


def _aliased(*names: str) -> Any:
    """An optional field with several names; the first name that is present counts."""
    return Field(default=None, validation_alias=AliasChoices(*names))


def _number(token: Any) -> Any:
    """Convert a token id from text, as the keys of JSON objects are."""
    return int(token) if isinstance(token, str) and len(token) < 20 and token.isascii() and token.isdecimal() else token


def _check_count(sliders: Any) -> Any:
    """Refuse too many sliders before any of them is parsed."""
    if isinstance(sliders, dict) and len(sliders) > MAX_SLIDERS:
        raise ValueError(f"expected at most {MAX_SLIDERS} sliders, found {len(sliders)}")
    return sliders


def _at_most(length: int, least: int = 0) -> Any:
    """Length limits of a list. Parsing stops at the first mistake, because pydantic makes an object for every one."""
    return Field(min_length=least, max_length=length, fail_fast=True)


Text = Annotated[str, AfterValidator(without_surrogates)]


Amount = Annotated[float, Field(ge=-MAX_AMOUNT, le=MAX_AMOUNT, allow_inf_nan=False)]
Sliders = Annotated[dict[Annotated[str, Field(max_length=MAX_NAME)], Amount | None], BeforeValidator(_check_count)]


class _Strict(BaseModel):
    """Base of all bodies: no conversion between numbers and texts."""

    model_config = ConfigDict(strict=True)


class StreamOptions(_Strict):
    """Options of a streamed reply."""

    include_usage: bool | None = None


class Steering(_Strict):
    """The extension `steering` of a request. No other software defines it, so an unknown key is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid")

    profile: str | None = None
    """Name of one of the server's profiles; None for no profile."""
    sliders: Sliders | None = None
    """Amounts by name, applied on top of the profile's; null removes a slider of the profile."""


class Request(_Strict):
    """Fields that chats and completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Text], _at_most(MAX_STOPS)] | None = _aliased("stop", "stop_sequence", "stopping_strings")
    steering: Steering | None = None

    # The sampler, by its own field names
    max_new_tokens: int | None = _aliased("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = _aliased("typical_p", "typical")
    repetition_penalty: float | None = _aliased("repetition_penalty", "rep_pen", "repeat_penalty")
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = _aliased("dry_range", "dry_penalty_last_n")
    dry_sequence_breakers: Annotated[list[Text], _at_most(MAX_BREAKERS)] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: Annotated[list[tuple[int, float]], _at_most(MAX_BIASES)] | None = None
    temperature_last: bool | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """Drop fields that are null, so that another name of the same field can supply the value."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = [value] if isinstance(value, str) else value
        return [s for s in several if s != ""] if isinstance(several, list) else several

    @field_validator("dry_sequence_breakers", mode="before")
    @classmethod
    def _breakers(cls, value: Any) -> Any:
        """Accept a list, or a text that holds a JSON list, with or without its brackets."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        try:
            return json.loads(text if text.startswith("[") else f"[{text}]")
        except (ValueError, RecursionError):
            return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, value: Any) -> Any:
        """Accept OpenAI's mapping from token id, as text, to bias, or a list of pairs; false as a bias bans a token."""
        pairs = list(value.items()) if isinstance(value, dict) else value
        if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            return value
        return [(_number(token), -100.0 if bias is False else bias) for token, bias in pairs]


class Part(_Strict):
    """A part of a message."""

    type: str
    text: Text | None = None


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], _at_most(MAX_PROMPTS)] | None = None


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], _at_most(MAX_MESSAGES, 1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], _at_most(MAX_PROMPTS)]
        | Annotated[list[int], _at_most(MAX_TOKENS)]
        | Annotated[list[Annotated[list[int], _at_most(MAX_TOKENS)]], _at_most(MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class SteeringUpdate(_Strict):
    """The body of PUT /v1/steering."""

    model_config = ConfigDict(strict=True, extra="forbid")

    profile: str | None = None
    """If present, all amounts are replaced by this profile's; null removes all."""
    sliders: Sliders = {}
    """Amounts by name that are set in addition; null removes a slider."""

"""What clients send: OpenAI's fields, and those that other front ends add. Unknown fields are ignored."""

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

from steer.live.serve.limits import MAX_MESSAGES
from steer.values.sampler import MAX_BREAKERS

MAX_CHOICES = 8
"""Of one prompt."""
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_PROMPTS = 1000
MAX_TOKENS = 2**21
"""Of a prompt that is given as token ids."""
MAX_BIASES = 2**19
"""No vocabulary is larger."""
MAX_SLIDERS = 64
MAX_NAME = 200
"""Characters."""
MAX_AMOUNT = 10_000.0
"""Of a slider, either way: 1 is as strong as the model shows the trait itself, and numbers overflow far above."""


def _also(*names: str) -> Any:
    """An optional field that goes by several names; the first that is there counts."""
    return Field(default=None, validation_alias=AliasChoices(*names))


def _number(token: Any) -> Any:
    """A token id that is written as text, as the keys of JSON objects are."""
    return int(token) if isinstance(token, str) and len(token) < 20 and token.isascii() and token.isdecimal() else token


def _whole(text: str) -> str:
    """Clients that cut texts to a length cut characters in half; no tokenizer takes the halves."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _few(sliders: Any) -> Any:
    """Counted before any is looked at."""
    if isinstance(sliders, dict) and len(sliders) > MAX_SLIDERS:
        raise ValueError(f"expected at most {MAX_SLIDERS} sliders, found {len(sliders)}")
    return sliders


def _at_most(length: int, least: int = 0) -> Any:
    """Limits of a list. It is read no further than to its first mistake: each is told by an object of its own."""
    return Field(min_length=least, max_length=length, fail_fast=True)


Text = Annotated[str, AfterValidator(_whole)]


Amount = Annotated[float, Field(ge=-MAX_AMOUNT, le=MAX_AMOUNT, allow_inf_nan=False)]
Sliders = Annotated[dict[Annotated[str, Field(max_length=MAX_NAME)], Amount | None], BeforeValidator(_few)]


class _Strict(BaseModel):
    """Numbers are numbers and texts are texts."""

    model_config = ConfigDict(strict=True)


class StreamOptions(_Strict):
    """Of a streamed reply."""

    include_usage: bool | None = None


class Steering(_Strict):
    """The extension `steering` of a request. It is our own, so a key that is not known is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid")

    profile: str | None = None
    """One of the server's; None for none."""
    sliders: Sliders | None = None
    """Amounts by name, on top of the profile's; null takes one of the profile's away."""


class Request(_Strict):
    """What chats and completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Text], _at_most(MAX_STOPS)] | None = _also("stop", "stop_sequence", "stopping_strings")
    steering: Steering | None = None

    # The sampler, by its own field names
    max_new_tokens: int | None = _also("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = _also("typical_p", "typical")
    repetition_penalty: float | None = _also("repetition_penalty", "rep_pen", "repeat_penalty")
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = _also("dry_range", "dry_penalty_last_n")
    dry_sequence_breakers: Annotated[list[Text], _at_most(MAX_BREAKERS)] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: Annotated[list[tuple[int, float]], _at_most(MAX_BIASES)] | None = None
    temperature_last: bool | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """Null is not there: the field may be there by another name."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = [value] if isinstance(value, str) else value
        return [s for s in several if s != ""] if isinstance(several, list) else several

    @field_validator("dry_sequence_breakers", mode="before")
    @classmethod
    def _breakers(cls, value: Any) -> Any:
        """A list, or one as text: in JSON, or without its brackets."""
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
        """OpenAI's mapping from token ids as text, or pairs; false stands for a ban."""
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
    """Replaces all amounts by this profile's; null by none."""
    sliders: Sliders = {}
    """Amounts by name, beside those there are; null takes one away."""

"""The body of a request, and what it asks for: its prompts as token ids, and its sampler.

FastAPI parses bodies with the pydantic models: OpenAI's fields, and fields that other front ends add. Unknown fields
are ignored, except in the steering extension, where they are refused. `steer.serve.replies` calls the functions below
in a thread, before it submits jobs to the engine.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from steer.core.sampler import MAX_BREAKERS, ORDER, TEMPERATURE_LAST, Sampler
from steer.core.small_files import shown
from steer.errors import SteerError
from steer.model.chat_template import RESERVED
from steer.plain_text import without_surrogates
from steer.serve.errors import ApiError, invalid
from steer.serve.limits import MAX_MESSAGES, Limits

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

MAX_PROMPTS = 1000
"""Prompts of a completion, and parts of a message."""
MAX_TOKENS = 2**21
"""Tokens of a prompt that is given as token ids."""
MAX_BIASES = 2**19
"""Entries of `logit_bias`; no vocabulary is larger."""
MAX_OPTIONS = 32
"""Options of a chat template."""
MAX_SLIDERS = 64
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
SliderName = Annotated[str, Field(max_length=200)]
Sliders = Annotated[dict[SliderName, Amount | None], BeforeValidator(_check_count)]


class _Strict(BaseModel, strict=True):
    """Base of all bodies: numbers and texts are not converted into each other."""


class StreamOptions(_Strict):
    """Options of a streamed reply."""

    include_usage: bool | None = None


class Steering(_Strict, extra="forbid"):
    """The extension `steering` of a request, and the body of PUT /v1/steering.

    No other software defines it, so an unknown key is a mistake.
    """

    profile: str | None = None
    """Name of one of the server's profiles. Null, if it is set in a PUT, removes all amounts."""
    sliders: Sliders | None = None
    """Amounts by name, applied on top of the profile's, or in a PUT without a profile on top of the live ones; null
    removes a slider."""


class Request(_Strict):
    """Fields that chats and completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Text], _at_most(64)] | None = _aliased("stop", "stop_sequence", "stopping_strings")
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
    reasoning_content: Text | None = None
    """The thoughts of a past reply, for templates that write them."""

    @property
    def parts(self) -> list[Part]:
        """The content as a list of parts."""
        return self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], _at_most(MAX_MESSAGES, 1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=MAX_OPTIONS)] | None = None
    """The chat template's own options."""
    enable_thinking: bool | None = None
    """Short for this option of the template."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _options(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse names that are transformers' own, one of which would replace the template."""
        if reserved := RESERVED & (value or {}).keys():
            raise ValueError(f"expected options of the chat template, found {min(reserved)}, which no request sets")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The chat template's options."""
        short = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return short | (self.chat_template_kwargs or {})


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], _at_most(MAX_PROMPTS)]
        | Annotated[list[int], _at_most(MAX_TOKENS)]
        | Annotated[list[Annotated[list[int], _at_most(MAX_TOKENS)]], _at_most(MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids."""
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)


_FIELDS = tuple(f.name for f in fields(Sampler) if f.name in Request.model_fields)
_OFF = {"top_k": 0, "dry_range": 0}
"""Fields in which clients send -1 for "all tokens", and the value that means the same here."""


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues."""

    ids: tuple[int, ...]
    begun: int = 0
    """How many ids at its end are the beginning of the reply."""
    echo: str = ""
    """Text of the prompt to repeat at the start of the reply; empty unless `echo` was asked for."""
    opening: str | None = None
    """Of a chat: as in `ChatPrompt`, what the reply has of thoughts already. None: its thoughts stay in its text."""
    notes: tuple[str, ...] = ()
    """What was changed so that the chat template takes the chat."""


def check(request: ChatRequest | CompletionRequest, limits: Limits, context: int, longest: int) -> None:
    """Refuse a request that is too large, by counting only, or that asks for what the server does not do.

    `context`: most tokens of a prompt. `longest`: characters of the vocabulary's longest token. Errors: ApiError.
    """
    if isinstance(request, ChatRequest):
        param, prompts = "messages", 1
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs", "logprobs true beside it", "none")
        if len(request.messages) > limits.messages:
            found = f"{len(request.messages)}; leave out the oldest"
            raise invalid(param, f"at most {limits.messages}", found, "too_many_messages")
        characters = sum(len(part.text or "") for message in request.messages for part in message.parts)
        characters += sum(len(message.reasoning_content or "") for message in request.messages)
    else:
        param, prompts = "prompt", len(request.prompts)
        if request.suffix:
            raise invalid("suffix", "none, as gaps are not filled", "a text", "unsupported_value")
        if request.echo and request.logprobs is not None:
            raise invalid("echo", "no logprobs beside it, as a prompt's are not told", "both", "unsupported_value")
        ids = max((len(p) for p in request.prompts if isinstance(p, list)), default=0)
        if ids > context:
            raise invalid(param, f"at most {context} tokens", f"{ids}; shorten it", "context_length_exceeded")
        characters = max((len(p) for p in request.prompts if isinstance(p, str)), default=0)
    n = request.n or 1
    if n * prompts > limits.choices:
        raise invalid("n", f"at most {limits.choices} texts a request", f"{n} for each of {prompts} prompts")
    if characters > context * longest:
        expected = f"at most {context} tokens, which is {context * longest:,} characters of the longest"
        raise invalid(param, expected, f"{characters:,} characters; shorten it", "context_length_exceeded")


def prompts_of(model: SteeredModel, request: ChatRequest | CompletionRequest, context: int) -> list[Prompt]:
    """Return the texts to continue. Errors: ApiError, also for one that leaves no room in the context for a reply."""
    if isinstance(request, CompletionRequest):
        return completion_prompts(model, request, context)
    prompt = chat_prompt(model, request)
    _check_room(prompt, context, "messages")
    return [prompt]


def chat_prompt(model: SteeredModel, request: ChatRequest) -> Prompt:
    """Return a chat as a prompt, up to where the reply begins.

    If the last message is the assistant's, the reply continues it.
    Errors: ApiError for a chat that the template refuses.
    """
    chat = []
    for place, message in enumerate(request.messages):
        if other := [p.type for p in message.parts if p.type != "text" or p.text is None]:
            raise invalid(f"messages[{place}].content", "text", f"a part of type {shown(other[0])}")
        role = "system" if message.role == "developer" else message.role
        thoughts = {} if message.reasoning_content is None else {"reasoning_content": message.reasoning_content}
        chat.append({"role": role, "content": "".join(p.text or "" for p in message.parts), **thoughts})
    last = chat.pop() if chat[-1]["role"] == "assistant" else None
    if not chat:
        raise invalid("messages", "one that the assistant's last one replies to", "none", "chat_refused")
    try:
        prompt = model.prompt(chat, last["content"] if last else "", request.options)
    except SteerError as e:
        raise ApiError(400, str(e), param="messages", code="chat_refused") from e
    return Prompt(tuple(prompt.ids), prompt.begun, opening=prompt.opening, notes=prompt.notes)


def completion_prompts(model: SteeredModel, request: CompletionRequest, context: int) -> list[Prompt]:
    """Return the texts to complete, each with at most one BOS.

    Errors: ApiError for none, for one that leaves no room in the context, and for token ids that the model does not
    have.
    """
    if not request.prompts:
        raise invalid("prompt", "a text", "none")
    prompts = []
    for given in request.prompts:
        ids = _completion_ids(model, given)
        text = given if isinstance(given, str) else model.tokenizer.decode(ids, skip_special_tokens=True)
        prompts.append(Prompt(tuple(ids), echo=text if request.echo else ""))
        _check_room(prompts[-1], context, "prompt")  # checked before the next text is tokenised, which may take seconds
    return prompts


def sampler_of(request: Request, base: Sampler, limits: Limits, vocabulary: int) -> Sampler:
    """Return `base` with the fields that the request sets, and a random seed if it sets none.

    Errors: ApiError naming the field.
    """
    if unknown := [token for token, _ in request.logit_bias or () if token >= vocabulary]:
        raise invalid("logit_bias", f"token ids below {vocabulary}, the size of the vocabulary", shown(unknown[0]))
    given = {name: value for name in _FIELDS if (value := getattr(request, name)) is not None}
    given |= {name: off for name, off in _OFF.items() if given.get(name) == -1}
    if request.temperature_last is not None and request.temperature_last != base.temperature_last:
        given["order"] = TEMPERATURE_LAST if request.temperature_last else ORDER
    # Clients send a seed below 0 for "any".
    if given.get("seed", -1) < 0:
        given["seed"] = secrets.randbelow(2**31)
    wanted = given.get("max_new_tokens")
    if wanted is not None and limits.tokens is not None and wanted > limits.tokens:
        raise invalid("max_tokens", f"at most {limits.tokens}", shown(wanted))
    try:
        sampler = replace(base, **given)
    except SteerError as e:
        field, _, says = str(e).partition(":")
        field = "max_tokens" if field == "max_new_tokens" else field
        raise ApiError(400, f"{field}:{says}", param=field, code="invalid_value") from e
    return replace(sampler, max_new_tokens=min(sampler.max_new_tokens, limits.tokens or sampler.max_new_tokens))


def _check_room(prompt: Prompt, context: int, param: str) -> None:
    if len(prompt.ids) >= context:
        expected = f"at most {context - 1} tokens, as the context is {context} with the reply in it"
        raise invalid(param, expected, f"{len(prompt.ids)}; shorten it", "context_length_exceeded")


def _completion_ids(model: SteeredModel, given: str | list[int]) -> list[int]:
    bos, bos_id = model.tokenizer.bos_token, model.tokenizer.bos_token_id
    if isinstance(given, str):
        try:
            # Front ends that apply the chat template themselves send a text that begins with the BOS.
            ids = model.encode(given, frame=not (bos and given.startswith(bos)))
        except SteerError as e:
            raise ApiError(400, str(e), param="prompt", code="invalid_value") from e
    else:
        ids = given
        if unknown := [i for i in ids if not 0 <= i < model.vocabulary]:
            raise invalid("prompt", f"token ids from 0, below {model.vocabulary}", shown(unknown[0]))
    if not ids and bos_id is None:
        raise invalid("prompt", "a text", "an empty one")
    return ids or [bos_id]

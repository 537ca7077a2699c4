"""The body of a request, and its meaning: its prompts as token ids, and its sampler.

FastAPI parses bodies with the pydantic models: OpenAI's fields, and fields that other front ends add. Unknown fields
are ignored, except in the steering extension, where they are refused; a reply warns of those in NOT_HONOURED.
`steer.serve.replies` calls the functions below in a thread, before it submits jobs to the engine.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
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
from steer.finding.new_slider import LONGEST
from steer.model.chat_template import RESERVED
from steer.plain_text import without_surrogates
from steer.serve.engine import Token
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
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal"))
MAX_OPTIONS = 32
"""Options of a chat template."""
MAX_TOOLS = 128
"""Tools of a request."""
MAX_TEXT = 1000
"""Characters of a stop string, with which text that may begin one is compared at every token, and of a model's name."""
MAX_SLIDERS = 64
MAX_AMOUNT = 10_000.0
"""Largest absolute amount of a slider. Amount 1 is as strong as the model shows the trait itself; far larger amounts
overflow."""


def _aliased(*names: str) -> Any:
    """An optional field with several names; the first name that is present counts."""
    return Field(default=None, validation_alias=AliasChoices(*names))


def _read_number(value: Any) -> Any:
    """Convert a number that is written as text, and a whole number that is written with a decimal point.

    Clients send "24" from text boxes, and 1024.0 from languages without whole numbers. Other values stay as they are.
    """
    number = value
    if isinstance(value, str) and len(value) <= 40:
        with suppress(ValueError, RecursionError):
            number = json.loads(value)
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**63:
        return int(number)
    return number if type(number) in (int, float) else value


def _read_flag(value: Any) -> Any:
    """Convert a truth value that is written as text or as 0 or 1."""
    written = str(value).strip().lower() if isinstance(value, str | int | float) and len(str(value)) <= 40 else ""
    return {"true": True, "1": True, "false": False, "0": False}.get(written, value)


def _check_count(sliders: Any) -> Any:
    """Refuse too many sliders before any of them is parsed."""
    if isinstance(sliders, dict) and len(sliders) > MAX_SLIDERS:
        raise ValueError(f"expected at most {MAX_SLIDERS} sliders, found {len(sliders)}")
    return sliders


def _at_most(length: int, least: int = 0) -> Any:
    """Length limits of a list. Parsing stops at the first mistake, because pydantic makes an object for every one."""
    return Field(min_length=least, max_length=length, fail_fast=True)


Whole = Annotated[int, BeforeValidator(_read_number, json_schema_input_type=int | float | str)]
Number = Annotated[float, BeforeValidator(_read_number, json_schema_input_type=float | str)]
Flag = Annotated[bool, BeforeValidator(_read_flag, json_schema_input_type=bool | int | str)]
Text = Annotated[str, AfterValidator(without_surrogates)]
Amount = Annotated[float, Field(ge=-MAX_AMOUNT, le=MAX_AMOUNT, allow_inf_nan=False)]
StopText = Annotated[Text, Field(max_length=MAX_TEXT)]
SliderName = Annotated[str, Field(max_length=200)]
Sliders = Annotated[dict[SliderName, Amount | None], BeforeValidator(_check_count)]


class _Strict(BaseModel, strict=True):
    """Base of all bodies: nothing is converted that the types above do not name."""


class StreamOptions(_Strict):
    """Options of a streamed reply."""

    include_usage: Flag | None = None


class Steering(_Strict, extra="forbid"):
    """The extension `steering` of a request, and the body of PUT /v1/steering.

    No other software defines it, so an unknown key is a mistake.
    """

    profile: str | None = None
    """Name of one of the server's profiles. Null, if it is set in a PUT, removes all amounts."""
    sliders: Sliders | None = None
    """Amounts by name, applied on top of the profile's, or in a PUT without a profile on top of the live ones; null
    removes a slider."""


class NewSlider(_Strict, extra="forbid"):
    """The body of POST /v1/steering/sliders."""

    sentence: Annotated[Text, Field(max_length=LONGEST)]
    """The system prompt at the high end of the slider: it says what the model is to be."""
    opposite: Annotated[Text, Field(max_length=LONGEST)] | None = None
    """The system prompt at the low end; without it, the model gets none there."""
    name: Text | None = None
    """The slider's name; by default it is made of the sentence."""


class Request(_Strict, extra="allow"):
    """Fields that chats and completions have in common. Others are kept for `not_honoured`."""

    model: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    """The reply has it too, in every chunk of a stream."""
    n: Annotated[Whole, Field(ge=1, le=8)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[StopText], _at_most(64)] | None = _aliased("stop", "stop_sequence", "stopping_strings")
    steering: Steering | None = None

    # The sampler, by its own field names
    max_new_tokens: Whole | None = _aliased("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict")
    temperature: Number | None = None
    top_k: Whole | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = _aliased("typical_p", "typical")
    repetition_penalty: Number | None = _aliased("repetition_penalty", "rep_pen", "repeat_penalty")
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    dry_multiplier: Number | None = None
    dry_base: Number | None = None
    dry_allowed_length: Whole | None = None
    dry_range: Whole | None = _aliased("dry_range", "dry_penalty_last_n")
    dry_sequence_breakers: Annotated[list[Text], _at_most(MAX_BREAKERS)] | None = None
    xtc_probability: Number | None = None
    xtc_threshold: Number | None = None
    logit_bias: Annotated[list[tuple[Whole, Number]], _at_most(MAX_BIASES)] | None = None
    temperature_last: Flag | None = None
    seed: Whole | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """Drop fields that are null, so that another name of the same field can supply the value, and names that are no
        Unicode, which pydantic refuses."""
        return {k: v for k, v in data.items() if v is not None and k.isprintable()} if isinstance(data, dict) else data

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
        return [(token, -100.0 if bias is False else bias) for token, bias in pairs]


class Part(_Strict):
    """A part of a message."""

    type: str = "text"
    text: Text | None = _aliased("text", "refusal")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data


class CalledFunction(_Strict):
    """The function of a tool call, and its arguments: JSON as text, as OpenAI has it, or an object."""

    name: Text = ""
    arguments: Text | dict[str, Any] = ""

    @property
    def parsed(self) -> Any:
        """The arguments as an object, which chat templates expect; text that is no JSON stays text."""
        if isinstance(self.arguments, str):
            with suppress(ValueError, RecursionError):
                return json.loads(self.arguments)
        return self.arguments

    def __str__(self) -> str:
        given = self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)
        return f"Called {self.name}({given})"


class ToolCall(_Strict):
    """A call that an earlier reply made."""

    id: str | None = None
    function: CalledFunction


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], _at_most(MAX_PROMPTS)] | None = None
    name: Text | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], _at_most(MAX_PROMPTS)] | None = None
    function_call: CalledFunction | None = None
    reasoning_content: Text | None = None
    """The thoughts of a past reply, for templates that write them."""

    @property
    def parts(self) -> list[Part]:
        """The content as a list of parts."""
        return self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]

    @property
    def text(self) -> str:
        """The content as a text."""
        return "\n".join(p.text or "" for p in self.parts)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of the message, also one in the form that OpenAI had before tools."""
        return [*(self.tool_calls or ()), *([ToolCall(function=self.function_call)] if self.function_call else ())]


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], _at_most(MAX_MESSAGES, 1)]
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=MAX_OPTIONS)] | None = None
    """The chat template's own options."""
    enable_thinking: Flag | None = None
    """Short for this option of the template."""
    tools: Annotated[list[dict[str, JsonValue]], _at_most(MAX_TOOLS)] | None = None
    """Functions that the model may call, for templates that take them."""
    functions: Annotated[list[dict[str, JsonValue]], _at_most(MAX_TOOLS)] | None = None
    """Tools in the form that OpenAI had before `tools`."""
    tool_choice: JsonValue = _aliased("tool_choice", "function_call")
    """`none`, `auto`, `required`, or the one function that may be called."""

    @field_validator("messages", mode="before")
    @classmethod
    def _few(cls, messages: Any) -> Any:
        """Refuse too many parts and calls before an object is made of each, which takes seconds for a million."""
        given = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
        lists = [m.get(name) for m in given for name in ("content", "tool_calls")]
        count = sum(len(value) for value in lists if isinstance(value, list))
        if count > MAX_MESSAGES:
            raise ValueError(f"expected at most {MAX_MESSAGES} parts and tool calls in all, found {count}")
        return messages

    @field_validator("chat_template_kwargs")
    @classmethod
    def _options(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse names that are transformers' own, one of which would replace the template."""
        if reserved := RESERVED & (value or {}).keys():
            raise ValueError(f"expected options of the chat template, found {min(reserved)}, which no request sets")
        return value

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call. Errors: ApiError if the request chooses one that it does not have."""
        tools = [*(self.tools or ()), *({"type": "function", "function": f} for f in self.functions or ())]
        if self.tool_choice == "none" or not isinstance(self.tool_choice, dict):
            return [] if self.tool_choice == "none" else tools

        def name_of(tool: dict[str, Any]) -> Any:
            function = tool.get("function", tool)
            return function.get("name") if isinstance(function, dict) else None

        chosen = [tool for tool in tools if name_of(tool) == name_of(self.tool_choice)]
        if tools and not chosen:
            raise invalid("tool_choice", "the name of one of the tools", shown(name_of(self.tool_choice)))
        return chosen

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
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: Flag | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids."""
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)


_FIELDS = tuple(f.name for f in fields(Sampler) if f.name in Request.model_fields)
_SAME: dict[tuple[str, float], float] = {
    ("top_k", -1): 0,
    ("dry_range", -1): 0,
    ("top_p", 0): 1e-9,
    ("typical_p", 0): 1e-9,
    ("repetition_penalty", 0): 1,
}
"""Values that clients send, as -1 for "all tokens" and a top_p of 0 for the likeliest one, and the values with this
meaning here."""
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    # The form of the reply
    **dict.fromkeys(("tools", "functions", "grammar", "grammar_string", "json_schema", "structured_outputs"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "audio"), ()),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    # Its words and its length
    **dict.fromkeys(("banned_strings", "banned_tokens", "custom_token_bans", "negative_prompt"), ()),
    **dict.fromkeys(("ignore_eos", "ban_eos_token", "min_tokens", "min_length"), ()),
    # How tokens are drawn
    **dict.fromkeys(("mirostat", "mirostat_mode", "top_a", "smoothing_factor", "dynatemp_range", "penalty_alpha"), ()),
    **dict.fromkeys(("no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), ()),
    **dict.fromkeys(("nsigma", "top_n_sigma"), (-1,)),
    **dict.fromkeys(("tfs", "tfs_z", "guidance_scale", "encoder_repetition_penalty", "num_beams"), (1,)),
}
"""Fields of other servers that change a reply and that this server does not have -> values that change nothing, besides
null, 0, false and empty values."""


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues."""

    ids: tuple[int, ...]
    begun: int = 0
    """How many ids at its end are the beginning of the reply."""
    echo: str = ""
    """Text of the prompt to repeat at the start of the reply; empty unless `echo` was asked for."""
    scored: tuple[Token, ...] = ()
    """The prompt's tokens but the first, with their log-probabilities, if these are echoed too."""
    opening: str | None = None
    """For a chat, the thoughts that the prompt opens, as in `ChatPrompt`. None: thoughts stay in the reply's text."""
    notes: tuple[str, ...] = ()
    """What was changed so that the chat template takes the chat."""


def check(
    request: ChatRequest | CompletionRequest, limits: Limits, context: int, longest: int, tools: bool = False
) -> None:
    """Refuse a request that is too large, by counting only, or that asks for something the server does not do.

    `context`: most tokens of a prompt. `longest`: characters of the vocabulary's longest token. `tools`: whether the
    chat template writes tools. Errors: ApiError.
    """
    if isinstance(request, ChatRequest):
        param, prompts = "messages", 1
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs", "logprobs true beside it", "none")
        if len(request.messages) > limits.messages:
            found = f"{len(request.messages)}; leave out the oldest"
            raise invalid(param, f"at most {limits.messages}", found, "too_many_messages")
        characters = sum(len(m.text) + sum(len(str(call.function)) for call in m.calls) for m in request.messages)
        characters += sum(len(message.reasoning_content or "") for message in request.messages)
        characters += len(json.dumps(request.offered)) if tools else 0
    else:
        param, prompts = "prompt", len(request.prompts)
        if request.suffix:
            raise invalid("suffix", "none, as gaps are not filled", "a text", "unsupported_value")
        if request.echo and request.max_new_tokens == 0:  # which elsewhere means that none is set
            raise invalid("max_tokens", "at least 1 beside echo", "0; ask for 1 and leave its token out")
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
    knows_tools, called = _knows_tools(model), {}
    chat: list[dict[str, Any]] = []
    for place, message in enumerate(request.messages):
        if other := [p.type for p in message.parts if p.type not in _TEXT_PARTS or p.text is None]:
            raise invalid(f"messages[{place}].content", "text", f"a part of type {shown(other[0])}")
        called |= {call.id: call.function.name for call in message.calls}
        name = message.name or called.get(message.tool_call_id, "tool")
        turn = _with_tools(message, name) if knows_tools else _without_tools(message, name)
        thoughts = {} if message.reasoning_content is None else {"reasoning_content": message.reasoning_content}
        chat.append(turn | thoughts)
    last = chat.pop() if chat[-1]["role"] == "assistant" else None
    if not chat:
        raise invalid("messages", "one that the assistant's last one replies to", "none", "chat_refused")
    try:
        tools = {"tools": request.offered} if request.offered and takes_tools(model) else {}
        prompt = model.prompt(chat, str(last["content"] or "") if last else "", request.options | tools)
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


def warnings_of(model: SteeredModel, request: ChatRequest | CompletionRequest) -> list[str]:
    """Return a line for each thing that a request asks for and does not get."""
    extra = request.model_extra or {}
    fields = [name for name, neutral in NOT_HONOURED.items() if extra.get(name) and extra[name] not in neutral]
    offered = isinstance(request, ChatRequest) and bool(request.offered)
    if offered and not takes_tools(model):
        fields = [*(name for name in ("tools", "functions") if getattr(request, name)), *fields]
    lines = [f"{name}: this server does not have it, the reply is written without it" for name in fields]
    if isinstance(request, ChatRequest) and offered and takes_tools(model):
        lines.append("tools: they are in the prompt; a call that the model writes stays in the text of the reply")
        if request.tool_choice not in (None, "auto"):
            lines.append("tool_choice: the chat template has the tools that it leaves, and the model may call none")
    vocabulary = len(model.tokenizer)
    if foreign := [token for token, _ in request.logit_bias or () if token >= vocabulary]:
        found = f"{len(foreign)} beyond it, as {shown(foreign[0])}; they are left out"
        lines.append(f"logit_bias: expected token ids of this model's vocabulary of {vocabulary}, found {found}")
    if isinstance(request, ChatRequest) and not _knows_tools(model):
        places = [i for i, m in enumerate(request.messages) if m.calls or m.role in ("tool", "function")]
        if places:
            found = ", ".join(f"messages[{i}]" for i in places[:5]) + (" and more" if places[5:] else "")
            lines.append(f"{found}: the chat template has no tools, so calls and results are written as plain text")
    return lines


def sampler_of(request: Request, base: Sampler, limits: Limits, vocabulary: int, context: int) -> Sampler:
    """Return `base` with the fields that the request sets, and a random seed if it sets none.

    Biases of token ids outside the vocabulary are left out. `context`: as many tokens may be written if the request
    asks for -1. Errors: ApiError naming the field.
    """
    given = {name: value for name in _FIELDS if (value := getattr(request, name)) is not None}
    given |= {name: same for (name, value), same in _SAME.items() if given.get(name) == value}
    if "logit_bias" in given:
        given["logit_bias"] = [(token, bias) for token, bias in given["logit_bias"] if token < vocabulary]
    # Clients send -1 for "as many as there is room for", and 0 if nothing is set.
    if given.get("max_new_tokens", 1) <= 0 and given.pop("max_new_tokens") < 0:
        given["max_new_tokens"] = limits.tokens or context
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


def _knows_tools(model: SteeredModel) -> bool:
    """Return whether the chat template has a form for tool calls."""
    return "tool_calls" in str(model.tokenizer.chat_template)


def takes_tools(model: SteeredModel) -> bool:
    """Return whether the chat template writes the tools that a model may call."""
    return bool(model.tokenizer.chat_template) and model.template.reads("tools")


def _with_tools(message: Message, name: str) -> dict[str, Any]:
    """Return a message in the form that chat templates with tools expect. `name`: the function that a tool ran."""
    if message.role in ("tool", "function"):
        return {"role": "tool", "name": name, "content": message.text, "tool_call_id": message.tool_call_id}
    out = _without_tools(message.model_copy(update={"tool_calls": None, "function_call": None}), name)
    if calls := message.calls:
        functions = [{"name": c.function.name, "arguments": c.function.parsed} for c in calls]
        out["tool_calls"] = [
            {"type": "function", "id": c.id, "function": f} for c, f in zip(calls, functions, strict=True)
        ]
    return out


def _without_tools(message: Message, name: str) -> dict[str, Any]:
    """Return a message with its tool calls, or the result of one, as plain text."""
    if message.role in ("tool", "function"):
        return {"role": "user", "content": f"{name} returned: {message.text}"}
    role = "system" if message.role == "developer" else message.role
    texts = [message.text] if message.text or not message.calls else []
    return {"role": role, "content": "\n".join([*texts, *(str(call.function) for call in message.calls)])}


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

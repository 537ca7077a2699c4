"""From a parsed request to its prompt as token ids and its sampler, checked against the server's limits.

`steer.serve.replies` calls these functions in a thread, before it submits jobs to the engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from steer.core.sampler import ORDER, TEMPERATURE_LAST, Sampler
from steer.core.small_files import shown
from steer.errors import SteerError
from steer.serve.errors import ApiError, invalid
from steer.serve.limits import Limits
from steer.serve.schemas import ChatRequest, CompletionRequest, Message, Request

if TYPE_CHECKING:
    from steer.model.steered import SteeredModel

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


def check_size(request: ChatRequest | CompletionRequest, limits: Limits, context: int, longest: int) -> None:
    """Refuse a request that is too large, by counting only, before anything is tokenised.

    `context`: most tokens of a prompt. `longest`: characters of the vocabulary's longest token. Errors: ApiError.
    """
    if isinstance(request, ChatRequest):
        if len(request.messages) > limits.messages:
            found = f"{len(request.messages)}; leave out the oldest"
            raise invalid("messages", f"at most {limits.messages}", found, "too_many_messages")
        param, texts, sizes = "messages", 1, [sum(map(_length, request.messages))]
    else:
        given = request.prompt
        several = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
        param, texts = "prompt", len(several)
        sizes = [len(p) for p in several if isinstance(p, str)]
        ids = max((len(p) for p in several if isinstance(p, list)), default=0)
        if ids > context:
            raise invalid(param, f"at most {context} tokens", f"{ids}; shorten it", "context_length_exceeded")
    n = request.n or 1
    if n * texts > limits.choices:
        raise invalid("n", f"at most {limits.choices} texts a request", f"{n} for each of {texts} prompts")
    if max(sizes, default=0) > context * longest:
        expected = f"at most {context} tokens, which is {context * longest:,} characters of the longest"
        raise invalid(param, expected, f"{max(sizes):,} characters; shorten it", "context_length_exceeded")


def chat_prompt(model: SteeredModel, request: ChatRequest) -> Prompt:
    """Return a chat as a prompt, up to where the reply begins.

    If the last message is the assistant's, the reply continues it.
    Errors: ApiError for a chat that the template refuses.
    """
    chat = [{"role": _role(m), "content": _content(m, i)} for i, m in enumerate(request.messages)]
    last = chat.pop() if chat[-1]["role"] == "assistant" else None
    if not chat:
        raise invalid("messages", "one that the assistant's last one replies to", "none", "chat_refused")
    try:
        ids = model.prompt_ids(chat)
        begun = model.encode(last["content"]) if last else []
    except SteerError as e:
        raise ApiError(400, str(e), param="messages", code="chat_refused") from e
    return Prompt((*ids, *begun), len(begun))


def completion_prompts(model: SteeredModel, request: CompletionRequest, context: int) -> list[Prompt]:
    """Return the texts to complete, each with at most one BOS.

    Errors: ApiError for none, for one that leaves no room in the context, and for token ids that the model does not
    have.
    """
    given = request.prompt
    several: Sequence[str] | Sequence[list[int]]
    if isinstance(given, str):
        several = [given]
    elif given and isinstance(given[0], int):
        several = [given]  # pyright: ignore[reportAssignmentType]
    else:
        several = given  # pyright: ignore[reportAssignmentType]
    if not several:
        raise invalid("prompt", "a text", "none")
    prompts = []
    for text in several:
        prompts.append(_completion_prompt(model, text, bool(request.echo)))
        room_for(prompts[-1], context, "prompt")  # checked before the next text is tokenised, which may take seconds
    return prompts


def sampler_of(request: Request, base: Sampler, limits: Limits, vocabulary: int) -> Sampler:
    """Return `base` with the fields that the request sets, and a random seed if it sets none.

    Errors: ApiError naming the field.
    """
    unknown = [token for token, _ in request.logit_bias or () if token >= vocabulary]
    if unknown:
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


def room_for(prompt: Prompt, context: int, param: str) -> int:
    """Return how many tokens the context leaves for a reply. Errors: ApiError if it leaves none."""
    room = context - len(prompt.ids)
    if room < 1:
        expected = f"at most {context - 1} tokens, as the context is {context} with the reply in it"
        raise invalid(param, expected, f"{len(prompt.ids)}; shorten it", "context_length_exceeded")
    return room


def _length(message: Message) -> int:
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(p.text or "") for p in content)


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _content(message: Message, place: int) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    other = [p.type for p in message.content if p.type != "text" or p.text is None]
    if other:
        field = f"messages[{place}].content"
        raise invalid(field, "text", f"a part of type {shown(other[0])}")
    return "".join(p.text or "" for p in message.content)


def _completion_prompt(model: SteeredModel, text: str | list[int], echo: bool) -> Prompt:
    tokenizer = model.tokenizer
    if isinstance(text, str):
        # Front ends that apply the chat template themselves send a text that begins with the BOS.
        bos = tokenizer.bos_token
        try:
            ids = model.encode(text, frame=not (bos and text.startswith(bos)))
        except SteerError as e:
            raise ApiError(400, str(e), param="prompt", code="invalid_value") from e
    else:
        ids = text
        unknown = [i for i in ids if not 0 <= i < model.vocabulary]
        if unknown:
            raise invalid("prompt", f"token ids from 0, below {model.vocabulary}", shown(unknown[0]))
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise invalid("prompt", "a text", "an empty one")
    echoed = text if isinstance(text, str) else tokenizer.decode(ids, skip_special_tokens=True)
    return Prompt(tuple(ids), echo=echoed if echo else "")

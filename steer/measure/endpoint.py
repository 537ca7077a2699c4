"""A reader behind an OpenAI-compatible server: ours, vLLM's, llama.cpp's.

The server is sent token ids, so that it scores the same tokens as a reader in this process; the tokenizer and the chat
template are those of a checkpoint on this machine, whose weights are not loaded. Without one the server can be asked
for replies alone. Before anything else it is checked that the server does not lie about log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import numpy as np
import openai

from steer.checkpoint.chat_templates import chosen_template
from steer.checkpoint.fetch import read_tokenizer
from steer.core.thoughts import THINK, split_thoughts
from steer.errors import SteerError, UnreachableError, UnsupportedError, UsageError
from steer.files import one_line
from steer.measure.probes.probe import TEMPERATURE, Ability, Chat, LogProbs, Passage
from steer.measure.readers import FALLBACK, PassageTokens, as_chat, first_token, passage_tokens
from steer.model.chat_template import ChatTemplate, marks_of
from steer.model.loaded import WITHOUT_THOUGHTS
from steer.model.tokens import ids_of
from steer.progress import Advance

LONGEST = 86400.0
"""Most seconds that a server may take for an answer: a day."""
TOGETHER = 8
"""Requests that are sent at the same time."""
CONTEXT = 4096
"""Tokens that a server is taken to read where neither it nor the checkpoint says."""
CHECK = "The old lighthouse keeper walked down to the harbour and bought a loaf of bread."
"""What a server is asked to score first: ASCII, so that tokens are whole characters."""
SAME = 0.1
"""Most nats by which a server's two answers may differ: batches of bf16 round differently."""
Way = Literal["echo", "prompt_logprobs"]
"""How a server gives log-probabilities of a given text: OpenAI's `echo` beside `logprobs`, or vLLM's own field."""


def client_of(url: str, api_key: str | None, timeout: float = 120.0) -> openai.OpenAI:
    """Return a client for the server at an address without /v1. `timeout`: seconds for one answer.

    Errors: SteerError for a text that is no address.
    """
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("neither http:// nor https:// before it")
        return openai.OpenAI(
            base_url=f"{url}/v1", api_key=api_key or "none", timeout=openai.Timeout(timeout, connect=5.0)
        )
    except (openai.OpenAIError, ValueError) as e:
        raise SteerError(f"{url}: expected the address of a server, found {one_line(e)}; give http://HOST:PORT") from e


@contextmanager
def answer_errors(url: str) -> Iterator[None]:
    """Replace what the openai client raises, and what our code raises at an answer that the client did not check, by
    errors of one line that name the server.

    Errors: UnreachableError if it does not answer or is busy; the same request may succeed later. UsageError for text
    that cannot be sent. SteerError, with the server's own message, if it refuses; and for an answer of another shape.
    """
    try:
        yield
    except openai.APIStatusError as e:
        kind = UnreachableError if e.status_code >= 500 or e.status_code == 429 else SteerError
        found = e.body.get("message") if isinstance(e.body, dict) else e.body
        raise kind(f"{url}: {one_line(str(found or e.message))}") from e
    except openai.APIConnectionError as e:  # a timeout is one
        why = one_line(str(e.__cause__ or e))
        raise UnreachableError(f"{url}: no server answers ({why}); start it, then do the same again") from e
    except UnicodeEncodeError as e:  # in the request, so the user's text or key is wrong
        what = "a key in ASCII" if e.encoding == "ascii" else "text that is Unicode, in the messages and names sent"
        raise UsageError(f"{url}: expected {what}, found {e.object[e.start]!r}; convert it to UTF-8") from e
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
        raise SteerError(
            f"{url}: expected an OpenAI-compatible server, found one that sends {one_line(e)}; check the address"
        ) from e


class EndpointReader:
    """A model behind a server. Errors: UnreachableError of one line that names the address."""

    dtype: str | None = None
    """The server does not say."""

    def __init__(
        self,
        url: str,
        name: str = "",
        *,
        tokenizer: Any = None,
        label: str = "",
        api_key: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        """`url`: the address, with or without /v1. `name`: one of its models, by default the first. `tokenizer`: of the
        same model; without it no text can be scored. `label`: the arm's name. `timeout`: seconds for one answer.

        Errors: UsageError for an invalid timeout, SteerError for an invalid address, UnreachableError if nothing
        answers.
        """
        if not 0 < timeout <= LONGEST:  # nan neither
            raise UsageError(f"timeout: expected seconds above 0 and at most {LONGEST:g}, found {timeout:g}; mend it")
        self.url, self.notes = url.rstrip("/").removesuffix("/v1"), list[str]()
        self._client = client_of(self.url, api_key, timeout)
        with answer_errors(self.url):
            models = list(self._client.models.list())
        found = next((m for m in models if m.id == name), models[0] if models and not name else None)
        if found is None:
            known = ", ".join(m.id for m in models) or "none"
            raise SteerError(f"{self.url}: expected a model {name or 'of any name'}, found {known}; see --model-name")
        self._model, self.name = found.id, label or found.id
        self._tokenizer, self._prompt, self.tokens = (
            tokenizer,
            lru_cache(4096)(self._render),
            lru_cache(16384)(self._cut),
        )
        limits = [getattr(found, "max_model_len", None), getattr(tokenizer, "model_max_length", None)]
        self.context = int(min((n for n in limits if isinstance(n, int) and n < 1 << 24), default=CONTEXT))
        self._way: Way | None = None if tokenizer is None else self._honest_way()
        if tokenizer is None:
            self.notes.append("no text can be scored: name the checkpoint too, whose tokenizer is needed for that")
        self.abilities: frozenset[Ability] = frozenset(("replies", *(("logprobs",) if self._way else ())))

    def length(self, passage: Passage) -> int:
        """Return how many tokens a passage takes; without a tokenizer as many as it has characters."""
        if self._tokenizer is None:
            return len(passage.begun + passage.text) + sum(len(text) + 16 for _, text in passage.chat)
        return len(self.tokens(passage).ids)

    def logprobs(self, passages: Sequence[Passage], advance: Advance | None = None) -> list[LogProbs]:
        """Return the log-probability of each token of each passage's `text`."""
        if self._way is None:
            raise UnsupportedError(f"{self.url}: expected log-probabilities of a given text, found none")
        rows = [self.tokens(p) for p in passages]
        return self._each(partial(self._score, self._way), rows, advance)

    def replies(
        self,
        chats: Sequence[Chat],
        *,
        tokens: int,
        seeds: Sequence[int],
        advance: Advance | None = None,
    ) -> list[str]:
        """Return a reply of at most `tokens` tokens to each chat, without thoughts, drawn by temperature alone."""
        marks = THINK if self._tokenizer is None else marks_of(self._tokenizer)

        def ask(chat_and_seed: tuple[Chat, int]) -> str:
            chat, seed = chat_and_seed
            made = self._client.chat.completions.create(
                model=self._model, messages=cast(Any, as_chat(chat)), max_tokens=tokens, seed=seed,
                temperature=TEMPERATURE, top_p=1.0, extra_body=_PLAIN,
            )  # fmt: skip
            return split_thoughts(made.choices[0].message.content or "", marks)[1].strip()

        return self._each(ask, list(zip(chats, seeds, strict=True)), advance)

    def divergences(self, pairs: Sequence[tuple[Passage, Passage]], advance: Advance | None = None) -> list[LogProbs]:
        """No server gives its whole distribution. Errors: UnsupportedError."""
        raise UnsupportedError(f"{self.url}: expected the distribution over all tokens, which no server gives")

    def _honest_way(self) -> Way | None:
        """Return a way by which the server scores a text and passes the check; a note says why there is none."""
        tokens, why = self.tokens(Passage(CHECK)), ""
        ways: tuple[Way, ...] = ("echo", "prompt_logprobs")
        for way in ways:
            try:
                with answer_errors(self.url):
                    first, again = (self._score(way, tokens) for _ in range(2))
            except UnreachableError:
                raise
            except SteerError as e:
                why = why or str(e)
                continue
            if len(np.unique(first)) == 1:
                why = f"{self.url}: every token has the log-probability {first[0]:.3g}"
            elif float(np.abs(first - again).max()) > SAME:
                why = f"{self.url}: one text scored twice differs by {float(np.abs(first - again).max()):.2g} nats"
            else:
                return way
        self.notes.append(f"no text can be scored: {why}")
        return None

    def _score(self, way: Way, tokens: PassageTokens) -> LogProbs:
        """Return the log-probabilities of a passage. Errors: UnsupportedError for an answer that cannot be true."""
        how: dict[str, Any] = {"echo": True, "logprobs": 1} if way == "echo" else {"extra_body": {"prompt_logprobs": 0}}
        body = {**_PLAIN, **how.pop("extra_body", {})}
        made = self._client.completions.create(
            model=self._model, prompt=list(tokens.ids), max_tokens=1, temperature=0.0, extra_body=body, **how
        ).choices[0]
        try:
            return _scored(_echoed(made, tokens, self._tokenizer) if way == "echo" else _by_id(made, tokens), tokens)
        except UnsupportedError as e:
            raise UnsupportedError(f"{self.url}: {e}; such a server can be asked for replies alone") from e

    def _each(self, ask: Callable[[Any], Any], what: Sequence[Any], advance: Advance | None) -> list[Any]:
        """Ask for each, several at a time, in order. After an error those that have not begun are not asked."""
        out: list[Any] = []
        with ThreadPoolExecutor(TOGETHER) as pool:
            asked = [pool.submit(ask, each) for each in what]
            try:
                for answer in asked:
                    with answer_errors(self.url):
                        out.append(answer.result())
                    if advance is not None:
                        advance(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return out

    def _cut(self, passage: Passage) -> PassageTokens:
        return passage_tokens(passage, self._prompt, self._encode, first_token(self._tokenizer))

    def _render(self, chat: Chat, reply: str) -> list[int]:
        text = ChatTemplate(self._tokenizer, self.name).render(as_chat(chat), reply, WITHOUT_THOUGHTS).text
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return ids_of(self._tokenizer, [text], len(self._tokenizer), self.name)[0]


@dataclass(eq=False)
class EndpointArm:
    """A model behind a server: an `evaluation.Arm`."""

    url: str
    model: str = ""
    """One of the server's; empty for the first."""
    place: str | None = None
    """The checkpoint whose tokenizer is used."""
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    control: bool = False

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.name = self.model or self.url.partition("://")[2] or self.url
        self.about = f"{self.model or 'the model'} at {self.url}"

    @property
    def key(self) -> dict[str, Any]:
        """See `evaluation.Arm`. The server does not say which weights it runs."""
        return {"url": self.url, "model": self.model, "tokenizer": self.place and self._tokenizer[0].chat_template}

    def reader(self) -> EndpointReader:
        tokenizer, notes = self._tokenizer
        made = EndpointReader(
            self.url, self.model, tokenizer=tokenizer, label=self.name, api_key=self.api_key, timeout=self.timeout
        )
        made.notes += notes
        return made

    @cached_property
    def _tokenizer(self) -> tuple[Any, list[str]]:
        return (None, []) if self.place is None else tokenizer_of(self.place)


_PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "add_special_tokens": False}
"""Settings that servers have besides OpenAI's, at the values that leave the model's own distribution."""


def tokenizer_of(place: str) -> tuple[Any, list[str]]:
    """Return a checkpoint's tokenizer with a chat template, and notes on it. Errors: SteerError if it has none."""
    tokenizer = read_tokenizer(place, place)
    if (text := chosen_template()) is not None:
        tokenizer.chat_template = text
    if tokenizer.chat_template:
        return tokenizer, []
    tokenizer.chat_template = chosen_template(FALLBACK)
    return tokenizer, [f"it has no chat template: chats are read with the template {FALLBACK!r}"]


def _scored(found: Sequence[float], tokens: PassageTokens) -> LogProbs:
    """Return those of the log-probabilities of all tokens that a passage's text has."""
    scored = np.array(found[tokens.start :], dtype=float)
    if len(found) != len(tokens.ids):
        raise UnsupportedError(f"expected log-probabilities of {len(tokens.ids)} tokens, found {len(found)}")
    if not (np.isfinite(scored).all() and (scored <= 1e-6).all()):
        raise UnsupportedError(f"expected log-probabilities of 0 at most, found {scored.max():.3g}")
    return scored


def _echoed(choice: Any, tokens: PassageTokens, tokenizer: Any) -> list[float]:
    """Return the log-probabilities of an echoed prompt, of which the first is nan."""
    given = choice.logprobs
    if given is None or not given.tokens or not given.token_logprobs:
        raise UnsupportedError("expected log-probabilities beside the echo, found none")
    count = len(tokens.ids)
    expected, found = tokenizer.decode(list(tokens.ids[1:])), "".join(given.tokens[1:count])
    if (
        expected.isascii()
        and not set(tokens.ids) & set(tokenizer.all_special_ids)
        and expected.strip() != found.strip()
    ):
        raise UnsupportedError(f"expected the tokens of the text that was sent, found {found[:40]!r}")
    return [math.nan, *(math.nan if x is None else x for x in given.token_logprobs[1:count])]


def _by_id(choice: Any, tokens: PassageTokens) -> list[float]:
    """Return the log-probabilities in vLLM's field, of which the first is nan."""
    given = (choice.model_extra or {}).get("prompt_logprobs")
    if not given:
        raise UnsupportedError("expected log-probabilities of the prompt, found none")
    return [math.nan, *(row[str(i)]["logprob"] for i, row in zip(tokens.ids[1:], given[1:], strict=True))]

"""Token ids: tokenising text and back, padding rows to one length, which tokens end a reply, how long a text may be.

Everything that turns text into input of a model goes through this file, in chats, in finding and in training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from torch import Tensor

from steer.checkpoint.anatomy import rope_parts
from steer.core.stops import begun
from steer.errors import CheckpointError, UsageError
from steer.model.chat_template import marks_of


class ContextWarning(UserWarning):
    """A reply has filled the model's context and ends there."""


def ids_of(tokenizer: Any, texts: Sequence[str], rows: int, name: str, *, frame: bool = False) -> list[list[int]]:
    """Token ids of texts. `frame`: with the special tokens that the tokenizer puts around a text, such as BOS.

    Every text that a model reads comes through here, most by `LoadedModel.encode`. `rows`: how many rows the embedding
    has. `name`: what messages call the model.
    Errors: UsageError for text that is not Unicode, CheckpointError for a token without a row.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UsageError(
                f"text: expected Unicode, found half of a character, {text[e.start]!r}; convert it to UTF-8"
            ) from e
    made: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=frame, return_attention_mask=False, return_token_type_ids=False, verbose=False
    ).input_ids
    highest = max((max(ids) for ids in made if ids), default=0)
    if highest >= rows:
        raise CheckpointError(
            f"{name}: expected tokens below {rows}, the rows of its embedding, found {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}) in the text; leave it out, or resize the embedding"
        )
    return made


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def padded(
    texts: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | None = None
) -> tuple[Int[Tensor, "texts seq"], Int[Tensor, "texts seq"]]:
    """Token ids as rows of one length, and the attention mask: 1 on tokens of a text, 0 on padding.

    Rows are padded at their end, which causal attention never sees, or with `left` at their beginning. The padding is
    token 0, because a tokenizer's pad token may have no row in the embedding.
    """
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place] = torch.tensor(list(text), dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def end_token_ids(config: Any, generation_config: Any, tokenizer: Any, turn_end: int | None) -> frozenset[int]:
    """Tokens that end a reply: the end tokens of the generation config, the config and the tokenizer, which may differ
    in merges and tunes, and `turn_end`, the token that the chat template writes after a reply.

    Errors: CheckpointError for an end token that is no number.
    """
    found: set[int] = set() if turn_end is None else {turn_end}
    for source in (generation_config, config, config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        several = ids if isinstance(ids, list | tuple) else () if ids is None else (ids,)
        if wrong := [i for i in several if not isinstance(i, int)]:
            raise CheckpointError(f"eos_token_id: expected token ids, found {wrong[0]!r}; mend generation_config.json")
        found |= {i for i in several if i >= 0}  # -1 stands for none
    return frozenset(found)


def context_length(config: Any, tokenizer: Any = None) -> int:
    """How many tokens a model reads at most, a prompt and its reply together.

    It is `max_position_embeddings`, but:
    - For YaRN it is the original length times the factor, if that is more.
    - With linear scaling some checkpoints have the stretched length there (Gemma 3) and others the original one
      (Vicuna 16k). It is the tokenizer's `model_max_length`, if that lies between the two.
    - With dynamic scaling it is the original length. Every token beyond would change the frequencies of all tokens
      before it, whose keys are in the cache.
    """
    text = config.get_text_config()
    keys = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    most = next((n for key in keys if isinstance(n := getattr(text, key, None), int) and n > 0), 1 << 30)
    longest = most
    for rope in rope_parts(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}):
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1.0
        if kind == "yarn":
            longest = max(longest, int(factor * (rope.get("original_max_position_embeddings") or 0)))
        stated = getattr(tokenizer, "model_max_length", None)
        if kind == "linear" and isinstance(stated, int) and stated <= factor * most:
            longest = max(longest, stated)
    return longest


def check_length(name: str, length: int, context: int) -> None:
    """Raise UsageError for a prompt after which no reply fits into the context."""
    if length >= context:
        raise UsageError(
            f"{name}: expected a prompt of at most {context - 1} tokens, since it reads {context} with the reply among "
            f"them, found {length}; shorten the messages or leave out the oldest"
        )


def filled(name: str, context: int) -> str:
    """A message for people: the reply has reached the end of the context."""
    return f"the reply ends here: {name} reads at most {context} tokens, prompt and reply together"


def warn_filled(name: str, context: int) -> None:
    """Warn that a reply has filled the context, where there is no receipt to say so."""
    warnings.warn(filled(name, context), ContextWarning, stacklevel=3)


_CONTEXT = 8
"""How many tokens of the prompt are decoded first: some tokenizers drop the space before the first word of a text."""


class Detokeniser:
    """The text of one reply, as its tokens come: whole characters only, without special tokens but those of thoughts.

        text = Detokeniser(tokenizer, prompt_ids)
        pieces = [text.add(token) for token in reply_ids] + [text.end()]

    It uses the incremental decoder of the tokenizers library, which keeps only as many earlier tokens as it needs, so
    that the time per token does not grow with the reply.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], end_text: str | None = None) -> None:
        """`tokenizer`: one of transformers, with a fast backend. `prompt`: the tokens before the reply. `end_text`: a
        text at which the reply ends; what may be its beginning is held back."""
        self._end_text, self._held = end_text, ""
        self.ended = False
        """Whether the end text has come."""
        self._tokenizer = tokenizer.backend_tokenizer
        marks = marks_of(tokenizer)
        self._marks = {
            i: t.content
            for i, t in tokenizer.added_tokens_decoder.items()
            if t.special and (t.content in marks.open or t.content in marks.close)
        }
        """Special tokens around thoughts. They stay in the text, or the thoughts would run into the answer."""
        self._seen = list(prompt[-_CONTEXT:])
        self._open: list[int] = []
        """Tokens that do not make a whole character yet."""
        self._begin()

    def add(self, token: int) -> str:
        """The text that this token completes; empty while bytes of a character are missing."""
        return self._until_end(self._decoded(token))

    def end(self) -> str:
        """The rest of the text: a character that was never completed shows as U+FFFD."""
        return self._until_end(self._rest(), last=True)

    def _until_end(self, text: str, last: bool = False) -> str:
        """Return the part of new text that certainly comes before the end text; hold the rest back."""
        if self._end_text is None or self.ended:
            return "" if self.ended else text
        self._held += text
        at = self._held.find(self._end_text)
        self.ended = at >= 0
        if not self.ended:
            at = len(self._held) - (0 if last else begun(self._held, (self._end_text,)))
        out, self._held = self._held[:at], self._held[at:]
        return out

    def _decoded(self, token: int) -> str:
        if token in self._marks:
            text = self._rest() + self._marks[token]
            self._seen = [*self._seen, token][-_CONTEXT:]
            self._begin()
            return text
        self._open.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as e:
            # With byte fallback, bytes that are not UTF-8 change how earlier bytes are decoded; the library then fails.
            if "prefix" not in str(e):
                raise
            text = self._rest()
            self._begin()
        if text is None:
            return ""
        self._close()
        return text

    def _rest(self) -> str:
        text = self._tokenizer.decode(self._open, skip_special_tokens=True)
        self._close()
        return text

    def _close(self) -> None:
        self._seen = [*self._seen, *self._open][-_CONTEXT:]
        self._open = []

    def _begin(self) -> None:
        """Start a new stream and feed it the last tokens."""
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in self._seen:
            try:
                self._stream.step(self._tokenizer, token)
            except Exception:
                self._stream = DecodeStream(skip_special_tokens=True)

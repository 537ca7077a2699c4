"""Between text and the model: token ids that have a row in the embedding, rows of one length, what ends a reply, how
long a text may be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor

from steer.errors import CheckpointError, UsageError

_PROBE = "steerprobe"
"""A reply that a chat template is asked to write, so that what it writes after a reply can be read."""


class ContextWarning(UserWarning):
    """A reply has filled the model's context and ends there."""


def ids_of(tokenizer: Any, texts: Sequence[str], rows: int, name: str, *, frame: bool = False) -> list[list[int]]:
    """Token ids of texts. `frame`: with the special tokens that the tokenizer puts around a text, as BOS.

    Every text that a model reads comes through here, most by `SteeredModel.encode`. `rows` are the embedding's, `name`
    is the model's for messages.
    Errors: UsageError for text that is no Unicode, CheckpointError for a token without a row.
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


def padded(
    texts: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | None = None
) -> tuple[Int[Tensor, "texts seq"], Int[Tensor, "texts seq"]]:
    """Token ids as rows of one length, and the attention mask: 1 on tokens of a text, 0 on padding.

    Rows are filled up at their end, where causal attention never looks, with `left` at their beginning. They are filled
    with token 0: a tokenizer's own pad token may have no row in the embedding.
    """
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place] = torch.tensor(list(text), dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def end_token_ids(config: Any, generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a reply: those of the generation config, the config and the tokenizer, which merges and tunes
    leave at odds, and the one that the chat template writes after a reply."""
    found: set[int] = set()
    for source in (generation_config, config, config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    turn_end = _turn_end(tokenizer)
    return frozenset(found if turn_end is None else found | {turn_end})


def _turn_end(tokenizer: Any) -> int | None:
    """The first special or added token that the chat template writes after a reply; None where it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, KeyError, AttributeError):
        return None  # it refuses such a chat
    _, said, after = text.rpartition(_PROBE)
    if not said:
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    # What the tokenizer does not know is no end, and the next chat's beginning none either, unless it is both.
    special -= {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return next((i for i in tokenizer(after, add_special_tokens=False).input_ids if i in special), None)


def context_length(config: Any) -> int:
    """How many tokens a model reads at most, a prompt and its reply together.

    YaRN names the length before it was stretched, and the factor; other kinds of scaling, and sliding windows, leave
    `max_position_embeddings` what it says.
    """
    text = config.get_text_config()
    most = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "yarn":
        stretched = rope.get("factor", 1.0) * (rope.get("original_max_position_embeddings") or 0)
        most = max(most, int(stretched))
    return most


def check_length(name: str, length: int, context: int) -> None:
    """Errors: UsageError for a prompt after which no reply fits into the context."""
    if length >= context:
        raise UsageError(
            f"{name}: expected a prompt of at most {context - 1} tokens, since it reads {context} with the reply among "
            f"them, found {length}; shorten the messages or leave out the oldest"
        )


def filled(name: str, context: int) -> str:
    """That a reply has reached the end of the context, for people."""
    return f"the reply ends here: {name} reads at most {context} tokens, prompt and reply together"


def warn_filled(name: str, context: int) -> None:
    """Warn whoever has no receipt to find it in."""
    warnings.warn(filled(name, context), ContextWarning, stacklevel=3)

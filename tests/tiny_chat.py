"""Tiny checkpoints that can chat: a random model with a real tokenizer and a chat template beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer.checkpoint.library import direction_place
from steer.core.direction import Direction
from steer.measure.contrast import Reply
from steer.model.steered import SteeredModel, load

SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = [a + b for a in "bdfgklmnprstv" for b in "aeiou"] + ["hello", "lie", "friend", "truth", "well", "yes"]
TEMPLATE = (
    "<s>{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ENDLESS: dict[str, Any] = {"eos": None, "template": TEMPLATE.replace("</s>", "well"), "eos_token_id": None}
"""What `save_tiny_chat` makes a model with that never ends a reply itself."""


def save_tiny_chat(
    save: Callable[..., Path],
    path: Path,
    *,
    by_bytes: bool = False,
    eos: str | None = "</s>",
    template: str = TEMPLATE,
    marks: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    **config: object,
) -> Path:
    """Write a checkpoint with `save` (the fixture `tiny_llama`) and give it a voice.

    Its tokens are words of two letters, or with `by_bytes` single bytes, so that one character may take
    several tokens. `eos` and `template` are the tokenizer's; `marks` are special tokens that it has besides, `merges`
    the pairs of bytes that are one token (llama.cpp loads no vocabulary of bytes without one).
    """
    if by_bytes:
        words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges), unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        words = [*SPECIAL, *WORDS, *marks]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(path, vocab_size=len(words), **config)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        extra_special_tokens=[*SPECIAL[3:], *marks],
        chat_template=template,
    ).save_pretrained(path)
    return path


@torch.inference_mode()
def residuals(model: SteeredModel, ids: Tensor) -> list[Tensor]:
    """The residual stream [batch, seq, d] after each block."""
    with model.record() as recording:
        model.hf(input_ids=ids)
    return [recording[site] for site in range(model.anatomy.blocks)]


@torch.inference_mode()
def logits(model: SteeredModel, ids: Tensor) -> Tensor:
    return model.hf(input_ids=ids).logits


def replies_of(model: SteeredModel, texts: Sequence[str]) -> list[Reply]:
    """Replies with these texts, each to a longer message than the one before."""
    return [
        Reply(({"role": "user", "content": "hello " + "ba " * i},), tuple(model.tokenizer(t).input_ids), t)
        for i, t in enumerate(texts)
    ]


def keep_direction(checkpoint: Path, direction: Direction) -> Path:
    """Put a direction where the library finds it, as one that was found on this checkpoint."""
    sketch = load(checkpoint).sketch()
    direction.provenance["sketch"] = sketch.to_header()
    return direction.save(direction_place(sketch, direction.name))


def hooks_on(model: SteeredModel | PreTrainedModel) -> int:
    """Every forward hook on the model, whoever registered it."""
    hf = model.hf if isinstance(model, SteeredModel) else model
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())

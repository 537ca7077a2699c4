"""Tiny checkpoints, and readers that are programs, for the tests of steer eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_chat import SPECIAL, TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer.measure.probes.probe import Example, Figure, Metric, Passage, Probe, Reader, Result, Size
from steer.progress import Advance


def save_by_letters(save: Callable[..., Path], path: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """Write a tiny checkpoint whose tokens are bytes, some pairs of letters, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "a"), ("o", "n")]
    words = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save(path, **{"vocab_size": len(words), "max_position_embeddings": 1024, **config})
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=template,
    ).save_pretrained(path)
    return path


class Weighing(Probe):
    """Asks `items` reader-independent items: the log-probability of a word."""

    says = "Nothing: it is a test."
    needs = frozenset({"logprobs"})

    def __init__(self, name: str = "weighing", items: int = 30, chance: float | None = None) -> None:
        self.name, self.count = name, items
        self.metrics = (Metric("weight", "higher", "weight", chance),)

    def plan(self, size: Size) -> Any:
        return [size.seed, size.of(self.count, self.count // 3)]

    def run(self, reader: Reader, size: Size, advance: Advance | None = None) -> Result:
        asked = [Passage(f" word {i}", "It is the") for i in range(size.of(self.count, self.count // 3))]
        found = reader.logprobs(asked, advance)
        return Result(
            [Figure("weight", p.text, float(f.mean())) for p, f in zip(asked, found, strict=True)],
            [Example(asked[0].text, asked[0].begun, "", "")],
        )


class ProgramReader:
    """A reader whose log-probabilities are a function of the text. It has no other ability."""

    abilities = frozenset({"logprobs"})
    context, dtype, notes = 1000, None, ()

    def __init__(self, name: str, weigh: Callable[[Passage], float]) -> None:
        self.name, self._weigh, self.asked = name, weigh, 0

    def length(self, passage: Passage) -> int:
        return len(passage.begun + passage.text)

    def logprobs(self, passages: Sequence[Passage], advance: Advance | None = None) -> list[np.ndarray]:
        self.asked += len(passages)
        return [np.array([self._weigh(p)]) for p in passages]


class ProgramArm:
    """An arm whose reader is a program."""

    def __init__(self, name: str, weigh: Callable[[Passage], float], control: bool = False) -> None:
        self.name, self.about, self.control = name, name, control
        self.key = {"program": name}
        self.made = ProgramReader(name, weigh)

    def reader(self) -> ProgramReader:
        return self.made

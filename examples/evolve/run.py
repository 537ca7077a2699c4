"""A lineage judged by a simulated person of known taste, and how near it comes to the best of all subsets of its tunes.

    python examples/evolve/run.py OUT --seeds 5

Brute force: every subset of the tunes is merged onto the base, and answers the same prompts once; its taste score is the
mean of what the person thinks of the replies. Then lineages begin with the first tune alone, propose children from the
ratings, and are voted on with these replies until more votes would change nothing, with pairs chosen in three ways.
Every subset's replies are a file in OUT/replies, so that a run that was stopped goes on. Writes `OUT/run.md`, a table, and
`OUT/run.png`. `--whole` also grows one lineage with the merges, gates and replies of `steer evolve` itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import typer
from jaxtyping import Float
from pairs import WAYS
from person import Person
from safetensors.torch import load_file
from torch import Tensor

from steer.checkpoint.fetch import resolve
from steer.checkpoint.staging import hash_file
from steer.core.sampler import CHAT
from steer.core.small_files import dump_yaml
from steer.errors import UsageError
from steer.files import write_atomic
from steer.lineage.building import checkpoint
from steer.lineage.judging import Duel, Judge, Prompts
from steer.lineage.lineage import Generation, Lineage, Move, Node, Settings
from steer.lineage.proposing import propose
from steer.lineage.ratings import standing
from steer.lineage.recipes import child, models_of
from steer.model.steered import load
from steer.progress import bar
from steer.verbs import evolve

TUNES = Path(__file__).parents[1] / "merge" / "tunes"
NAMES = ("preachy", "brief", "warm", "humorous", "plain_spoken", "formal")
BASE = "smollm2-135m-instruct"
WEIGHT = 0.8
TASTE = {"moralizing": -2.0, "compliance": -1.0, "length": -2.0, "repetition": -1.0}
Subset = frozenset[str]
Replies = Mapping[Subset, Sequence[str]]
"""The replies of each subset of the tunes, in the order of the prompts."""


def recipe(base: str, models: Sequence[str]) -> dict[str, Any]:
    """Return the merge of a subset: the base, plus `WEIGHT` times the difference of each model to it."""
    return {
        "merge_method": "task_arithmetic", "base_model": base, "models": [{"model": m} for m in models],
        "parameters": {"weight": WEIGHT}, "dtype": "float32",
    }  # fmt: skip


class Merger:
    """Merges any subset of LoRA adapters onto their base in memory, in less time than reading a checkpoint takes."""

    def __init__(self, base: str | Path, adapters: Mapping[str, Path]) -> None:
        self.model = load(base)
        self.adapters = {name: _low_rank(place) for name, place in adapters.items()}
        parameters = dict(self.model.hf.named_parameters())
        self.targets = {name: parameters[name] for adapter in self.adapters.values() for name in adapter}
        self.untouched = {name: parameter.detach().clone() for name, parameter in self.targets.items()}

    @torch.no_grad()
    def merge(self, subset: Subset) -> None:
        """Make the model the merge of a subset, as `recipe` describes it."""
        for name, parameter in self.targets.items():
            factors = [self.adapters[tune][name] for tune in sorted(subset) if name in self.adapters[tune]]
            parameter.copy_(self.untouched[name] + sum(WEIGHT * (b @ a) for b, a in factors))

    def replies(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Return the model's replies to first messages, with one seed for each prompt whatever the subset."""
        chats = [[{"role": "user", "content": text}] for text in prompts]
        made = self.model.replies(chats, replace(CHAT, max_new_tokens=tokens), thoughts=False)  # pyright: ignore
        return [self.model.text(ids).strip() for ids in made]


def _low_rank(adapter: Path) -> dict[str, tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]]:
    """The factors of an adapter's change of each weight, by the weight's name in the base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {k: v.float() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    scale, end, start = config["lora_alpha"] / config["r"], ".lora_A.weight", "base_model.model."
    return {
        name.removeprefix(start).replace(end, ".weight"): (scale * tensors[name.replace("lora_A", "lora_B")], a)
        for name, a in tensors.items()
        if name.endswith(end)
    }


def all_subsets(names: Sequence[str]) -> list[Subset]:
    """Return every subset that is not empty; those of the first names come first."""
    return [frozenset(n for i, n in enumerate(names) if mask >> i & 1) for mask in range(1, 2 ** len(names))]


def answer(
    out: Path, base: str | Path, adapters: Mapping[str, Path], prompts: Sequence[str], tokens: int
) -> dict[Subset, list[str]]:
    """Return the replies of every subset of the adapters. What is in OUT/replies is not asked again."""
    weights = {name: hash_file(place / "adapter_model.safetensors") for name, place in adapters.items()}
    subsets, merger, found = all_subsets(list(adapters)), None, dict[Subset, list[str]]()
    with bar("answering", len(subsets), "merges") as advance:
        for subset in subsets:
            key = json.dumps([str(base), {n: weights[n] for n in sorted(subset)}, WEIGHT, list(prompts), tokens])
            file = out / "replies" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            if not file.is_file():
                merger = merger or Merger(base, adapters)
                merger.merge(subset)
                kept = {"subset": sorted(subset), "replies": merger.replies(prompts, tokens)}
                write_atomic(file, json.dumps(kept, indent=1) + "\n")
            found[subset] = json.loads(file.read_text())["replies"]
            advance(1)
    return found

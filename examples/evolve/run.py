"""A lineage judged by a simulated person of known taste, and how near it comes to the best of all subsets of its tunes.

    python examples/evolve/run.py OUT --seeds 5

Brute force: every subset of the tunes is merged onto the base, and answers the same prompts once; its taste score is
the mean of what the person thinks of the replies. Then lineages begin with the first tune alone, propose children from
the ratings, and are voted on with these replies until more votes would change nothing, with pairs chosen in three ways.
Every subset's replies are a file in OUT/replies, so that a run that was stopped goes on. Writes `OUT/run.md`, a table,
and `OUT/run.png`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
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

from steer.checkpoint.staging import hash_file
from steer.core.sampler import CHAT
from steer.files import write_atomic
from steer.lineage.building import checkpoint
from steer.lineage.judging import BlindPair, Judge, Prompts
from steer.lineage.lineage import Generation, Lineage, Move, Node, Settings
from steer.lineage.proposing import propose
from steer.lineage.ratings import rate, standing
from steer.lineage.recipes import child, models_of
from steer.model.steered import load
from steer.progress import bar
from steer.verbs import evolve

TUNES = Path(__file__).parents[1] / "merge" / "tunes"
NAMES = ("preachy", "brief", "warm", "humorous", "plain_spoken", "formal", "old_fashioned", "roleplay")
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


@dataclass(frozen=True)
class Grown:
    """How one lineage went."""

    leaders: list[Subset]
    """The merge that led after each generation, the start first."""
    votes: list[int]
    """All votes up to then."""


def grow(
    place: Path, names: Sequence[str], prompts: Sequence[str], replies: Replies, person: Person, way: str, seed: int,
    *, generations: int = 6, children: int = 4, most: int = 1000,
) -> Grown:  # fmt: skip
    """Grow a lineage in a directory from the first tune alone, with votes on replies that are written.

    `way`: how pairs are chosen, one of `WAYS`. `children`: of a generation. `most`: votes on one generation at most.
    """
    lineage = Lineage.create(place, Settings(list(names), children, seed))
    lineage.write(Generation(0, [Node("0", Move("start"), "the first tune alone", recipe(BASE, names[:1]))]))
    grown, rng, now = Grown([frozenset(names[:1])], [0]), random.Random(f"{way} {seed}"), partial(standing, lineage)
    for number in range(1, generations + 1):
        proposals = propose(lineage, _ratings(lineage), count=children, kinds=("add", "remove"))
        nodes = [
            child(lineage.node(p.parent), f"{number}{letter}", p.move, p.why)
            for letter, p in zip("abcdefgh", proposals, strict=False)
        ]
        lineage.write(Generation(number, nodes))
        pairs = WAYS[way](list(now().ratings), rng, now)
        for _ in range(0, most, 5):
            if now().settled:
                break
            for a, b in islice(pairs, 5):
                i = rng.randrange(len(prompts))
                left, right = (replies[_subset(lineage.node(node))][i] for node in (a, b))
                blind_pair = BlindPair((("user", prompts[i]),), left, right, (a, b))
                choice = person.choose(blind_pair)
                outcome = "a" if choice == "left" else "b" if choice == "right" else choice
                lineage.vote(a, b, outcome, chat=blind_pair.chat, replies=[left, right], left="a", voter="simulated")
        grown.leaders.append(_subset(lineage.node(now().leader)))
        grown.votes.append(len(lineage.votes))
    return grown


def grow_whole(
    place: Path, start: Path, pool: Sequence[str], person: Person, *, generations: int, children: int, most: int,
    tokens: int, say: Callable[[str], None] = lambda line: None,
) -> Lineage:  # fmt: skip
    """Grow a lineage as a person does, with `steer evolve`: merges, gates, replies written ahead, and blind votes. One
    that was stopped goes on with its next generation.

    `start`: the recipe. `pool`: models that may be added. `most`: votes on one generation at most. `tokens`: of a reply
    at most.
    """
    evolve.start(start, place, pool, children=children, say=say)
    lineage, sampler = Lineage(place), replace(CHAT, max_new_tokens=tokens)
    while True:
        if len(standing(lineage).ratings) > 1:  # else all children failed their gates
            checkpoints = partial(checkpoint, lineage)
            with Judge(
                lineage, "simulated", checkpoint=checkpoints, sampler=sampler, seed=0, patience=math.inf
            ) as judge:
                person.judge(judge, most, say)
        if len(lineage.generations) > generations:
            return lineage
        evolve.next_generation(place, say=say)


def _ratings(lineage: Lineage) -> dict[str, float]:
    found = rate(list(lineage.nodes), lineage.votes).ratings
    return {name: rating.value for name, rating in found.items() if rating.votes}


def _subset(node: Node) -> Subset:
    return frozenset(Path(model).name for model in models_of(node.recipe))


def score(person: Person, replies: Sequence[str]) -> float:
    """Return a merge's taste score, without noise."""
    return fmean(map(person.taste, replies))


def error(person: Person, a: Sequence[str], b: Sequence[str]) -> float:
    """Return the standard error of the difference of two merges' taste scores, paired by prompt."""
    differences = [person.taste(x) - person.taste(y) for x, y in zip(a, b, strict=True)]
    return stdev(differences) / len(differences) ** 0.5


def table(found: Mapping[str, Sequence[Grown]], replies: Replies, person: Person) -> str:
    """Return the results as a Markdown table."""
    scores = {subset: score(person, texts) for subset, texts in replies.items()}
    ranked = sorted(scores, key=lambda subset: -scores[subset])
    best, start = ranked[0], found["round-robin"][0].leaders[0]
    seeds = len(found["round-robin"])
    robin = fmean(g.votes[-1] for g in found["round-robin"])
    lines = [
        f"{len(ranked)} merges of {max(map(len, ranked))} tunes, {len(replies[best])} prompts;"
        f" {len(found['random'][0].votes) - 1} generations, seeds 0 to {seeds - 1}."
        f" Taste scores: {scores[start]:.2f} for the start ({', '.join(start)}), {fmean(scores.values()):.2f} for"
        f" the mean, {scores[best]:.2f} for the best ({', '.join(sorted(best))}).", "",
        "| pairs | votes, mean (least to most) | of a round-robin's | taste score at the end "
        "| best minus it | within two standard errors of the best | rank |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for way, runs in found.items():
        ends, votes = [g.leaders[-1] for g in runs], [g.votes[-1] for g in runs]
        gaps = [scores[best] - scores[end] for end in ends]
        near = [gap <= 2 * error(person, replies[best], replies[end]) for gap, end in zip(gaps, ends, strict=True)]
        ranks = [ranked.index(end) + 1 for end in ends]
        lines.append(
            f"| {way} | {fmean(votes):.0f} ({min(votes)} to {max(votes)}) | {fmean(votes) / robin:.2f} "
            f"| {fmean(scores[e] for e in ends):.2f} "
            f"| {fmean(gaps):.2f}, {max(gaps):.2f} at most | {sum(near)} of {seeds} "
            f"| {min(ranks)} to {max(ranks)} of {len(ranked)} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Sequence[Grown]], replies: Replies, person: Person, place: Path) -> None:
    """Draw the leader's taste score after so many votes, a line for each seed, beside all subsets' best and mean."""
    scores = [score(person, texts) for texts in replies.values()]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for number, (way, runs) in enumerate(found.items()):
        for grown in runs:
            line = [score(person, replies[leader]) for leader in grown.leaders]
            label = way if grown is runs[0] else None
            axes.step(grown.votes, line, where="post", color=f"C{number}", alpha=0.6, label=label)
    axes.axhline(max(scores), color="black", linewidth=1, label="best of all subsets")
    axes.axhline(fmean(scores), color="grey", linewidth=1, linestyle=":", label="mean of all subsets")
    axes.set(xlabel="votes", ylabel="taste score of the leader", xlim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=150)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Argument(help="Where replies, lineages, the table and the plot go.")],
    tune: Annotated[list[str], typer.Option(help="Folder of an adapter; the first one is the start.")] = [  # noqa: B006
        str(TUNES / name) for name in NAMES
    ],
    seeds: Annotated[int, typer.Option(help="Lineages for each way of choosing pairs.", min=1)] = 5,
    generations: Annotated[int, typer.Option(help="Generations of a lineage.", min=1)] = 6,
    children: Annotated[int, typer.Option(help="Children of a generation.", min=1, max=8)] = 4,
    prompts: Annotated[int, typer.Option(help="Prompts that each merge answers, the shortest that ship.", min=2)] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.", min=1)] = 28,
    most: Annotated[int, typer.Option(help="Votes on one generation at most.", min=1)] = 1000,
    noise: Annotated[float, typer.Option(help="Deviation of the person's error on a difference of tastes.")] = 0.5,
    readme: Annotated[
        Path | None, typer.Option(help="File whose table between <!-- evolve --> marks is replaced.")
    ] = None,
) -> None:
    """Compare lineages with the best of all subsets, and ways of choosing pairs with each other."""
    matplotlib.use("Agg")
    adapters = {Path(place).name: Path(place).resolve() for place in tune}
    names, shortest = list(adapters), sorted(Prompts.shipped().openings, key=len)[:prompts]
    replies = answer(out, BASE, adapters, shortest, tokens)
    found: dict[str, list[Grown]] = {way: [] for way in WAYS}
    with bar("voting", seeds * len(WAYS), "lineages") as advance:
        for seed in range(seeds):
            for way, runs in found.items():
                place = out / "lineages" / f"{way.replace(' ', '-')}-{seed}"
                shutil.rmtree(place, ignore_errors=True)
                person = Person(TASTE, noise, rng=random.Random(f"{seed} {way}"))
                runs.append(grow(place, names, shortest, replies, person, way, seed,
                                 generations=generations, children=children, most=most))  # fmt: skip
                advance(1)
    person = Person(TASTE, noise, rng=random.Random(0))
    text = table(found, replies, person)
    write_atomic(out / "run.md", text)
    plot(found, replies, person, out / "run.png")
    if readme is not None:
        marks = r"(<!-- evolve -->\n).*?(<!-- end of evolve -->)"
        old = readme.read_text(encoding="utf-8")
        write_atomic(readme, re.sub(marks, lambda m: m[1] + text + m[2], old, flags=re.DOTALL))
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

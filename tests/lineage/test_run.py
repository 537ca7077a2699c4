"""A simulated person's lineage ends near the best of all subsets, by real merges of tiny tunes, in few votes."""

from __future__ import annotations

import importlib
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.special import logit
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.checkpoint.merge import merge
from steer.core.sampler import CHAT
from steer.lineage import building
from steer.lineage.building import checkpoint
from steer.lineage.judging import Prompts
from steer.lineage.ratings import NOTICEABLE, standing
from steer.model.steered import load

TEXTS = {
    "letters": "a b c d e f g h i j k l m n o p q r s t u v w x y z ",
    "syllables": "to be or no so we go on up at it is he do my ",
    "plain": "Some people take a walk before they sit down to eat. ",
    "endless": "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz",
    "hum": "mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm",
}
"""What each tune learnt to write; the start is the last. A person who likes many words likes the first ones."""
TASTE, TOKENS = {"length": 40.0}, 24
START, *POOL = reversed(TEXTS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "evolve")
    return importlib.import_module("run")


@pytest.fixture(scope="session")
def adapters(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small LoRA adapter of the family's base for each text."""
    folder, base = tmp_path_factory.mktemp("adapters"), family / "base"
    tokenizer, made = AutoTokenizer.from_pretrained(base), {}
    for name in (START, *POOL):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        ids = torch.tensor(tokenizer(TEXTS[name] * 4)["input_ids"])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for step in range(25):
            row = ids[None, step : step + 64]
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return sorted(Prompts.shipped().openings, key=len)[:8]


def test_a_subset_merged_in_memory_is_the_merge_of_its_recipe(
    run: Any, family: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base, chosen = str(family / "base"), (POOL[0], START)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(run.recipe(base, [f"{base}+{adapters[n]}" for n in chosen])))
    merged = load_file(merge(tmp_path / "recipe.yml", tmp_path / "merged") / "model.safetensors")
    merger = run.Merger(base, adapters)
    merger.merge(frozenset(adapters))  # leaves nothing behind
    merger.merge(frozenset(chosen))
    found = dict(merger.model.hf.named_parameters())
    assert all(name in merged for name in merger.targets)
    for name, expected in merged.items():
        torch.testing.assert_close(found[name].detach().float(), expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_lineages_of_six_generations_end_near_the_best_subset_and_telling_pairs_take_fewest_votes(
    run: Any, family: Path, adapters: dict[str, Path], prompts: list[str], tmp_path: Path
) -> None:
    replies = run.answer(tmp_path, family / "base", adapters, prompts, TOKENS)
    assert len(replies) == 2 ** len(adapters) - 1
    someone = run.Person(TASTE, noise=2.0)
    scores = {subset: run.score(someone, texts) for subset, texts in replies.items()}
    best = max(scores, key=lambda subset: scores[subset])
    found: dict[str, list[Any]] = {way: [] for way in run.WAYS}
    for seed in range(2):
        for way, runs in found.items():
            person = replace(someone, rng=random.Random(seed))
            place = tmp_path / f"{way}-{seed}"
            runs.append(run.grow(place, list(adapters), prompts, replies, person, way, seed, most=300))
    votes = {way: sum(grown.votes[-1] for grown in runs) for way, runs in found.items()}
    for grown in found["most telling"]:
        assert len(grown.leaders) == 7
        end = grown.leaders[-1]
        # Where voting ends, the best may still be chosen over it by so many.
        equal = float(logit(NOTICEABLE)) * someone.noise * math.sqrt(3) / math.pi
        assert scores[best] - scores[end] <= max(equal, 2 * run.error(someone, replies[best], replies[end]))
        assert scores[end] > fmean(scores.values()) > scores[grown.leaders[0]]
    assert votes["most telling"] < votes["round-robin"]
    assert votes["most telling"] < votes["random"]
    assert f"{len(replies)} merges of 5 tunes" in run.table(found, replies, someone)


@pytest.mark.slow
def test_steer_evolve_grows_six_generations_to_a_merge_near_the_best_subset(
    run: Any, family: Path, adapters: dict[str, Path], prompts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(building, "PERPLEXITY", 1e9)  # tunes that write letters alone would not pass
    monkeypatch.setattr(building, "PROBES", ("capability",))
    base, start = str(family / "base"), tmp_path / "start.yml"
    start.write_text(yaml.safe_dump(run.recipe(base, [f"{base}+{adapters[START]}"])))
    pool = [f"{base}+{adapters[name]}" for name in POOL]
    person = run.Person(TASTE, noise=0.5, rng=random.Random(0))
    lineage = run.grow_whole(
        tmp_path / "lineage", start, pool, person, generations=6, children=3, most=20, tokens=TOKENS
    )
    assert [generation.number for generation in lineage.generations] == list(range(7))
    replies = run.answer(tmp_path, base, adapters, prompts, TOKENS)
    best = max(replies.values(), key=partial(run.score, person))
    model = load(checkpoint(lineage, standing(lineage).leader))
    chats = [[{"role": "user", "content": text}] for text in prompts]
    made = model.replies(chats, replace(CHAT, max_new_tokens=TOKENS), thoughts=False)  # pyright: ignore
    end = [model.text(ids).strip() for ids in made]
    gap = run.score(person, best) - run.score(person, end)
    assert gap <= 2 * run.error(person, best, end)
    assert run.score(person, end) > run.score(person, replies[frozenset({START})]) + gap

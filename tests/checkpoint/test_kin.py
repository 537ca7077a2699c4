"""Kinship of tunes: families whose kinship is known, and model_stock's t beside what mergekit does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_anatomies import BLOCKS, TINY
from tiny_chat import save_tiny_chat
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer
from steer.checkpoint.kin import Kinship, mismatches
from steer.checkpoint.merge import merge
from steer.errors import CheckpointError, SteerError, UsageError

Weights = dict[str, Tensor]
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def family(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in fp32 and tunes of it, each with known kin. Not to be changed."""
    folder = tmp_path_factory.mktemp("family")
    base = weights(save_tiny_chat(tiny_llama, folder / "base", dtype=torch.float32))
    tune, other, noise = (random_like(base, seed) for seed in range(3))
    first = {n: t * (torch.arange(t.numel()).view(t.shape) % 2) for n, t in tune.items()}  # every second weight
    write(folder, "tune", moved(base, tune))
    write(folder, "copy", moved(base, tune))
    write(folder, "child", moved(base, tune, (noise, 0.05)))
    write(folder, "twice", moved(base, (tune, 2.0)))
    write(folder, "against", moved(base, (tune, -1.0)))
    write(folder, "first_half", moved(base, first))
    write(folder, "second_half", moved(base, tune, (first, -1.0)))
    write(folder, "other", moved(base, other))
    write(folder, "mixture", moved(base, (tune, 0.5), (other, 0.5)))
    return folder


def weights(checkpoint: Path) -> Weights:
    return load_file(checkpoint / FILE)


def random_like(base: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}


def moved(base: Weights, *differences: Weights | tuple[Weights, float]) -> Weights:
    pairs = [d if isinstance(d, tuple) else (d, 1.0) for d in differences]
    return {n: t + sum(scale * d[n] for d, scale in pairs) for n, t in base.items()}


def write(folder: Path, name: str, tensors: Weights, like: str = "base") -> Path:
    """A checkpoint with the files of another and these weights."""
    if not (folder / name).exists():
        shutil.copytree(folder / like, folder / name)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name / FILE, metadata={"format": "pt"})
    return folder / name


def kin_of(folder: Path, *names: str, base: str = "base") -> Kinship:
    return steer.kin(*[folder / name for name in names], base=folder / base)


def said(kinship: Kinship) -> str:
    return "\n".join(kinship.sentences())


# Known kin


def test_a_child_is_nearly_a_copy_of_its_parent_and_adds_only_its_noise(family: Path) -> None:
    found = kin_of(family, "tune", "child", "other")
    cosine = 1 / math.hypot(1, 0.05)
    assert found.cosine(family / "tune", family / "child") == pytest.approx(cosine, abs=1e-3)
    assert found.new(family / "child", [family / "tune"]) == pytest.approx(1 - cosine**2, rel=0.1)
    assert "tune is nearly a copy of child: cosine 0.999" in said(found)
    assert "other adds most that is new" in said(found)


def test_unrelated_tunes_are_orthogonal_and_wholly_new(family: Path) -> None:
    found = kin_of(family, "tune", "other")
    assert abs(found.cosine(family / "tune", family / "other")) < 0.03
    assert found.new(family / "other") == pytest.approx(1, abs=1e-3)
    assert "Nobody is nearly a copy of another" in said(found)


def test_two_halves_of_a_tune_are_orthogonal_and_together_leave_nothing_new_in_it(family: Path) -> None:
    halves = ("first_half", "second_half")
    found = kin_of(family, "tune", *halves)
    assert found.cosine(family / halves[0], family / halves[1]) == pytest.approx(0, abs=1e-6)
    assert found.new(family / "tune", [family / h for h in halves]) == pytest.approx(0, abs=1e-6)
    half = found.norms[1] ** 2 / found.norms[0] ** 2
    assert found.new(family / "tune", [family / halves[0]]) == pytest.approx(1 - half, abs=1e-6)


def test_a_copy_a_multiple_and_an_opposite_are_named_as_such(family: Path) -> None:
    found = kin_of(family, "tune", "copy", "twice", "against")
    np.testing.assert_allclose(found.norms / found.norms[0], [1, 1, 2, 1], rtol=1e-4)
    np.testing.assert_allclose(found.cosines[0], [1, 1, 1, -1], atol=1e-6)
    text = said(found)
    assert "tune is nearly a copy of copy: cosine 1.000" in text
    assert "tune goes the same way as twice, 0.50 times as far" in text
    assert "tune goes the opposite way of against, 1.00 times as far" in text


def test_a_mixture_of_tunes_has_nothing_new_beside_them(family: Path) -> None:
    found = kin_of(family, "mixture", "tune", "other")
    assert found.new(family / "mixture") == pytest.approx(0, abs=1e-6)
    assert found.new(family / "mixture", [family / "tune"]) == pytest.approx(0.5, abs=0.05)
    assert found.new(family / "mixture", []) == 1


def test_what_is_new_counts_a_model_that_is_the_base_and_small_tunes(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family, tmp_path / "work")
    work = tmp_path / "work"
    base, tune = weights(work / "base"), random_like(weights(work / "base"), 0)
    shutil.copytree(work / "base", work / "untouched")
    write(work, "small", moved(base, (tune, 1e-3)))
    found = kin_of(work, "tune", "small", "untouched")
    assert found.norms[2] == 0
    assert found.cosine(work / "untouched", work / "tune") == 0
    assert found.new(work / "untouched") == found.new(work / "untouched", []) == 0
    assert found.new(work / "tune", [work / "small", work / "untouched"]) == pytest.approx(0, abs=1e-3)
    assert "untouched is the base: no weight differs." in said(found)


def test_norms_and_cosines_are_those_of_all_weights_as_one_vector(family: Path) -> None:
    found = kin_of(family, "tune", "child", "other")
    base = weights(family / "base")
    vectors = [
        torch.cat([(weights(family / n)[k].double() - base[k].double()).flatten() for k in base])
        for n in ("tune", "child", "other")
    ]
    np.testing.assert_allclose(found.norms, [v.norm().item() for v in vectors], rtol=1e-6)
    wanted = [[torch.cosine_similarity(a, b, dim=0).item() for b in vectors] for a in vectors]
    np.testing.assert_allclose(found.cosines, wanted, atol=1e-6)
    assert found.base_norm == pytest.approx(math.sqrt(sum(t.double().square().sum().item() for t in base.values())))


def test_blocks_and_kinds_show_where_a_tune_differs(family: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(family, work)
    base, tune = weights(work / "base"), random_like(weights(work / "base"), 0)
    mlp = {n: t * ("layers.1.mlp" in n) for n, t in tune.items()}
    ends = {n: t * (n in ("model.embed_tokens.weight", "model.norm.weight")) for n, t in tune.items()}
    write(work, "mlp", moved(base, mlp))
    write(work, "ends", moved(base, ends))
    found = kin_of(work, "mlp", "ends")
    assert [k for k, v in found.by_kind.items() if v[0]] == ["mlp"]
    assert [k for k, v in found.by_kind.items() if v[1]] == ["embedding", "norm"]
    assert [b for b, v in found.by_block.items() if v.any()] == [1]
    names = [n for n in base if "layers.1.mlp" in n]
    square = sum(mlp[n].square().sum().item() for n in names) / sum(base[n].square().sum().item() for n in names)
    assert found.by_kind_of_block("mlp")[1][0] == pytest.approx(math.sqrt(square), rel=1e-4)
    assert {t.kind for t in found.tensors} == {"embedding", "attention", "mlp", "norm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_stored_dtype_gives_the_same_figures(family: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    names = ("base", "tune", "other")
    for name in names:
        shutil.copytree(family / name, tmp_path / name)
        write(tmp_path, name, {n: t.to(dtype) for n, t in weights(family / name).items()})
    found = kin_of(tmp_path, "tune", "other")
    read = [torch.cat([t.double().flatten() for t in weights(tmp_path / n).values()]) for n in names]
    differences = torch.stack([r - read[0] for r in read[1:]])
    np.testing.assert_allclose(found.gram, (differences @ differences.T).numpy(), rtol=1e-5, atol=1e-7)


def test_models_of_other_dtypes_and_shards_are_compared(
    family: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    save_tiny_chat(tiny_llama, tmp_path / "sharded", seed=4, dtype=torch.bfloat16, shards=True)
    save_tiny_chat(tiny_llama, tmp_path / "whole", seed=4, dtype=torch.float32)
    found = steer.kin(tmp_path / "sharded", tmp_path / "whole", base=family / "base")
    assert found.cosines[0, 1] == pytest.approx(1, abs=1e-4)


# model_stock and linear, beside what mergekit does


@pytest.mark.parametrize("filter_wise", [False, True])
def test_t_and_what_is_left_are_those_of_mergekit_s_merge(family: Path, tmp_path: Path, filter_wise: bool) -> None:
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / n)} for n in ("child", "first_half", "mixture")],
        "parameters": {"filter_wise": filter_wise},
        "dtype": "float32",
    }
    path = tmp_path / "stock.yml"
    path.write_text(yaml.safe_dump(recipe))
    found = steer.kin(path)
    base, merged = weights(family / "base"), weights(merge(path, tmp_path / "out"))
    tunes = [weights(Path(name)) for name in found.names]
    kept = np.zeros(3)
    for tensor in found.tensors:
        mean = torch.stack([t[tensor.name] - base[tensor.name] for t in tunes]).mean(0)
        row = tensor.name.endswith("norm.weight") or not filter_wise
        shape = (1, -1) if row else (mean.shape[0], -1)
        step, of = (merged[tensor.name] - base[tensor.name]).view(shape), mean.view(shape)
        t = (step * of).sum(1) / of.square().sum(1)  # solved for, filter by filter
        assert tensor.t == pytest.approx(t.mean().item(), abs=1e-3)
        for i, tune in enumerate(tunes):
            kept[i] += (t / 3 * (tune[tensor.name] - base[tensor.name]).view(shape).square().sum(1)).sum().item()
    assert found.left is not None
    np.testing.assert_allclose(found.left, kept / found.norms**2, atol=1e-3)
    assert f"Left of each difference in the merge (model_stock): child {found.left[0]:.1%}" in said(found)
    assert f"model_stock's t is {np.mean([t.t for t in found.tensors]):.2f} on average" in said(found)


def test_a_linear_merge_keeps_each_normalised_weight(family: Path, tmp_path: Path) -> None:
    models = [("base", 1), ("tune", 2), ("other", 1)]
    recipe = {
        "merge_method": "linear",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / n), "parameters": {"weight": w}} for n, w in models],
        "dtype": "float32",
    }
    path = tmp_path / "linear.yml"
    path.write_text(yaml.safe_dump(recipe))
    found = steer.kin(path)
    assert found.left is not None
    np.testing.assert_allclose(found.left, [0.5, 0.25])
    base, merged = weights(family / "base"), weights(merge(path, tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj.weight"
    tune, other = (weights(family / n)[name] - base[name] for n in ("tune", "other"))
    torch.testing.assert_close(merged[name] - base[name], 0.5 * tune + 0.25 * other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"merge_method": "task_arithmetic"},
        {"merge_method": "linear", "parameters": {"weight": [0, 1], "normalize": True}},
        {"merge_method": "linear", "parameters": {"weight": 1, "normalize": False}},
    ],
)
def test_what_other_methods_keep_is_not_guessed(family: Path, tmp_path: Path, change: dict) -> None:
    recipe = {"base_model": str(family / "base"), "parameters": {"weight": 1}, "dtype": "float32"}
    models = [{"model": str(family / n)} for n in ("tune", "other")]
    (tmp_path / "other.yml").write_text(yaml.safe_dump(recipe | {"models": models} | change))
    found = steer.kin(tmp_path / "other.yml")
    assert found.left is None
    assert f"How much of each difference {change['merge_method']} keeps is not computed." in said(found)
    assert json.loads(json.dumps(found.as_json()))["models"][0]["left"] is None


# Adapters


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    ],
)
def test_an_adapter_is_what_mergekit_merges_of_it(
    tiny_llama: Callable[..., Path], tmp_path: Path, options: dict
) -> None:
    base = save_tiny_chat(tiny_llama, tmp_path / "base", dtype=torch.bfloat16, tie=False)
    torch.manual_seed(3)
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(live, settings)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
    tuned.save_pretrained(str(tmp_path / "tune"))
    recipe = {"merge_method": "linear", "models": [{"model": "base+tune", "parameters": {"weight": 1}}]}
    (tmp_path / "one.yml").write_text(yaml.safe_dump(recipe | {"dtype": "float32"}))
    merged = merge(tmp_path / "one.yml", tmp_path / "merged")
    found = steer.kin(f"{base}+{tmp_path / 'tune'}", merged, base=base)
    assert found.norms[0] == pytest.approx(found.norms[1], rel=1e-5)
    assert found.cosines[0, 1] == pytest.approx(1, abs=1e-5)
    assert found.new(merged) < 1e-4
    assert found.changed
    assert all(t.gram.all() for t in found.changed)
    assert found.labels == ("tune", "merged")


# What does not fit, and bad input


def test_an_adapter_of_a_wider_model_is_refused_in_one_line(
    family: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    wide = AutoModelForCausalLM.from_pretrained(save_tiny_chat(tiny_llama, tmp_path / "wide", hidden_size=48))
    tuned = get_peft_model(wide, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(str(tmp_path / "tune"))
    # peft gives a line for every tensor.
    with pytest.raises(CheckpointError, match=r"the adapter does not fit the model \(.*size mismatch") as caught:
        steer.kin(f"{family / 'base'}+{tmp_path / 'tune'}", family / "other", base=family / "base")
    assert "\n" not in str(caught.value)


def test_models_that_fit_have_no_mismatch(family: Path) -> None:
    assert mismatches([family / "tune", family / "other"], family / "base") == []


def test_other_vocabularies_are_reported_and_their_common_rows_compared(family: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(family, work)
    tensors = weights(work / "tune")
    rows = tensors["model.embed_tokens.weight"]
    write(work, "longer", tensors | {"model.embed_tokens.weight": torch.cat([rows, rows[:2]])}, like="tune")
    line = mismatches([work / "longer"], work / "base")
    n = rows.shape[0]
    assert line == [
        f"{work / 'longer'}: has a vocabulary of {n + 2} rows, the base {n}; mergekit stops unless the recipe says "
        f"tokenizer_source: base, and here the first {n} are compared"
    ]
    assert kin_of(work, "longer", "tune").cosines[0, 1] == pytest.approx(1, abs=1e-6)


def test_other_tokens_and_special_tokens_are_reported(family: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(family, work)
    tokenizer = work / "tune" / "tokenizer.json"
    raw = json.loads(tokenizer.read_text())
    words = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    a, b, c = words[-3:]
    raw["model"]["vocab"] |= {a: raw["model"]["vocab"][b], b: raw["model"]["vocab"][a]}
    raw["model"]["vocab"]["novel"] = raw["model"]["vocab"].pop(c)
    tokenizer.write_text(json.dumps(raw))
    settings = work / "tune" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": a}))
    lines = mismatches([work / "tune", work / "other"], work / "base")
    assert any(f"2 of {len(words)}" in line and "with other ids" in line for line in lines), lines
    assert any("missing, the first" in line and repr(c) in line for line in lines)
    assert any("that the base lacks, the first 'novel'" in line for line in lines)
    assert any(f"eos_token is {a!r}, in the base" in line for line in lines)
    assert not [line for line in lines if line.startswith(str(work / "other"))]


def test_another_size_or_architecture_is_reported_before_it_is_refused(
    family: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    wide = save_tiny_chat(tiny_llama, tmp_path / "wide", hidden_size=48)
    lines = mismatches([wide], family / "base")
    assert len(lines) == 1
    assert lines[0].startswith(f"{wide}: model.embed_tokens.weight is [")
    assert "mergekit stops at the first" in lines[0]
    with pytest.raises(
        CheckpointError, match=r"wide: model.embed_tokens.weight: expected the shape .* leave the model"
    ):
        steer.kin(wide, base=family / "base")
    mistral = save_tiny_chat(tiny_llama, tmp_path / "mistral", architecture="Mistral")
    assert "is a mistral, the base" in mismatches([mistral], family / "base")[0]


def test_a_model_without_a_tokenizer_is_reported(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "tune", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    (line,) = mismatches([tmp_path / "bare"], family / "base")
    assert line.startswith(f"{tmp_path / 'bare'}: its tokenizer cannot be compared: ")
    assert "\n" not in line


def test_missing_and_additional_tensors(family: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(family, work)
    tensors = weights(work / "tune")
    lost = "model.layers.1.mlp.up_proj.weight"
    write(work, "less", {n: t for n, t in tensors.items() if n != lost}, like="tune")
    write(work, "more", tensors | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}, like="tune")
    assert f"less: lacks 1 tensor ({lost}); mergekit stops" in mismatches([work / "less"], work / "base")[0]
    assert "that the base lacks; mergekit leaves them out" in mismatches([work / "more"], work / "base")[0]
    with pytest.raises(CheckpointError, match=f"less: expected tensor {lost} of .*base, found none"):
        kin_of(work, "less", "tune")


def test_a_head_that_is_tied_in_one_model_is_compared_with_the_embedding(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    for name, tie in (("tied", True), ("untied", False)):
        save_tiny_chat(tiny_llama, tmp_path / name, tie=tie)
    tensors = weights(tmp_path / "tied")
    write(tmp_path, "untied", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 0.25})
    found = steer.kin(tmp_path / "untied", base=tmp_path / "tied")
    head = next(t for t in found.tensors if t.kind == "head")
    assert head.gram[0, 0] == pytest.approx(tensors["model.embed_tokens.weight"].numel() / 16, rel=1e-4)
    assert [t.name for t in found.changed] == ["lm_head.weight"]


@pytest.mark.parametrize("where", ["tune", "base"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(family: Path, tmp_path: Path, where: str, value: float) -> None:
    work = tmp_path / "work"
    shutil.copytree(family, work)
    tensors = weights(work / where)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name][3, 4] = value
    write(work, where, tensors)
    with pytest.raises(CheckpointError, match=rf"{where}: {name}: expected finite weights, found some that are not"):
        kin_of(work, "other", "tune")


def test_a_base_and_another_model_are_needed(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base: expected the model that these are tunes of, found none"):
        steer.kin(family / "tune")
    with pytest.raises(UsageError, match="expected a model beside the base"):
        steer.kin(family / "base", base=family / "base")
    with pytest.raises(SteerError, match="gone"):
        steer.kin(family / "gone", base=family / "base")
    recipe = {"merge_method": "linear", "models": [{"model": str(family / "tune"), "parameters": {"weight": 1}}]}
    (tmp_path / "bare.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=r"bare.yml: expected a base_model, found none; name the base with --base"):
        steer.kin(tmp_path / "bare.yml")
    assert steer.kin(tmp_path / "bare.yml", base=family / "base").left == pytest.approx([1.0])
    with pytest.raises(UsageError, match="expected one recipe, or models and --base"):
        steer.kin(tmp_path / "bare.yml", family / "tune", base=family / "base")
    (tmp_path / "odd.yml").write_text(yaml.safe_dump(recipe | {"base_model": str(family / "base"), "dtype": "float"}))
    assert steer.kin(tmp_path / "odd.yml").norms[0] > 0
    (tmp_path / "odd.yml").write_text(yaml.safe_dump(recipe | {"base_model": str(family / "base"), "dtype": "wide"}))
    with pytest.raises(UsageError, match=r"odd.yml: dtype: expected float32, bfloat16 or float16, found wide"):
        steer.kin(tmp_path / "odd.yml")
    with pytest.raises(UsageError, match="expected one of the models"):
        kin_of(family, "tune").new("nobody")


def test_one_model_has_norms_and_no_t(family: Path) -> None:
    found = kin_of(family, "tune")
    assert found.norms[0] > 0
    assert found.new(family / "tune") == 1
    assert all(t.t is None for t in found.tensors)
    assert "t is" not in said(found)


def test_progress_counts_the_bytes_that_are_read(family: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = steer.kin(
        family / "tune",
        family / "other",
        base=family / "base",
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (found.bytes_read, found.bytes_read)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert found.bytes_read == 3 * sum(t.numel() * 4 for t in weights(family / "base").values())


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_every_architecture_has_a_block_and_a_kind(name: str, tmp_path: Path) -> None:
    base = TINY[name].save(tmp_path / "base", torch.bfloat16)
    tensors = load_file(base / FILE)
    tune = {n: t + 0.125 if t.ndim > 1 else t for n, t in tensors.items()}
    write(tmp_path, "tune", tune)
    found = steer.kin(tmp_path / "tune", base=base)
    assert {t.name for t in found.tensors} == {n for n, t in tensors.items() if t.is_floating_point()}
    assert [t.name for t in found.tensors if t.kind == "other"] == []
    for block in range(BLOCKS):
        assert {"attention", "mlp"} <= {t.kind for t in found.tensors if t.block == block}
    assert {t.kind for t in found.tensors if t.block is None} <= {"embedding", "head", "norm"}
    assert {t.name for t in found.changed} == {n for n, t in tensors.items() if t.ndim > 1 and t.is_floating_point()}

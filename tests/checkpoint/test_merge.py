"""Merges by mergekit itself, on tiny checkpoints: what comes out, and that it is complete or absent."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.io.tensor_writer import TensorWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_chat import TEMPLATE, save_tiny_chat
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.checkpoint.kin import kin
from steer.checkpoint.merge import MANIFEST, is_merge_of, merge, read_recipe, recipe_models
from steer.errors import CheckpointError, OutputExistsError, SteerError

RECIPES = Path(__file__).parents[2] / "examples" / "merge"
LINEAR = {
    "merge_method": "linear",
    "models": [
        {"model": "a", "parameters": {"weight": 0.25}},
        {"model": "b", "parameters": {"weight": 0.75}},
    ],
    "dtype": "float32",
}
STOCK = {
    "merge_method": "model_stock",
    "base_model": "a",
    "models": [{"model": "a+tune"}, {"model": "b"}, {"model": "c"}],
    "dtype": "float32",
    "out_dtype": "bfloat16",
}
SCALE = 2.0
"""What the adapter's product is multiplied by: alpha / rank."""


@pytest.fixture(scope="module")
def tunes(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bf16 checkpoints `a`, `b`, `c` and an adapter `tune` of `a`. Not to be changed."""
    folder = tmp_path_factory.mktemp("tunes")
    for seed, name in enumerate("abc"):
        save_tiny_chat(tiny_llama, folder / name, seed=seed, dtype=torch.bfloat16)
    torch.manual_seed(3)
    settings = LoraConfig(
        r=2, lora_alpha=int(2 * SCALE), target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32)
    get_peft_model(model, settings).save_pretrained(str(folder / "tune"))
    return folder


@pytest.fixture
def folder(tunes: Path, tmp_path: Path) -> Path:
    """A copy of it, with the recipes `linear.yml` and `stock.yml` beside the models."""
    shutil.copytree(tunes, tmp_path / "work")
    write(tmp_path / "work" / "linear.yml", LINEAR)
    write(tmp_path / "work" / "stock.yml", STOCK)
    return tmp_path / "work"


def write(path: Path, recipe: object) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def with_adapter(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """`W + scale * B A` in fp32, as PEFT defines it."""
    out = {name: t.float() for name, t in base.items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in [n for n in factors if n.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        out[target] = out[target] + SCALE * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    return out


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# What comes out


def test_a_linear_merge_is_the_weighted_average(folder: Path) -> None:
    out = merge(folder / "linear.yml", folder / "out")
    a, b, merged = weights(folder / "a"), weights(folder / "b"), weights(out)
    assert set(merged) >= set(a)
    for name in a:
        torch.testing.assert_close(merged[name], 0.25 * a[name].float() + 0.75 * b[name].float())


def test_an_adapter_is_merged_in_the_recipe_s_dtype_and_rounded_once(folder: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": "a+tune", "parameters": {"weight": 1}}],
        "dtype": "float32",
    }
    out = merge(write(folder / "one.yml", recipe), folder / "out")
    expected, merged = with_adapter(weights(folder / "a"), folder / "tune"), weights(out)
    for name in weights(folder / "a"):
        torch.testing.assert_close(merged[name], expected[name])


def rename(keys: Callable[[str], str]) -> Callable[[Path], None]:
    """Renames an adapter's tensors."""

    def change(folder: Path) -> None:
        file = folder / "tune" / "adapter_model.safetensors"
        save_file({keys(name): tensor for name, tensor in load_file(file).items()}, file)

    return change


def lose_tensor(folder: Path) -> None:
    kept = {k: v for k, v in weights(folder / "a").items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(kept, folder / "a" / "model.safetensors", metadata={"format": "pt"})


def make_pickle(folder: Path) -> None:
    (folder / "tune" / "adapter_model.safetensors").rename(folder / "tune" / "adapter_model.bin")


MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "names of a wrapper": (
        rename(lambda name: name.replace("model.model.layers", "model.language_model.layers")),
        r"tune: expected an adapter of this model, found a weight without a place, \S*language_model.layers.0",
    ),
    "a block that is not there": (
        rename(lambda name: name.replace("layers.2", "layers.7")),
        r"without a place, \S*rs.7",
    ),
    "a tensor less in the base": (lose_tensor, r"a: expected tensor model.layers.1.mlp.up_proj.weight in its files"),
    "a pickle": (make_pickle, "tune: expected adapter_model.safetensors in its files, found none; a pickle"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_an_adapter_that_does_not_fit_its_model_is_an_error_and_never_left_out(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    recipe = write(folder / "r.yml", {**LINEAR, "models": [{"model": "a+tune", "parameters": {"weight": 1}}]})
    with pytest.raises(CheckpointError, match=message):
        merge(recipe, folder / "out")
    assert not (folder / "out").exists()


def test_a_pickle_on_the_hub_is_refused_by_the_merge_and_by_kin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pickle(folder)
    cached = folder / "hub" / "models--some--tune"
    for name in ("refs", "snapshots"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (folder / "tune").rename(cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    says = "expected adapter_model.safetensors in its files, found none; a pickle"
    recipe = write(folder / "r.yml", {**LINEAR, "models": [{"model": "a+some/tune", "parameters": {"weight": 1}}]})
    with pytest.raises(CheckpointError, match=f"r.yml: some/tune: {says}"):
        merge(recipe, folder / "out")
    with pytest.raises(CheckpointError, match=f"snapshots/abc: {says}"):
        kin(f"{folder / 'a'}+some/tune", base=folder / "a")


@pytest.mark.parametrize("layers", [[2, 0], [1, 1], [-1, 2]], ids=str)
def test_a_slice_without_layers_is_refused(folder: Path, layers: list[int]) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": layers}]}]
    recipe = write(folder / "r.yml", {"merge_method": "passthrough", "slices": slices})
    with pytest.raises(SteerError, match="layer_range: expected the first layer and the one after the last"):
        read_recipe(recipe)


@pytest.mark.parametrize("end", [4, 10**12])
def test_layers_that_a_source_does_not_have_are_named_before_any_work(folder: Path, end: int) -> None:
    slices = [{"sources": [{"model": "a", "layer_range": [0, end]}]}]
    recipe = write(folder / "r.yml", {"merge_method": "passthrough", "slices": slices})
    with pytest.raises(SteerError, match=rf"r\.yml: layer_range: expected at most 3, .* of a, found \[0, {end}\]") as e:
        merge(recipe, folder / "out")
    assert "\n" not in str(e.value)
    assert not (folder / "out").exists()


def test_model_stock_is_the_formula_of_its_paper(folder: Path) -> None:
    # Jang et al. 2024: t = N c / (1 + (N - 1) c), c the mean cosine between the tunes' differences to the base.
    out = merge(folder / "stock.yml", folder / "out")
    base, merged = weights(folder / "a"), weights(out)
    tuned = [with_adapter(base, folder / "tune"), weights(folder / "b"), weights(folder / "c")]
    name = "model.layers.1.mlp.down_proj.weight"
    differences = [t[name].float() - base[name].float() for t in tuned]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [torch.cosine_similarity(differences[i].flatten(), differences[j].flatten(), dim=0) for i, j in pairs]
    c = torch.stack(cosines).mean()
    t = 3 * c / (1 + 2 * c)
    expected = base[name].float() + t * torch.stack(differences).mean(dim=0)
    assert merged[name].dtype == torch.bfloat16
    torch.testing.assert_close(merged[name].float(), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("recipe", ["linear.yml", "stock.yml"])
def test_the_output_loads_in_transformers_with_its_chat_template(folder: Path, recipe: str) -> None:
    out = merge(folder / recipe, folder / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.tensor([[1, 8, 9]])).logits.isfinite().all()
    assert model.dtype == (torch.float32 if recipe == "linear.yml" else torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.vocab_size == model.config.vocab_size


def test_the_card_names_the_output_and_no_path_of_this_machine(folder: Path) -> None:
    card = (merge(folder / "stock.yml", folder / r"out\1") / "README.md").read_text()
    assert "\n# out\\1\n" in card
    assert "* a + tune\n" in card
    assert str(folder) not in card


# Where models are looked for


def test_paths_are_looked_up_beside_the_recipe_and_then_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = merge(Path("work/linear.yml"), Path("beside"))
    (tmp_path / "recipes").mkdir()
    shutil.copy(folder / "linear.yml", tmp_path / "recipes")
    monkeypatch.chdir(folder)
    here = merge(Path("../recipes/linear.yml"), Path("here"))
    expected = (tmp_path / beside / "model.safetensors").read_bytes()
    assert (here / "model.safetensors").read_bytes() == expected


def test_a_path_may_hold_the_signs_that_mean_something_to_mergekit(folder: Path) -> None:
    strange = folder / "c++ 100% me@home"
    for name in ("a", "b", "c", "tune"):
        shutil.copytree(folder / name, strange / name)
    merge(folder / "stock.yml", folder / "plain")
    out = merge(write(strange / "stock.yml", STOCK), strange / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "plain" / "model.safetensors").read_bytes()


def test_the_tokenizer_s_model_is_looked_up_too(folder: Path) -> None:
    for extra in ({"tokenizer_source": "b"}, {"tokenizer": {"source": "b"}}):
        recipe = LINEAR | extra
        assert recipe_models(recipe) == ["a", "b"]
        out = merge(write(folder / "r.yml", recipe), folder / "-".join(extra))
        assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert recipe_models(LINEAR | {"tokenizer_source": "union"}) == ["a", "b"]


def test_all_models_are_missed_before_any_work_is_done(folder: Path) -> None:
    recipe = write(folder / "bad.yml", LINEAR | {"models": [{"model": "a"}, {"model": "someone/else"}]})
    before = names_in(folder)
    with pytest.raises(CheckpointError, match=r"bad\.yml: names a model .* someone/else"):
        merge(recipe, folder / "out")
    assert names_in(folder) == before


# Complete or absent


def test_a_merge_that_fails_leaves_nothing(folder: Path, tiny_llama: Callable[..., Path]) -> None:
    tiny_llama(folder / "deep", num_hidden_layers=2)
    models = {"models": [{"model": "a"}, {"model": "deep"}], "parameters": {"weight": 1}}
    recipe = write(folder / "bad.yml", LINEAR | models)
    before = names_in(folder)
    with pytest.raises(SteerError, match=r"bad\.yml: mergekit failed: .*same number of layers") as caught:
        merge(recipe, folder / "out")
    assert "\n" not in str(caught.value)
    assert names_in(folder) == before


def test_a_tokenizer_that_could_not_be_copied_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # mergekit logs it and carries on.
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    before = names_in(folder)
    monkeypatch.setattr(shutil, "copy", full)
    with pytest.raises(SteerError, match="the disk is full"):
        merge(folder / "linear.yml", folder / "out")
    assert names_in(folder) == before


def test_an_output_with_files_in_it_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(OutputExistsError):
        merge(folder / "no-such-recipe.yml", folder / "a")


def _merge_and_die(recipe: Path, out: Path, at: int, steps: multiprocessing.Queue[int]) -> None:
    """Merge in a child that kills itself at its `at`-th touch of a file it writes; report the touches."""
    torch.set_num_threads(1)
    count = 0

    def touched(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if writes and str(arguments[0]).startswith(str(out.parent / f".{out.name}")):
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(touched)
    merge(recipe, out)
    steps.put(count)


@pytest.mark.slow
def test_killed_at_any_moment_the_output_is_absent_or_whole_and_a_rerun_succeeds(
    folder: Path, forkserver: ForkServerContext
) -> None:
    steps = forkserver.Queue()

    def run(out: Path, at: int) -> int | None:
        child = forkserver.Process(target=_merge_and_die, args=(folder / "stock.yml", out, at, steps))
        child.start()
        child.join(60)
        return child.exitcode

    assert run(folder / "whole", -1) == 0
    total = steps.get(timeout=10)
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    assert total > 20
    for i, at in enumerate([0, 2, total // 4, total // 2, 3 * total // 4, total - 1]):
        parent = folder / f"killed-{i}"
        parent.mkdir()
        assert run(parent / "out", at) == -signal.SIGKILL
        assert not (parent / "out").exists()  # the rename is the last touch
        merge(folder / "stock.yml", parent / "out")
        assert (parent / "out" / "model.safetensors").read_bytes() == expected
        assert is_merge_of(parent / "out", folder / "stock.yml")
        assert names_in(parent) == ["out"]


# Whether a directory is the merge of a recipe


def test_a_merge_is_known_again_until_recipe_inputs_or_output_change(folder: Path) -> None:
    recipe, out = folder / "stock.yml", folder / "out"
    assert not is_merge_of(out, recipe)
    merge(recipe, out)
    assert is_merge_of(out, recipe)
    assert not is_merge_of(folder / "a", recipe)
    assert not is_merge_of(out, folder / "linear.yml")

    adapter = folder / "tune" / "adapter_model.safetensors"
    settings = [folder / "tune" / "adapter_config.json", *(folder / "b" / f"{n}.json" for n in ("config", "tokenizer"))]
    for file in (adapter, folder / "b" / "model.safetensors", out / "model.safetensors", *settings):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert not is_merge_of(out, recipe)
        file.write_bytes(before)
    assert is_merge_of(out, recipe)


def test_a_merge_is_known_again_on_another_machine(folder: Path, tmp_path: Path) -> None:
    merge(folder / "stock.yml", folder / "out")
    shutil.move(folder, tmp_path / "elsewhere")
    assert is_merge_of(tmp_path / "elsewhere" / "out", tmp_path / "elsewhere" / "stock.yml")


def test_a_second_merge_reads_an_adapter_that_changed_and_keeps_no_file_of_the_first_mapped(folder: Path) -> None:
    first = weights(merge(folder / "stock.yml", folder / "out"))
    adapter = folder / "tune" / "adapter_model.safetensors"
    save_file({name: 2 * t for name, t in load_file(adapter).items()}, adapter)
    second = weights(merge(folder / "stock.yml", folder / "again"))
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[moved], second[moved])
    if sys.platform == "linux":
        assert str(folder / "out" / ".adapters-") not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_source_is_still_mapped_when_the_output_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[bool] = []

    def finished(writer: TensorWriter) -> None:
        mapped.append(str(folder / "a" / "model.safetensors") in Path("/proc/self/maps").read_text())
        finalize(writer)

    finalize = TensorWriter.finalize
    monkeypatch.setattr(TensorWriter, "finalize", finished)
    merge(folder / "linear.yml", folder / "out")
    assert mapped == [False]


@pytest.mark.slow
def test_a_merge_leaves_logging_as_it_was(folder: Path) -> None:
    code = (
        "import logging, sys; from pathlib import Path; from steer.checkpoint.merge import merge; "
        "merge(Path(sys.argv[1]), Path(sys.argv[2])); print(logging.root.handlers)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, folder / "stock.yml", folder / "out"], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == "[]"


def test_the_manifest_holds_recipe_inputs_and_versions(folder: Path) -> None:
    manifest = json.loads((merge(folder / "stock.yml", folder / "out") / MANIFEST).read_text())
    assert manifest["recipe"] == STOCK
    assert list(manifest["inputs"]) == ["a", "a+tune", "b", "c"]
    of_adapter = {"0/model.safetensors", "0/config.json", "1/adapter_model.safetensors", "1/adapter_config.json"}
    assert of_adapter <= set(manifest["inputs"]["a+tune"])
    assert {"mergekit", "torch", "transformers"} <= set(manifest["versions"])


# The recipes that ship, without weights


def test_the_70b_recipe_is_the_one_this_project_was_born_from() -> None:
    recipe = read_recipe(RECIPES / "llama-70b-stock.yml")
    assert recipe["merge_method"] == "model_stock"
    assert recipe["base_model"] == "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF"
    assert [m["model"] for m in recipe["models"]] == [
        "Sao10K/L3.1-70B-Euryale-v2.2",
        "allenai/Llama-3.1-Tulu-3-70B",
        "rinna/llama-3-youko-70b",
        "yentinglin/Llama-3-Taiwan-70B-Instruct",
        "abacusai/Smaug-Llama-3-70B-Instruct",
        "meta-llama/Meta-Llama-3-70B",
    ]
    assert len(recipe_models(recipe)) == 7


def test_the_default_recipe_names_the_default_model_and_tunes_that_ship() -> None:
    recipe = read_recipe(RECIPES / "default.yml")
    assert recipe["merge_method"] == "model_stock"
    stock = [m["model"] for m in recipe["models"]]
    assert len(stock) >= 4
    assert "smollm2-135m-instruct" in stock
    adapters = [n.split("+")[1] for n in recipe_models(recipe) if "+" in n]
    assert recipe["base_model"].split("+")[1] in adapters
    assert all((RECIPES / a / "adapter_model.safetensors").is_file() for a in adapters)
    assert sum((RECIPES / a / "adapter_model.safetensors").stat().st_size for a in adapters) < 20e6

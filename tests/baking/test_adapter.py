"""An adapter, as peft applies it, is the checkpoint that the same edit bakes; without it the source is back."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import certify_again
from safetensors.torch import load_file, save_file
from tiny_anatomies import BLOCKS, TINY, config_of, load, logits
from torch import Tensor

from steer.baking.adapter import CONFIG
from steer.baking.bake import bake
from steer.baking.certificate import CERTIFICATE, Certificate
from steer.baking.verify import verify
from steer.checkpoint import staging
from steer.checkpoint.reader import ADAPTER
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Method, Strengths
from steer.errors import CheckpointError, SteerError, UnsupportedError

MakeDirection = Callable[..., Direction]
Maker = Callable[[MakeDirection], Edit]
TinyLlama = Callable[..., Path]
BLOCKED = (0, BLOCKS - 1)


def _applied(model: Any, adapter: Path) -> Any:
    """The adapter on the model, every tensor of it accounted for."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in ("`lora_bias=True` was passed", "Model has `tie_word_embeddings=True`"):  # both are meant
            warnings.filterwarnings("ignore", message=said)
        return PeftModel.from_pretrained(model, adapter).eval()


ABLATIONS: dict[str, Maker] = {
    "every writer": lambda d: Edit(ablate=(d(),), strength=0.8),
    "two directions, every block": lambda d: Edit(ablate=(d(), d("b", site=0, seed=8)), blocks=BLOCKED),
    "kernels": lambda d: Edit(ablate=(d(),), strengths=Strengths(Kernel(1, 2, 0.2, 0.9), Kernel(2, 1.5), 0.0)),
    "biprojected": lambda d: Edit(
        ablate=(d(),), blocks=(1, 2), method=Method("biprojected", neutral=torch.randn(BLOCKS, 32))
    ),
    "MLPs alone": lambda d: Edit(ablate=(d(),), strengths=Strengths(attention=0.0)),
}
ADDS: dict[str, Maker] = {
    "add": lambda d: Edit(add=((d(), 1.5),)),
    "ablate and add": lambda d: Edit(ablate=(d(),), blocks=BLOCKED, add=((d("b", site=2, seed=8), 1.0), (d(), -0.5))),
}
BIASED = {"llama biases", "gemma2", "gpt2", "gpt2 bare names", "gpt-neox", "gpt-neox sequential", "gpt-neox tied"}
"""Have biases at attention or MLPs, which keep the embedding out of an adapter."""
CONSTANTS = {"llama", "llama biases", "gpt2", "gpt2 bare names", "gpt-neox", "gpt-neox sequential", "gpt-neox tied"}
"""Can add a constant in a checkpoint."""
ADAPTER_CONSTANTS = {"mistral", "qwen2", "qwen3", "phi3"}
"""Can add one in an adapter alone."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint in fp64 of each anatomy, written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = TINY[name].save(tmp_path_factory.mktemp("source") / "model", torch.float64)
        return made[name]

    return get


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("edit", ABLATIONS, ids=str)
def test_under_peft_it_is_the_baked_checkpoint_and_taken_off_it_is_the_source(
    tmp_path: Path, sources: Callable[[str], Path], make_direction: MakeDirection, name: str, edit: str
) -> None:
    source, wanted = sources(name), ABLATIONS[edit](make_direction)
    if (name in BIASED and edit == "every writer") or (name == "gpt-oss" and edit != "MLPs alone"):
        with pytest.raises(UnsupportedError, match=r"peft changes the bias of .* in no adapter that changes the"):
            bake(source, tmp_path / "adapter", wanted, "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    bake(source, tmp_path / "adapter", wanted, "adapter")
    bake(source, tmp_path / "baked", wanted)
    expected = logits(load(tmp_path / "baked"))
    model = load(source)
    plain, weights = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = _applied(model, tmp_path / "adapter")
    assert (expected - plain).abs().max() > 0.05
    assert (logits(adapted) - expected).abs().max() < 1e-9
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    bare = adapted.unload()
    assert torch.equal(logits(bare), plain)
    assert all(torch.equal(p, weights[n]) for n, p in bare.named_parameters())
    names = [c.name for c in verify(tmp_path / "adapter")]
    assert names == ["certificate", "contents", "sha256", "ablation", "source"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("edit", ADDS, ids=str)
def test_a_constant_is_a_bias_of_the_adapter_where_the_architecture_lets_it_through(
    tmp_path: Path, sources: Callable[[str], Path], make_direction: MakeDirection, name: str, edit: str
) -> None:
    source, wanted = sources(name), ADDS[edit](make_direction)
    if name not in CONSTANTS | ADAPTER_CONSTANTS and (name, edit) != ("gpt-oss", "add"):
        with pytest.raises(
            UnsupportedError, match=r"norm between its MLPs|experts without biases|peft changes the bias"
        ):
            bake(source, tmp_path / "adapter", wanted, "adapter")
        return
    bake(source, tmp_path / "adapter", wanted, "adapter")
    if name in CONSTANTS:
        bake(source, tmp_path / "baked", wanted)
        expected = logits(load(tmp_path / "baked"))
    else:
        with pytest.raises(UnsupportedError) if name != "gpt-oss" else _fine():
            bake(source, tmp_path / "baked", wanted)
        expected = _added(load(source), TINY[name].block, wanted)
    model = load(source)
    plain, adapted = logits(model), _applied(model, tmp_path / "adapter")
    assert (expected - plain).abs().max() > 0.05
    assert (logits(adapted) - expected).abs().max() < 1e-9
    assert torch.equal(logits(adapted.unload()), plain)
    assert [c.name for c in verify(tmp_path / "adapter")][-2:] == ["add", "source"]


@contextmanager
def _fine() -> Iterator[None]:
    yield


def _added(model: Any, block: str, edit: Edit) -> Tensor:
    """The edit by hooks: what each MLP and attention writes, less the directions; what each block puts out, plus."""
    if edit.ablate:
        q = edit.basis()
        for b in range(BLOCKS):
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"{block.format(b)}.{writer}").register_forward_hook(
                    lambda module, args, y: y - (y @ q) @ q.T
                )
    for site, shift in edit.biases().items():

        def hook(module: object, args: object, out: Any, shift: Tensor = shift) -> Any:
            return (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift

        model.get_submodule(block.format(site)).register_forward_hook(hook)
    return logits(model)


def test_its_rank_is_the_number_of_directions_and_its_scale_is_one(
    tmp_path: Path, sources: Callable[[str], Path], make_direction: MakeDirection
) -> None:
    one, two = make_direction(), make_direction("b", seed=8)
    bake(sources("llama"), tmp_path / "out", Edit(ablate=(one, two, one.at(0))), "adapter")  # two of three are one
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    shapes = {n: t.shape for n, t in load_file(tmp_path / "out" / ADAPTER).items()}
    prefix = "base_model.model.model."
    assert shapes[f"{prefix}embed_tokens.lora_embedding_A"] == (2, 97)
    assert shapes[f"{prefix}layers.1.mlp.down_proj.lora_A.weight"] == (2, 48)
    assert shapes[f"{prefix}layers.1.mlp.down_proj.lora_B.weight"] == (32, 2)
    assert len(shapes) == 2 * (1 + 2 * BLOCKS)


def test_in_bf16_it_is_the_baked_checkpoint_to_rounding_and_nearer_to_the_exact_edit(
    tmp_path: Path, source: Path, baked: Path, ablation: Edit
) -> None:
    bake(source, tmp_path / "adapter", ablation, "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / ADAPTER).values()} == {torch.float32}
    plain = logits(load(source, torch.float32))
    exact = logits(_applied(load(source, torch.float32), tmp_path / "adapter"))
    moved = (exact - plain).norm()
    assert (logits(load(baked, torch.float32)) - exact).norm() < 0.05 * moved
    in_bf16 = logits(_applied(load(source, torch.bfloat16), tmp_path / "adapter")).float()
    assert (in_bf16 - logits(load(baked, torch.bfloat16)).float()).norm() < 0.1 * moved


def test_in_fp32_it_is_the_baked_checkpoint_to_a_millionth(
    tmp_path: Path, tiny_llama: TinyLlama, ablation: Edit
) -> None:
    source = tiny_llama(tmp_path / "source", dtype=torch.float32)
    bake(source, tmp_path / "adapter", ablation, "adapter")
    bake(source, tmp_path / "baked", ablation)
    expected = logits(load(tmp_path / "baked", torch.float32))
    got = logits(_applied(load(source, torch.float32), tmp_path / "adapter"))
    assert (got - expected).norm() < 1e-6 * expected.norm()


def test_what_keeps_the_norms_of_columns_is_refused_with_the_reason(
    tmp_path: Path, source: Path, make_direction: MakeDirection
) -> None:
    edit = Edit(ablate=(make_direction(),), method=Method(norm_preserving=True))
    with pytest.raises(UnsupportedError, match="has no low rank; bake a checkpoint"):
        bake(source, tmp_path / "out", edit, "adapter")


def test_the_config_names_its_base_and_no_more_than_it_changes(source: Path, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(source)
    assert set(config["target_modules"]) == {
        "model.embed_tokens",
        *(f"model.layers.{b}.{m}" for b in range(BLOCKS) for m in ("self_attn.o_proj", "mlp.down_proj")),
    }
    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained(adapter).peft_config["default"].r == 1


def test_the_base_of_a_hub_cache_is_named_as_the_hub_does(tmp_path: Path, source: Path, ablation: Edit) -> None:
    place = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    shutil.copytree(source, place)
    cert = bake(place, tmp_path / "out", ablation, "adapter")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == cert.source == "org/name"
    last = verify(tmp_path / "out")[-1]
    assert last.name == "source"
    assert "--source" in last.detail
    assert "all 14 tensors" in verify(tmp_path / "out", source=place)[-1].detail


@pytest.fixture(scope="module")
def adapter(source: Path, make_direction: MakeDirection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `source`. Not to be changed."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    bake(source, out, Edit(ablate=(make_direction(),), strength=0.9), "adapter", command="steer bake source out")
    return out


def test_its_certificate_holds_what_is_left_of_the_directions(source: Path, adapter: Path) -> None:
    cert = Certificate.load(adapter)
    assert (cert.form, cert.writers_edited, cert.writers_found) == ("adapter", 7, 7)
    assert all(w.remaining == pytest.approx(0.1, abs=1e-6) for w in cert.writers)
    assert cert.source_files == {n: staging.hash_file(source / n) for n in ("config.json", "model.safetensors")}
    assert set(cert.files) | {CERTIFICATE} == {
        p.relative_to(adapter).as_posix() for p in adapter.rglob("*") if p.is_file()
    }


def test_one_flipped_bit_in_any_of_its_files_is_found(adapter: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        intact = path.read_bytes()
        for at in (0, len(intact) // 2, len(intact) - 1):
            path.write_bytes(intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :])
            with pytest.raises(CheckpointError):
                verify(out)
        path.write_bytes(intact)
    verify(out)


def _forge(out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors and make the certificate say that the file is as it was written."""
    save_file(change(load_file(out / ADAPTER)), out / ADAPTER, metadata={"format": "pt"})
    certify_again(out)


_KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t | {"base_model.model.extra": torch.zeros(1)}, r"tensor base_model\.model\.extra was not expected"),
        (lambda t: {n: v for n, v in t.items() if n != _KEY.format("A")}, r"lora_A\.weight is missing"),
        (lambda t: t | {_KEY.format("A"): torch.zeros(2, 48)}, r"is F32 \[2, 48\], expected"),
        (lambda t: t | {_KEY.format("A"): t[_KEY.format("A")] * 1.001}, "does not take 0.9 of the directions out of"),
        (lambda t: t | {_KEY.format("B"): -t[_KEY.format("B")]}, "is not what .* gives"),
        (lambda t: t | {_KEY.format("B"): t[_KEY.format("B")] * 0.99}, "does not take 0.9 of the directions out of"),
        (lambda t: t | {_KEY.format("B"): t[_KEY.format("B")].flip(0)}, "does not take 0.9 of the directions out of"),
        (lambda t: t | {_KEY.format("A"): t[_KEY.format("A")].flip(1)}, "is not what .* gives"),
    ],
)
def test_what_is_no_longer_the_certified_edit_fails_even_when_its_hash_is_forged(
    adapter: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], sentence: str
) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    _forge(out, change)
    with pytest.raises(CheckpointError, match=sentence):
        verify(out)


def test_another_basis_of_the_same_directions_is_the_same_adapter(
    tmp_path: Path, source: Path, make_direction: MakeDirection
) -> None:
    """Which basis comes out of the same directions depends on the machine's libraries."""
    bake(source, tmp_path / "out", Edit(ablate=(make_direction(), make_direction("b", seed=8))), "adapter")
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])

    def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # `B A = (B R^T) (R A)` for any rotation R.
        return {n: (turn @ t if "A" in n.rpartition("lora_")[2] else t @ turn.T) for n, t in tensors.items()}

    _forge(tmp_path / "out", turned)
    assert verify(tmp_path / "out")[-1].name == "source"


def test_a_bias_that_is_not_the_add_fails_even_when_its_hash_is_forged(
    tmp_path: Path, source: Path, make_direction: MakeDirection
) -> None:
    bake(source, tmp_path / "out", Edit(add=((make_direction(), 1.0),)), "adapter")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.bias"
    _forge(tmp_path / "out", lambda t: t | {name: t[name].flip(0)})
    with pytest.raises(CheckpointError, match=r"lora_B\.bias is not the bias certified"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("file", [ADAPTER, CONFIG, "README.md"])
def test_a_file_that_is_missing_is_named(adapter: Path, tmp_path: Path, file: str) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    (out / file).unlink()
    with pytest.raises(CheckpointError, match=f"file {file} is missing"):
        verify(out)


def test_another_source_than_the_certified_one_is_refused(adapter: Path, mine: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not the file that .* was made from"):
        verify(adapter, source=mine)


def test_weights_that_are_not_finite_leave_nothing(mine: Path, tmp_path: Path, ablation: Edit) -> None:
    tensors = load_file(mine / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight puts nan"):
        bake(mine, tmp_path / "out", ablation, "adapter")
    assert not list(tmp_path.glob("*out*"))


def test_it_goes_into_no_directory_with_files_in_it(source: Path, adapter: Path, ablation: Edit) -> None:
    with pytest.raises(SteerError, match="expected a new or empty directory"):
        bake(source, adapter, ablation, "adapter")


def test_what_a_source_says_of_its_blocks_is_what_the_adapter_edits(
    tmp_path: Path, tiny_llama: TinyLlama, ablation: Edit
) -> None:
    shards = tiny_llama(tmp_path / "shards", shards=True, dtype=torch.bfloat16)
    single = tiny_llama(tmp_path / "single", dtype=torch.bfloat16)
    assert config_of(shards) == config_of(single)
    one, other = (bake(s, tmp_path / f"{s.name}-out", ablation, "adapter") for s in (shards, single))
    assert one.files[ADAPTER] == other.files[ADAPTER]
    assert len(one.source_files) > len(other.source_files)

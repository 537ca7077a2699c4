"""fp8 with a scale a block bakes as the bf16 checkpoint it stands for; every other quantised kind is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.baking.bake import bake
from steer.baking.certificate import Certificate
from steer.baking.verify import verify
from steer.checkpoint.quantised import dequantised, quantisation
from steer.checkpoint.reader import INDEX, SINGLE, CheckpointFiles, TensorInfo
from steer.checkpoint.sketch import sketch_files
from steer.core.edit import Edit
from steer.errors import CheckpointError, UnsupportedError

BLOCK = (16, 8)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
TOKENS = torch.tensor([[1, 5, 17, 60, 3, 96, 44], [1, 2, 8, 8, 71, 30, 0]])


def _quantise(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An fp8 weight and its scales, a block at a time, written down independently of what reads them."""
    rows, columns = BLOCK
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale = (weight[at].float().abs().max() / 448).to(scale_dtype).float()
            scales[i, j] = scale
            out[at] = (weight[at].float() / scale).to(torch.float8_e4m3fn)
    return out, scales.to(scale_dtype)


def _reference(weight: Tensor, scales: Tensor) -> Tensor:
    """What the pair stands for, in bf16."""
    rows, columns = BLOCK
    wide = torch.kron(scales.float(), torch.ones(rows, columns))[: weight.shape[0], : weight.shape[1]]
    return (weight.float() * wide).bfloat16()


def _to_fp8(root: Path, *, scale_dtype: torch.dtype = torch.float32, apart: bool = False) -> dict[str, Tensor]:
    """Quantise the blocks of a checkpoint in place; return the tensors in bf16 that it stands for then.

    `apart` puts the scales into separate shards.
    """
    plain: dict[str, Tensor] = {}
    weight_map, size = {}, 0
    files = sorted(root.glob("*.safetensors"))
    for file in files:
        stored: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if name.endswith("proj.weight"):
                stored[name], stored[name + "_scale_inv"] = _quantise(tensor, scale_dtype)
                plain[name] = _reference(stored[name], stored[name + "_scale_inv"])
            else:
                stored[name] = plain[name] = tensor
        parts = {file.name: stored}
        if apart:
            scales = {k: stored.pop(k) for k in list(stored) if k.endswith("_scale_inv")}
            parts |= {f"scales-{file.name}": scales} if scales else {}
        for part, tensors in parts.items():
            save_file(tensors, root / part, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, part)
            size += sum(t.nbytes for t in tensors.values())
    if (root / INDEX).exists():
        (root / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return plain


def _read(files: CheckpointFiles) -> dict[str, Tensor]:
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    return {n: torch.frombuffer(files.read(t), dtype=dtypes[t.dtype]).view(t.shape) for n, t in files.tensors.items()}


@pytest.fixture(params=["one file", "shards", "scales apart", "ue8m0"])
def fp8(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """(an fp8 checkpoint, the bf16 one that it stands for). Sizes no block divides are among them."""
    form = request.param
    shards = form in ("shards", "scales apart")
    source, plain = (
        tiny_llama(tmp_path / name, dtype=torch.bfloat16, shards=shards, tie=False, intermediate_size=44)
        for name in ("fp8", "plain")
    )
    scale_dtype = torch.float8_e8m0fnu if form == "ue8m0" else torch.float32
    wanted = _to_fp8(source, scale_dtype=scale_dtype, apart=form == "scales apart")
    for file in plain.glob("*.safetensors"):
        save_file({name: wanted[name] for name in load_file(file)}, file, metadata={"format": "pt"})
    return source, plain


def test_fp8_weights_read_as_the_bf16_they_stand_for(fp8: tuple[Path, Path]) -> None:
    source, plain = map(CheckpointFiles.open, fp8)
    got, want = _read(dequantised(source)), _read(plain)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert dequantised(source).config == plain.config
    assert dequantised(plain) is plain


def test_baked_fp8_is_the_baked_bf16_checkpoint(fp8: tuple[Path, Path], ablation: Edit, tmp_path: Path) -> None:
    source, plain = fp8
    cert = bake(source, tmp_path / "out", ablation)
    expected = bake(plain, tmp_path / "expected", ablation)
    got, want = (_read(CheckpointFiles.open(tmp_path / name)) for name in ("out", "expected"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert cert.writers == expected.writers
    assert cert.config == {"quantization_config": None}
    assert Certificate.load(tmp_path / "out") == cert
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((plain / "config.json").read_text())
    if (tmp_path / "out" / INDEX).exists():
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert set(index["weight_map"]) == set(got)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    assert [c.name for c in verify(tmp_path / "out")][-1] == "ablation"


def test_transformers_reads_the_same_weights_from_the_fp8_checkpoint(
    tmp_path: Path, tiny_llama: Callable[..., Path], ablation: Edit
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "fp8", dtype=torch.bfloat16, tie=False)
    _to_fp8(source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()  # on a CPU it dequantises
    ours = _read(dequantised(CheckpointFiles.open(source)))
    state = theirs.state_dict()
    assert all(torch.equal(state[name], ours[name]) for name in ours)
    bake(source, tmp_path / "out", ablation)
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.isfinite(baked(TOKENS).logits).all()
        assert not torch.equal(baked(TOKENS).logits, theirs(TOKENS).logits)


def test_a_direction_found_on_the_fp8_checkpoint_as_it_is_loaded_knows_its_files(fp8: tuple[Path, Path]) -> None:
    ours, loaded = map(sketch_files, fp8)
    assert ours.distance(loaded) == 0


def _change(**tensors: Tensor | None) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        kept = load_file(root / SINGLE) | {k.replace("__", "."): v for k, v in tensors.items()}
        save_file({k: v for k, v in kept.items() if v is not None}, root / SINGLE, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_change(model__layers__1__mlp__down_proj__weight_scale_inv=None), "found none"),
        (_change(model__layers__1__mlp__down_proj__weight_scale_inv=torch.ones(2, 3)), r"found F32 \[2, 3\]"),
        (_change(model__layers__1__mlp__down_proj__weight_scale_inv=torch.ones(2, 6).int()), r"found I32 \[2, 6\]"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_one_line(
    tmp_path: Path, tiny_llama: Callable[..., Path], ablation: Edit, damage: Callable[[Path], None], found: str
) -> None:
    source = tiny_llama(tmp_path / "fp8", dtype=torch.bfloat16)
    _to_fp8(source)
    damage(source)
    with pytest.raises(CheckpointError, match=rf"expected scales of model.layers.1.mlp.down_proj.*{found}") as e:
        bake(source, tmp_path / "out", ablation)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method gptq"),
        ({"quant_method": "awq"}, "quant_method awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method bitsandbytes"),
        ({"load_in_8bit": True}, "quant_method of no name"),
        ({"quant_method": "mxfp4"}, "quant_method mxfp4"),
        ({"quant_method": "compressed-tensors"}, "quant_method compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8, without weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "fp8, without weight_block_size"),
    ],
)
def test_other_kinds_are_refused_with_what_to_do(
    mine: Path, tmp_path: Path, ablation: Edit, change_config: Callable[..., None], config: dict[str, object], says: str
) -> None:
    change_config(mine, quantization_config=config)
    kept = {p.name: p.read_bytes() for p in mine.iterdir() if p.is_file()}
    with pytest.raises(
        UnsupportedError, match=f"found quantised ones .*{says}.*bake the original weights.* adapter"
    ) as e:
        bake(mine, tmp_path / "out", ablation)
    assert "\n" not in str(e.value)
    assert {p.name: p.read_bytes() for p in mine.iterdir() if p.is_file()} == kept
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(4)),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(4, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(4, 4, dtype=torch.int8)),
    ],
)
def test_weights_that_are_quantised_without_a_word_in_the_config_are_refused_by_name(
    mine: Path, name: str, tensor: Tensor
) -> None:
    _change(**{name.replace(".", "__"): tensor})(mine)
    files = CheckpointFiles.open(mine)
    kind = quantisation(files.config, files.tensors)
    assert kind is not None
    assert name in kind.found
    with pytest.raises(UnsupportedError, match="found quantised ones"):
        dequantised(files)


def test_four_bits_among_fp8_are_refused(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    source = tiny_llama(tmp_path / "fp8", dtype=torch.bfloat16)
    _to_fp8(source)
    _change(model__layers__1__mlp__up_proj__weight=torch.zeros(48, 16, dtype=torch.int8))(source)
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight is stored as I8"):
        dequantised(CheckpointFiles.open(source))


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        ("model.layers.0.mlp.down_proj.weight_scale", True),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", True),
        ("model.layers.0.mlp.down_proj.input_scale", True),
        ("model.layers.0.mlp.experts.down_proj_scales", True),
        ("model.layers.0.mlp.experts.down_proj_blocks", True),
        ("model.layers.0.mlp.down_proj.weight_packed", True),
        ("model.layers.0.mlp.down_proj.qweight", True),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", True),
        ("logit_scale", False),
        ("model.layers.0.self_attn.logit_scale", False),
        ("model.layers.0.residual_scales", False),
        ("model.embed_scale", False),
    ],
)
def test_a_scale_of_an_architecture_s_own_is_no_sign_of_quantised_weights(name: str, quantised: bool) -> None:
    stored = TensorInfo(name, "F32", (1,), "model.safetensors", 0)
    assert (quantisation({}, {name: stored}) is not None) is quantised

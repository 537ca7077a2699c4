"""Outputs changed and certified anew: everybody can compute a hash, so `verify` computes what it can itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer.baking.adapter import CONFIG
from steer.baking.bake import bake
from steer.baking.certificate import CERTIFICATE
from steer.baking.certificate import CONTROL_VECTOR as FILE
from steer.baking.control_vector import read_control_vector, write_control_vector
from steer.baking.verify import verify
from steer.checkpoint.reader import ADAPTER, SINGLE
from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import CheckpointError, UsageError

Body = dict[str, Any]
O_PROJ, Q_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def forge(out: Path, change: Callable[[Body], object], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Put tensors in, change the certificate, and make every hash right again."""
    if tensors:
        save_file(load_file(out / SINGLE) | tensors, out / SINGLE, metadata={"format": "pt"})
    body = json.loads((out / CERTIFICATE).read_text())
    body.pop("sha256")
    body["files"] = {name: hash_file(out / name) for name in body["files"]}
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (out / CERTIFICATE).write_text(json.dumps(body | {"sha256": digest}))
    return out


@pytest.fixture
def out(baked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(baked, tmp_path / "copy"))


def every(key: str, value: object) -> Callable[[Body], object]:
    return lambda body: [proof.update({key: value}) for proof in body["writers"]]


def test_what_is_forged_back_to_what_it_was_passes(out: Path, source: Path) -> None:
    checks = verify(forge(out, lambda body: None), source=source)
    assert checks[-1].name == "source"


FORGERIES: dict[str, tuple[Callable[[Body], object], str]] = {
    "tensors that are not loaded": (lambda b: b.update(unloaded=["mtp.fc.weight"]), "unloaded"),
    "a zero bias that is none": (
        lambda b: b["biases"].append({"tensor": Q_PROJ, "site": None, "created": False, "norm": 1.0}),
        "biases",
    ),
    "a direction's name": (lambda b: b["directions"][0].update(name="x"), "directions"),
    "no proofs": (lambda b: b.update(writers=[]), "writers"),
    "a proof taken out": (lambda b: b["writers"].pop(3), "writers"),
    "a proof twice": (lambda b: b["writers"].append(b["writers"][0]), "writers"),
    "another strength": (every("strength", 0.5), "writers"),
    "another axis": (every("axis", 1), "writers"),
    "another dtype": (every("dtype", "F16"), "writers"),
    "a norm made up": (every("norm", 1e12), "puts"),
    "a norm of nan": (every("norm", float("nan")), "puts"),
    "before is infinite": (every("before", float("inf")), "puts"),
    "writers found": (lambda b: b.update(writers_found=999), "writers_found"),
    "least strength": (lambda b: b.update(strength=0.3), "strength"),
    "an edit of nothing": (lambda b: b["edit"].update(ablate=[]), "edit"),
    "an architecture": (lambda b: b.update(architecture="MistralForCausalLM"), "architecture"),
    "a direction elsewhere": (lambda b: b["directions"][0].update(file="../x"), "direction file"),
    "no directions": (lambda b: b.update(directions=[], edit={}), ""),
}


@pytest.mark.parametrize(("change", "sentence"), FORGERIES.values(), ids=FORGERIES)
def test_a_certificate_that_claims_what_the_files_do_not_show_is_found(
    out: Path, change: Callable[[Body], object], sentence: str
) -> None:
    with pytest.raises((CheckpointError, UsageError), match=sentence) as e:
        verify(forge(out, change))
    assert "\n" not in str(e.value)


Tensors = dict[str, torch.Tensor]
DOWN_A, DOWN_B = (f"base_model.model.model.layers.2.mlp.down_proj.lora_{x}.weight" for x in "AB")
O_A, O_B = (f"base_model.model.model.layers.1.self_attn.o_proj.lora_{x}.weight" for x in "AB")


def forge_adapter(
    out: Path, certificate: Callable[[Body], object], tensors: Callable[[Tensors], object], config: Body
) -> Path:
    """Change tensors, config and certificate of an adapter, and make every hash right again."""
    stored = load_file(out / ADAPTER)
    tensors(stored)
    save_file(stored, out / ADAPTER, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(json.loads((out / CONFIG).read_text()) | config))

    def change(body: Body) -> None:
        body["tensors"] = {n: [ADAPTER, "F32", list(t.shape)] for n, t in stored.items()}
        certificate(body)

    return forge(out, change)


@pytest.fixture(scope="module")
def adapter(source: Path, ablation: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `source`, whose base model is a hub name. Not to be changed."""
    place = tmp_path_factory.mktemp("hub") / "models--org--name" / "snapshots" / "c0ffee"
    shutil.copytree(source, place)
    bake(place, place.parent / "adapter", ablation, "adapter")
    return place.parent / "adapter"


def without(tensor: str) -> Callable[[Body], object]:
    return lambda b: b.update(writers=[w for w in b["writers"] if w["tensor"] != tensor])


def first(key: str, value: object) -> Callable[[Body], object]:
    return lambda b: b["writers"][0].update({key: value})


def keep(x: Any) -> None:
    """Change nothing."""


ADAPTER_FORGERIES: dict[str, tuple[Callable[[Body], object], Callable[[Tensors], object], Body, str]] = {
    "no proofs": (lambda b: b.update(writers=[]), keep, {}, "writers of the certificate"),
    "a proof taken out": (without(O_PROJ), keep, {}, "writers of the certificate"),
    "a proof and its tensors taken out": (
        without(O_PROJ), lambda t: [t.pop(O_A), t.pop(O_B)], {}, "writers of the certificate",
    ),
    "the embedding's proof taken out": (without("model.embed_tokens.weight"), keep, {}, "writers of the certificate"),
    "a proof twice": (lambda b: b["writers"].append(b["writers"][0]), keep, {}, "writers of the certificate"),
    "another strength": (every("strength", 0.5), keep, {}, "writers of the certificate"),
    "another axis": (every("axis", 1), keep, {}, "writers of the certificate"),
    "a kind": (first("kind", "mlp"), keep, {}, "writers of the certificate"),
    "a dtype": (first("dtype", "F64"), keep, {}, "writers of the certificate"),
    "another tensor": (first("tensor", "model.layers.0.mlp.up_proj.weight"), keep, {}, "is no writer"),
    "what was there made up": (every("before", 1e12), keep, {}, "does not take"),
    "what is left made up, and a norm": (
        lambda b: [w.update(after=w["before"], norm=1e12) for w in b["writers"]], keep, {}, "does not take",
    ),
    "a norm of nan": (first("norm", float("nan")), keep, {}, "does not take"),
    "a tensor nobody proves": (
        keep, lambda t: t.update({n.replace("2", "7"): t[n] + 1 for n in (DOWN_A, DOWN_B)}), {},
        "tensors of the certificate",
    ),
    "least strength": (lambda b: b.update(strength=0.3), keep, {}, "strength of the certificate"),
    "an architecture": (lambda b: b.update(architecture="GPT2LMHeadModel"), keep, {}, "is no writer"),
    "no architecture": (lambda b: b.update(architecture="x"), keep, {}, "architecture x of the certificate is unknown"),
    "fewer writers than edited": (lambda b: b.update(writers_found=3), keep, {}, "writers_found"),
    "an edit of half": (lambda b: b["edit"].update(strength=0.5), keep, {}, "writers of the certificate"),
    "an add that is not there": (
        lambda b: (b["edit"].update(add=[{"name": "moral", "site": 1, "amount": 1.0, "share_of_residual_norm": 2.0}]),
                   b["directions"].append(b["directions"][0] | {"amount": 1.0})), keep, {}, "biases of the certificate",
    ),
    "a direction's name": (lambda b: b["directions"][0].update(name="x"), keep, {}, "directions of the certificate"),
    "twice the scale": (keep, keep, {"lora_alpha": 2}, "lora_alpha is not what its tensors"),
    "a pattern of scales": (keep, keep, {"alpha_pattern": {"model.embed_tokens": 9}}, "alpha_pattern"),
    "another scale rule": (keep, keep, {"use_rslora": True}, "use_rslora"),
    "a module fewer": (keep, keep, {"target_modules": ["model.embed_tokens"]}, "target_modules"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("certificate", "tensors", "config", "sentence"), ADAPTER_FORGERIES.values(), ids=ADAPTER_FORGERIES
)
def test_an_adapter_whose_certificate_claims_what_its_files_do_not_show_is_found_without_its_source(
    adapter: Path,
    tmp_path: Path,
    certificate: Callable[[Body], object],
    tensors: Callable[[Tensors], object],
    config: Body,
    sentence: str,
) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    assert "was not compared" in verify(forge_adapter(out, keep, keep, {}))[-1].detail
    with pytest.raises((CheckpointError, UsageError), match=sentence) as e:
        verify(forge_adapter(out, certificate, tensors, config))
    assert "\n" not in str(e.value)


def cut_last_block(body: Body) -> None:
    body["writers"] = [w for w in body["writers"] if w["block"] != 2]


@pytest.mark.parametrize(
    ("certificate", "tensors", "sentence"),
    [
        (lambda b: b.update(writers_found=99), keep, "writers_found of the certificate"),
        (lambda b: b.update(unloaded=["mtp.fc.weight"]), keep, "unloaded of the certificate"),
        (lambda b: b.update(untie_to_merge=False), keep, "untie_to_merge of the certificate"),
        (lambda b: b["source_files"].update(x="0"), keep, "source's file x"),
        (first("norm", 99.0), keep, "writers of the certificate"),
        (cut_last_block, lambda t: [t.pop(n) for n in list(t) if ".2." in n], "is missing"),
    ],
)
def test_what_only_the_source_knows_of_an_adapter_is_compared_with_it(
    adapter: Path,
    source: Path,
    tmp_path: Path,
    certificate: Callable[[Body], object],
    tensors: Callable[[Tensors], object],
    sentence: str,
) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    assert verify(forge_adapter(out, keep, keep, {}), source=source)[-1].name == "source"
    left = [m for m in json.loads((out / CONFIG).read_text())["target_modules"] if ".2." not in m]
    config: Body = {"target_modules": left} if certificate is cut_last_block else {}
    with pytest.raises(CheckpointError, match=sentence):
        verify(forge_adapter(out, certificate, tensors, config), source=source)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: b.update(biases=[]), "biases of the certificate"),
        (lambda b: b["biases"][0].update(norm=1e12), "biases of the certificate"),
        (lambda b: b["biases"][0].update(norm=float("nan")), "biases of the certificate"),
        (lambda b: b["biases"].append(b["biases"][0]), "biases of the certificate"),
        (lambda b: b.update(architecture="GPT2LMHeadModel"), "architecture of the certificate"),
        (lambda b: b.update(writers_found=7), "writers of the certificate"),
        (lambda b: b.update(strength=0.5), "strength of the certificate"),
        (lambda b: b["edit"]["add"][0].update(amount=2.0), "edit of the certificate"),
        (lambda b: b["directions"][0].update(amount=2.0), "edit of the certificate"),
        (lambda b: b["directions"][0].update(site=2), "directions of the certificate"),
        (lambda b: b["directions"][0]["provenance"].update(seed=0), "directions of the certificate"),
        (lambda b: b.update(config={"a": 1}), "config of the certificate"),
    ],
)
def test_a_control_vector_whose_certificate_claims_what_its_file_does_not_hold_is_found(
    source: Path,
    tmp_path: Path,
    make_direction: Callable[..., Direction],
    change: Callable[[Body], object],
    sentence: str,
) -> None:
    bake(source, tmp_path / "cv", Edit(add=((make_direction(), 1.0),)), "gguf")
    verify(forge(tmp_path / "cv", keep))
    with pytest.raises(CheckpointError, match=sentence):
        verify(forge(tmp_path / "cv", change))


def test_a_vector_taken_out_of_the_file_and_the_certificate_is_found(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    one, other = make_direction(), make_direction("b", site=2, seed=8)
    bake(source, tmp_path / "cv", Edit(add=((one, 1.0), (other, 1.0))), "gguf")
    vectors, _ = read_control_vector(tmp_path / "cv" / FILE)
    (tmp_path / "cv" / FILE).unlink()
    write_control_vector(tmp_path / "cv" / FILE, {1: vectors[1]}, "llama")
    with pytest.raises(CheckpointError, match=r"tensor direction\.2 is missing"):
        verify(forge(tmp_path / "cv", lambda b: (b["tensors"].pop("direction.2"), b["biases"].pop(1))))


def test_what_lies_beside_a_certificate_and_is_not_certified_is_named(out: Path, tmp_path: Path) -> None:
    (out / ".git").mkdir()
    (out / ".gitattributes").write_text("")
    hidden = next(c for c in verify(out) if c.name == "hidden files")
    assert hidden.detail == "not certified, and loaded by nothing: .git, .gitattributes"
    (out / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"/empty: .* a folder without a certified file; remove it"):
        verify(out)
    (out / "empty").rmdir()
    (tmp_path / "other").mkdir()
    (out / "link").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"/link: .* a link to a folder; remove it"):
        verify(out)
    (out / "link").unlink()
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"/config\.json: .* found a link that leads out of it"):
        verify(out)


def test_an_output_in_the_hub_cache_is_links_and_verifies(out: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--calm"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    place = Path(shutil.copytree(out, repository / "snapshots" / "c0ffee"))
    for n, path in enumerate(sorted(p for p in place.rglob("*") if p.is_file())):
        path.rename(repository / "blobs" / str(n))
        path.symlink_to(repository / "blobs" / str(n))
    verify(place)


def test_writers_put_back_are_found_whatever_the_certificate_says_of_them(out: Path, source: Path) -> None:
    whole = load_file(source / SINGLE)
    writers = {
        k: v for k, v in whole.items() if k.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
    }
    for name in ("before", "norm"):
        with pytest.raises(CheckpointError):
            verify(forge(out, every(name, 1e12), writers))
    with pytest.raises(CheckpointError, match="writers"):
        verify(forge(out, lambda b: b.update(writers=[]), writers))


def test_a_writer_of_nan_is_found(out: Path) -> None:
    nan = torch.full((32, 32), torch.nan, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="o_proj"):
        verify(forge(out, lambda b: None, {O_PROJ: nan}))


def test_a_tensor_that_the_edit_has_no_business_with_is_compared_with_the_source(out: Path, source: Path) -> None:
    zero = torch.zeros(32, 32, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is not what .* gives"):
        verify(forge(out, lambda b: None, {Q_PROJ: zero}), source=source)


def test_a_writer_replaced_by_another_without_the_direction_is_found_with_the_source(out: Path, source: Path) -> None:
    zero = torch.zeros(32, 32, dtype=torch.bfloat16)
    change = lambda b: [p.update(after=0.0, norm=0.0) for p in b["writers"] if p["tensor"] == O_PROJ]  # noqa: E731
    with pytest.raises(CheckpointError, match=f"{O_PROJ} is not what .* gives"):
        verify(forge(out, change, {O_PROJ: zero}), source=source)


def test_a_change_of_the_config_that_is_kept_quiet_is_found_with_the_source(out: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is not what"):
        verify(forge(out, lambda b: b.update(config={})), source=source)


def test_another_source_and_one_that_is_not_there_are_named(
    out: Path, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match="is not the file that"):
        verify(out, source=tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=5))
    with pytest.raises(CheckpointError, match="expected a model directory, found none"):
        verify(out, source=tmp_path / "nowhere")


def test_an_add_that_is_not_there_any_more_is_found(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    out = tmp_path / "out"
    bake(source, out, Edit(add=((make_direction(), -1.0),)))
    assert verify(out, source=source)[-1].name == "source"
    with pytest.raises(CheckpointError, match="biases"):
        verify(forge(out, lambda b: b.update(biases=[])))


def test_a_source_beside_a_control_vector_is_refused(
    source: Path, tmp_path: Path, make_direction: Callable[..., Direction]
) -> None:
    bake(source, tmp_path / "cv", Edit(add=((make_direction(), 1.0),)), "gguf")
    with pytest.raises(UsageError, match="--source: expected none"):
        verify(tmp_path / "cv", source=source)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1], {"a": 1}, [[]], [{"a": 1}]])
def test_contents_of_the_wrong_kind_are_one_line(out: Path, value: object) -> None:
    body = json.loads((out / CERTIFICATE).read_text())
    whole = (out / CERTIFICATE).read_text()
    for key in body.keys() - {"sha256", "versions", "command", "source", "left_out", "source_files"}:
        if value == body[key] or (not value and not body[key]) or (key, value) == ("config", {}):
            continue
        with pytest.raises((CheckpointError, UsageError)) as e:
            verify(forge(out, lambda b, key=key: b.update({key: value})))
        assert "\n" not in str(e.value), key
        (out / CERTIFICATE).write_text(whole)

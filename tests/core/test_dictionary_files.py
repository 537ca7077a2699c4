"""Dictionaries on disk: sae_lens reads what we write, we read what sae_lens writes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dictionary import D, K, M, close, each_kind, inputs, random_sae

from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import feature_row, from_sae, load_dictionary, save_dictionary
from steer.core.feature import Feature
from steer.errors import CheckpointError, SteerError, UnsupportedError, UsageError

WEIGHTS = "sae_weights.safetensors"


def same(ours: Dictionary, sae: Any, *, normalize: str = "none") -> None:
    x = inputs(5, 13)
    close(ours.encode(x), sae.encode(x))
    close(ours.reconstruct(x), sae(x))
    assert ours.normalize == normalize


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A jumprelu dictionary as sae_lens saves it."""
    random_sae("jumprelu").save_model(tmp_path / "site-1")
    return tmp_path / "site-1"


def change(folder: Path, **entries: Any) -> None:
    """Rewrite entries of cfg.json; None drops one."""
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
@each_kind
def test_there_and_back_gives_the_same_activations(architecture, options, subtract, normalize, tmp_path):
    from sae_lens import SAE

    sae = random_sae(architecture, apply_b_dec_to_input=subtract, normalize_activations=normalize, **options)
    sae.save_model(tmp_path / "theirs")
    ours = load_dictionary(tmp_path / "theirs")
    same(ours, sae, normalize=normalize)
    assert (ours.site, ours.name, ours.metadata["model_name"]) == (1, "theirs", "tiny")
    save_dictionary(ours, tmp_path / "ours")
    again = SAE.load_from_disk(tmp_path / "ours")
    assert type(again) is type(sae)
    assert again.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    same(ours, again, normalize=normalize)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["cfg.json", WEIGHTS]


def trained(kind: str) -> Any:
    """A sae_lens SAE of the training kind after a few steps on random activations."""
    import sae_lens.saes as saes
    from sae_lens.saes.sae import TrainStepInput

    options = {
        "TopK": {"k": K},
        "BatchTopK": {"k": K, "topk_threshold_lr": 0.5},
        "MatryoshkaBatchTopK": {"k": K, "matryoshka_widths": [8, 24, M], "topk_threshold_lr": 0.5},
        "JumpReLU": {"jumprelu_init_threshold": 0.4},
        "Gated": {},
        "Standard": {},
    }[kind]
    torch.manual_seed(0)
    sae = getattr(saes, f"{kind}TrainingSAE")(getattr(saes, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=M, **options))
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.03)
    for step in range(20):
        coefficients = dict.fromkeys(sae.get_coefficients(), 0.0)
        out = sae.training_forward_pass(
            TrainStepInput(inputs(64, seed=step), coefficients, torch.zeros(M, dtype=torch.bool), step, False)
        )
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return sae


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU", "Gated", "Standard"])
def test_what_sae_lens_trained_is_read(kind, tmp_path):
    from sae_lens import SAE

    sae = trained(kind)
    sae.save_inference_model(tmp_path / "out")
    theirs = SAE.load_from_disk(tmp_path / "out")
    assert 0 < float((theirs.encode(inputs(50)) > 0).float().mean()) < 0.7
    ours = load_dictionary(tmp_path / "out")
    assert ours.architecture == ("jumprelu" if "Batch" in kind else kind.lower())
    same(ours, theirs)
    same(from_sae(sae), theirs)


def test_a_dictionary_keeps_its_site_norm_and_narrow_tensors_without_a_manifest(saved, tmp_path):
    from dataclasses import replace

    from sae_lens import SAE

    ours = replace(load_dictionary(saved).to(dtype=torch.bfloat16), site=2, norm=7.5, metadata={})
    save_dictionary(ours, tmp_path / "narrow")
    again = load_dictionary(tmp_path / "narrow")
    assert (again.site, again.norm) == (2, 7.5)
    assert again.W_enc.dtype == torch.bfloat16
    assert torch.equal(again.W_enc, ours.W_enc)
    # sae_lens computes in the dtype of cfg.json, so that it finds what we find.
    same(again, SAE.load_from_disk(tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("entry", "value"),
    [("norm", v) for v in ("x", -1, float("nan"), True)] + [("site", v) for v in ("1", 1.5, -1, True)],
)
def test_a_norm_or_site_of_another_kind_is_one_line_that_names_it(saved, entry, value):
    (saved / "manifest.json").write_text(json.dumps({entry: value}))
    with pytest.raises(SteerError, match=f"expected a .*number from 0 under {entry}, in its manifest.*, found ") as e:
        load_dictionary(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("k", [float("nan"), float("inf"), 10**400, "x", None, 0])
def test_a_k_that_is_no_number_of_latents_is_one_line(tmp_path, k):
    random_sae("topk", k=K).save_model(tmp_path / "topk")
    file = tmp_path / "topk" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"k": k}))
    with pytest.raises(CheckpointError, match=f"k: expected 1 to {M} latents, found"):
        load_dictionary(tmp_path / "topk")


def test_the_manifest_has_the_last_word_on_name_site_and_norm(saved):
    (saved / "manifest.json").write_text(json.dumps({"name": "tiny-1", "site": 0, "norm": 3.5, "fit": {"fvu": 0.2}}))
    ours = load_dictionary(saved)
    assert (ours.name, ours.site, ours.norm, ours.manifest["fit"]) == ("tiny-1", 0, 3.5, {"fvu": 0.2})
    assert ours.place == saved


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("blocks.0.hook_resid_pre", None),
        ("model.layers.12", 12),
        ("layers.3", 3),
        ("blocks.7.hook_mlp_out", None),
        ("blocks.7.attn.hook_z", None),
        (None, None),
    ],
)
def test_the_site_is_what_the_hook_says_and_never_guessed(saved, hook, site):
    change(saved, metadata={"hook_name": hook, "sae_lens_version": "6.54.0"})
    ours = load_dictionary(saved)
    assert ours.site == site
    if site is None:
        with pytest.raises(UsageError, match="names no site"):
            Feature("f", ours, (1,), (1.0,))


def test_a_config_from_before_version_6_is_read_as_sae_lens_reads_it(tmp_path):
    from sae_lens import SAE

    for activation in ("relu", "topk"):
        folder = tmp_path / activation
        kwargs = {"k": K} if activation == "topk" else {}
        random_sae("topk" if kwargs else "standard", **kwargs).save_model(folder)
        old = {
            "d_in": D,
            "d_sae": M,
            "dtype": "float32",
            "activation_fn_str": activation,
            "activation_fn_kwargs": kwargs,
            "normalize_activations": False,
            "hook_point": "blocks.2.hook_resid_post",
            "model_name": "old",
            "apply_b_dec_to_input": False,
        }
        (folder / "cfg.json").write_text(json.dumps(old))
        ours = load_dictionary(folder)
        same(ours, SAE.load_from_disk(folder))
        assert (ours.site, ours.subtract_b_dec, ours.metadata["model_name"]) == (2, False, "old")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": "transcoder"}, "transcoder"),
        ({"architecture": "temporal"}, "temporal"),
        ({"architecture": "matching_pursuit"}, "matching_pursuit"),
        ({"architecture": "abstopk"}, "abstopk"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it into the weights"),
        ({"normalize_activations": "covariance_whitening"}, "fold it into the weights"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"metadata": None, "architecture": None, "activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"architecture": "standard"}, "threshold too"),
    ],
)
def test_a_kind_that_would_have_to_be_guessed_is_refused_in_one_line(saved, entries, message):
    change(saved, **entries)
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_dictionary(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def test_an_old_topk_without_k_is_not_read_as_another_kind(saved):
    file = saved / "cfg.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("architecture", "metadata", "k")}
    for entries in ({"activation_fn_str": "topk"}, {"activation_fn": "relu", "activation_fn_str": "topk"}):
        file.write_text(json.dumps(old | entries))
        with pytest.raises(SteerError):
            load_dictionary(saved)


def test_a_finetuning_factor_is_refused_unless_it_is_1(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors | {"scaling_factor": torch.ones(M)}, saved / WEIGHTS)
    assert load_dictionary(saved).latents == M
    save_file(tensors | {"scaling_factor": torch.full((M,), 1.1)}, saved / WEIGHTS)
    with pytest.raises(UnsupportedError, match="scaling_factor"):
        load_dictionary(saved)


@pytest.mark.parametrize("name", ["cfg.json", WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", bytes(range(256)) * 9])
def test_missing_and_broken_files_are_one_line_that_names_them(saved, name, content):
    (saved / name).unlink() if content is None else (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_dictionary(saved)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_what_the_config_says_are_reported(saved):
    change(saved, d_sae=M + 1)
    with pytest.raises(CheckpointError, match=rf"{M + 1} latents.*\[{D}, {M}\]"):
        load_dictionary(saved)
    change(saved, d_sae=M)
    tensors = load_file(saved / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != "b_dec"}, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="expected tensor b_dec"):
        load_dictionary(saved)


def test_fp8_is_read_as_the_numbers_that_it_holds_and_integers_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    narrow = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    save_file(narrow, saved / WEIGHTS)
    ours, x = load_dictionary(saved), inputs(3)
    save_file({k: v.float() for k, v in narrow.items()}, saved / WEIGHTS)
    close(ours.encode(x), load_dictionary(saved).encode(x))
    close(ours.reconstruct(x), load_dictionary(saved).reconstruct(x))
    save_file(tensors | {"W_dec": (tensors["W_dec"] * 100).to(torch.int8)}, saved / WEIGHTS)
    with pytest.raises(UnsupportedError, match=r"expected floating-point tensors, found W_dec in torch\.int8"):
        load_dictionary(saved)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    torch.save({"W_enc": torch.ones(2, 2)}, tmp_path / "ae.pt")
    with pytest.raises(UnsupportedError, match="only safetensors"):
        load_dictionary(tmp_path)
    with pytest.raises(UnsupportedError, match="pass the directory"):
        load_dictionary(tmp_path / "ae.pt")


@pytest.mark.parametrize("place", ["gone", "./gone/1", Path("gone/1")])
def test_a_path_that_is_not_there_is_one_line_and_fetches_nothing(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"gone.*expected a dictionary's directory"):
        load_dictionary(place)


@pytest.mark.parametrize(
    ("text", "release"),
    [("gpt2-small-res-jb/no-such-id", "gpt2-small-res-jb"), ("nobody/nothing/a/b", "nobody/nothing")],
)
def test_a_release_goes_to_sae_lens_by_both_names(text, release):
    # Offline in tests: sae_lens has to say no, and says it of the names it was given.
    with pytest.raises(CheckpointError, match="sae_lens cannot load") as caught:
        load_dictionary(text)
    assert repr(release) in str(caught.value)
    assert repr(text.removeprefix(f"{release}/")) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_row_of_the_labels_is_read_and_the_others_may_be_anything(saved):
    ours = load_dictionary(saved)
    with pytest.raises(UsageError, match=r"features\.jsonl"):
        Feature.latent(ours, 3)
    assert Feature.latent(ours, 3, 2.5).units == (2.5,)
    rows = ['{"index": 13, broken', json.dumps({"index": 3, "unit": 1.5, "nearest": [[1, 0.5]]}), '{"index": 1}']
    (saved / "features.jsonl").write_text("\n".join(rows))
    assert feature_row(ours, 3)["nearest"] == [[1, 0.5]]
    feature = Feature.latent(ours, 3)
    assert (feature.name, feature.units, feature.site) == ("L1/3", (1.5,), 1)
    with pytest.raises(UsageError, match=r"latent 4.*never fired"):
        Feature.latent(ours, 4)
    with pytest.raises(UsageError, match="0 to 47"):
        Feature.latent(ours, 48)
    for index in (13, 1):
        with pytest.raises(SteerError, match="line"):
            Feature.latent(ours, index)

"""A dictionary's activations and reconstruction are sae_lens's, of all latents or of a few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.dictionary_files import from_sae
from steer.core.fit import measure_fit
from steer.errors import CheckpointError, UsageError

D, M, K = 16, 48, 6
Made = Callable[..., Any]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("gated", {}),
    ("jumprelu", {}),
    ("topk", {"k": K}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
]
NAMES = [f"{a}{'-rescaled' if 'rescale_acts_by_decoder_norm' in o else ''}" for a, o in KINDS]
each_kind = pytest.mark.parametrize(("architecture", "options"), KINDS, ids=NAMES)


def random_sae(architecture: str, *, seed: int = 0, **options: Any) -> Any:
    """A sae_lens SAE of the inference kind, every parameter random."""
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    config = {"architecture": architecture, "d_in": D, "d_sae": M, **options}
    sae = SAE.from_dict(config)
    sae.cfg.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim == 1 else 1))
            if name == "threshold":
                parameter.abs_()
    return sae


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
@each_kind
def test_activations_and_reconstruction_are_those_of_sae_lens(architecture, options, subtract, normalize):
    sae = random_sae(architecture, apply_b_dec_to_input=subtract, normalize_activations=normalize, **options)
    ours, x = from_sae(sae), inputs(3, 11)
    acts = sae.encode(x)
    assert 0 < float((acts > 0).float().mean()) < 0.7
    close(ours.encode(x), acts)
    close(ours.reconstruct(x), sae(x))
    close(ours.decode(acts.detach(), like=x), sae(x))


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@each_kind
def test_a_few_rows_of_the_encoder_give_the_columns_of_the_whole(architecture, options, normalize):
    ours = from_sae(random_sae(architecture, normalize_activations=normalize, **options))
    x = inputs(4, 25)
    whole = ours.encode(x)
    # Every latent, out of order, alone and together.
    for indices in ([5], [40, 3, 17], list(range(M))[::-1]):
        rows = ours.encode_rows(x, indices)
        assert bool((rows > 0).any())
        assert torch.equal(rows > 0, whole[..., indices] > 0)
        close(rows, whole[..., indices])


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_no_other_row_is_read(architecture):
    ours, x, wanted = from_sae(random_sae(architecture)), inputs(30), [7, 31]
    right = ours.encode(x)[:, wanted]
    others = torch.ones(M, dtype=torch.bool)
    others[wanted] = False
    for name in ("W_enc", "b_enc", "W_dec", "threshold", "b_mag", "r_mag"):
        if (tensor := getattr(ours, name)) is not None:
            (tensor.T if name == "W_enc" else tensor)[others] = torch.nan
    assert bool(ours.encode(x).isnan().any())
    close(ours.encode_rows(x, wanted), right)


def test_a_topk_dictionary_is_read_whole_only_where_a_row_is_positive():
    ours, x = from_sae(random_sae("topk", k=K)), inputs(200)
    row = ours.rows([7])
    seen: list[int] = []

    class Counting(Dictionary):
        def encode(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().encode(x)

    whole = Counting(**{f: getattr(ours, f) for f in Dictionary.__dataclass_fields__})
    acts = replace(row, whole=whole)(x)
    positive = int((row.part.encode(x) > 0).sum())
    assert seen == [positive]
    assert 0 < int((acts > 0).sum()) < positive < 200


def test_topk_settles_ties_as_torch_does():
    sae = random_sae("topk", k=3)
    with torch.no_grad():
        sae.W_enc[:, 1:9] = sae.W_enc[:, :1]
        sae.b_enc[:9] = 1.0
    ours, x = from_sae(sae), inputs(40)
    assert torch.equal(ours.encode(x) > 0, sae.encode(x) > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_and_tensors_are_computed_in_fp32(dtype):
    ours = from_sae(random_sae("jumprelu")).to(dtype=dtype)
    x = inputs(9).to(dtype)
    wide = ours.to(dtype=torch.float32)
    assert ours.W_enc.dtype == dtype
    assert ours.encode(x).dtype == ours.reconstruct(x).dtype == torch.float32
    assert torch.equal(ours.encode(x), wide.encode(x.float()))
    assert torch.equal(ours.reconstruct(x), wide.reconstruct(x.float()))
    assert ours.encode(x.double()).dtype == torch.float64


@each_kind
def test_a_unit_of_activation_moves_the_reconstruction_by_its_decoder_row(architecture, options):
    ours = from_sae(random_sae(architecture, **options))
    acts = torch.zeros(3, M)
    acts[range(3), [4, 9, 0]] = 1
    close(ours.decode(acts) - ours.b_dec, ours.decoder_rows([4, 9, 0]))
    if options.get("rescale_acts_by_decoder_norm"):
        close(ours.decoder_rows([4, 9]).norm(dim=-1), torch.ones(2))


def test_decoding_normalised_activations_wants_the_input():
    ours = from_sae(random_sae("standard", normalize_activations="layer_norm"))
    with pytest.raises(UsageError, match="reconstruct"):
        ours.decode(torch.zeros(2, M))


@pytest.mark.parametrize("indices", [[M], [-1], [0, 99]])
def test_a_latent_that_is_not_there_is_a_usage_error(indices):
    ours = from_sae(random_sae("standard"))
    with pytest.raises(UsageError, match=f"0 to {M - 1}"):
        ours.encode_rows(inputs(2), indices)


def test_tensors_that_do_not_belong_together_are_refused():
    ours = from_sae(random_sae("jumprelu"))
    with pytest.raises(CheckpointError, match=r"threshold: expected shape \[48\].*found none"):
        replace(ours, threshold=None)
    with pytest.raises(CheckpointError, match=r"W_dec: expected shape \[48, 16\].*found \[16, 48\]"):
        replace(ours, W_dec=ours.W_dec.T)
    with pytest.raises(CheckpointError, match="k: expected 1 to 48"):
        replace(ours, architecture="topk", k=49)


def test_fvu_is_the_error_over_the_variance_about_the_global_mean():
    ours = from_sae(random_sae("jumprelu"))
    x = inputs(1000) * 0.01 + 50  # far from zero: sums of squares would cancel
    fit = measure_fit(ours, x.split([1, 399, 600]))
    acts = ours.encode(x)
    error = (x - ours.decode(acts)).double().square().sum()
    assert fit.fvu == pytest.approx(float(error / (x.double() - x.double().mean(0)).square().sum()), rel=1e-9)
    assert fit.l0 == pytest.approx(float((acts > 0).sum(1).double().mean()))
    assert fit.alive == pytest.approx(float((acts > 0).any(0).double().mean()))
    assert (fit.tokens, fit.outliers) == (1000, 0)
    assert measure_fit(ours, [x]).fvu == pytest.approx(fit.fvu, rel=1e-9)


@pytest.mark.parametrize("norm", [None, 4.0])
def test_tokens_over_ten_times_the_median_norm_are_left_out_and_counted(norm):
    ours = replace(from_sae(random_sae("standard")), norm=norm)
    x = inputs(200)
    sunk = x.clone()
    sunk[3] *= 500
    fit = measure_fit(ours, [sunk[:100], sunk[100:]])
    without = measure_fit(ours, [torch.cat([x[:3], x[4:]])])
    assert fit.fvu == pytest.approx(without.fvu, rel=1e-9)
    assert replace(fit, fvu=0) == replace(without, fvu=0, outliers=1)
    with pytest.raises(UsageError, match="at least one token"):
        measure_fit(ours, [])


def test_a_fit_is_measured_a_bounded_number_of_activations_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(1))
    ours = from_sae(random_sae("standard"))
    whole, encode = measure_fit(ours, [x]), Dictionary.encode
    sizes: list[int] = []

    def counted(self: Dictionary, part: Tensor) -> Tensor:
        sizes.append(len(part))
        return encode(self, part)

    monkeypatch.setattr("steer.core.fit.AT_ONCE", 100 * M)
    monkeypatch.setattr(Dictionary, "encode", counted)
    assert measure_fit(ours, [x]).fvu == pytest.approx(whole.fvu, rel=1e-9)
    assert sizes == [100] * 10

"""A sparse step's loss and gradients against autograd through the dense formula, and against sae_lens."""

from __future__ import annotations

import pytest
import torch

from steer.errors import MismatchError, UsageError
from steer.sae.objectives import SparseObjective, Stopwatch, objective_for, start_from
from steer.sae.options import TrainOptions

WIDTH, LATENTS, TOKENS = 48, 256, 64


def options(**changes: object) -> TrainOptions:
    return TrainOptions(
        **({"latents": LATENTS, "k": 8, "tokens": 6400, "batch": TOKENS, "products": "float32"} | changes)
    )


def objective(scale: float = 0.7, **changes: object) -> SparseObjective:
    made = objective_for(options(**changes), WIDTH, scale, torch.randn(WIDTH).double(), torch.device("cpu"))
    assert isinstance(made, SparseObjective)
    g = torch.Generator().manual_seed(3)
    for weight in made.weights.values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=g)
    return made


def dense_loss(w: dict[str, torch.Tensor], xs: torch.Tensor, kind: str, k: int) -> torch.Tensor:
    """The architecture's definition, every latent computed."""
    u = (xs - w["b_dec"]) @ w["encoder"].T + w["b_enc"]
    scores = (u * w["decoder"].norm(dim=1)).detach()
    if kind == "topk":
        mask = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
    else:
        mask = (scores >= scores.flatten().topk(k * len(xs)).values.min()).float()
    return ((u.relu() * mask) @ w["decoder"] + w["b_dec"] - xs).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_loss_and_gradients_equal_the_dense_ones_to_fp32_rounding(kind):
    made = objective(architecture=kind)
    x = 3 * torch.randn(TOKENS, WIDTH)
    step = made.step(x, torch.zeros(LATENTS, dtype=torch.bool), 0, Stopwatch())
    leaves = {n: p.data.double().requires_grad_() for n, p in made.weights.items()}
    loss = dense_loss(leaves, x.double() * made.scale, kind, 8)
    loss.backward()
    assert step.mse == pytest.approx(loss.item(), rel=1e-5)
    for name, leaf in leaves.items():
        ours, theirs = made.weights[name].grad, leaf.grad
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max())), name


def lens_training(kind: str, made: SparseObjective):
    import sae_lens

    name = {"topk": "TopK", "batchtopk": "BatchTopK"}[kind]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=WIDTH, d_sae=LATENTS, k=8)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    with torch.no_grad():
        sae.W_enc.copy_(made.weights["encoder"].T)
        sae.W_dec.copy_(made.weights["decoder"])
        sae.b_enc.copy_(made.weights["b_enc"])
        sae.b_dec.copy_(made.weights["b_dec"])
    return sae


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_a_step_with_dead_latents_is_sae_lens_s_step(kind, share):
    from sae_lens.saes.sae import TrainStepInput

    made = objective(architecture=kind)
    sae = lens_training(kind, made)
    x = 3 * torch.randn(TOKENS, WIDTH)
    dead = torch.rand(LATENTS, generator=torch.Generator().manual_seed(5)) < share
    step = made.step(x, dead, 0, Stopwatch())
    out = sae.training_forward_pass(TrainStepInput(x * made.scale, {}, dead, 0, False))
    out.loss.backward()
    assert step.mse + step.aux == pytest.approx(out.loss.item(), rel=1e-5)
    assert step.l0 == pytest.approx(float((out.feature_acts > 0).sum()) / TOKENS)
    assert torch.equal(step.fired, (out.feature_acts > 0).any(0))
    pairs = {"encoder": sae.W_enc.grad.T, "decoder": sae.W_dec.grad, "b_enc": sae.b_enc.grad, "b_dec": sae.b_dec.grad}
    for name, theirs in pairs.items():
        ours = made.weights[name].grad
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())), name


def test_bf16_products_choose_nearly_the_same_and_the_values_stay_fp32():
    exact, half = objective(architecture="topk"), objective(architecture="topk", products="bfloat16")
    for name, weight in half.weights.items():
        weight.data.copy_(exact.weights[name].data)
    x = (3 * torch.randn(2000, WIDTH)).bfloat16()
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    a, b = exact.step(x, dead, 0, Stopwatch()), half.step(x, dead, 0, Stopwatch())
    # Where two latents are equal to three digits either may be taken, which hardly matters to the loss.
    assert b.mse == pytest.approx(a.mse, rel=2e-3)
    assert b.mse >= a.mse * (1 - 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_the_dictionary_reconstructs_raw_activations_as_training_did_scaled_ones(kind):
    torch.manual_seed(0)
    mean = torch.randn(WIDTH).double()
    made = objective_for(options(architecture=kind), WIDTH, 0.7, mean, torch.device("cpu"))
    x = 3 * torch.randn(400, WIDTH) + mean.float()
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    # sae_lens's running threshold starts at zero, so it needs a while to stand for the batch's own.
    for number in range(700 if kind == "matryoshka" else 2):
        last = made.step(x, dead, number, Stopwatch())
    dictionary = made.dictionary()
    error = (dictionary.reconstruct(x) - x).square().sum(1).mean() * made.scale**2
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(LATENTS), atol=1e-5)
    assert float(error) == pytest.approx(last.mse, rel=0.01 if kind == "matryoshka" else 1e-4)


def test_a_frozen_decoder_gets_no_gradient():
    made = objective(architecture="topk", frozen_decoder=True)
    made.step(torch.randn(TOKENS, WIDTH), torch.rand(LATENTS) < 0.5, 0, Stopwatch())
    assert made.weights["decoder"].grad is None
    assert made.weights["encoder"].grad is not None


@pytest.mark.parametrize(("frozen", "norm"), [(True, 1.0), (False, 0.1)])
def test_rows_of_a_decoder_that_does_not_learn_have_norm_1(frozen, norm):
    settings = options(architecture="topk", frozen_decoder=frozen)
    made = objective_for(settings, WIDTH, 1.0, torch.zeros(WIDTH).double(), torch.device("cpu"))
    assert torch.allclose(made.weights["decoder"].norm(dim=1), torch.full((LATENTS,), norm))


def test_starting_from_a_dictionary_gives_its_reconstructions_back():
    torch.manual_seed(1)
    first = objective(architecture="topk")
    parent = first.dictionary()
    second = objective(architecture="topk", seed=9, scale=1.9)
    start_from(second, parent)
    x = 3 * torch.randn(100, WIDTH)
    assert torch.allclose(second.dictionary().reconstruct(x), parent.reconstruct(x), atol=1e-4)
    with pytest.raises(MismatchError, match="--latents 256"):
        start_from(objective(latents=128), parent)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"k": 0}, "k: expected a number above 0"),
        ({"k": 500}, "k: expected at most latents"),
        ({"architecture": "vanilla"}, "architecture: expected one of"),
        ({"decay": 1.5}, "decay: expected a share"),
        ({"widths": (64, 32)}, "widths: expected rising"),
        ({"architecture": "jumprelu", "frozen_decoder": True}, "frozen_decoder: expected architecture"),
        ({"tokens": 10}, "tokens: expected at least one batch"),
    ],
)
def test_options_that_clash_are_named(changes, word):
    with pytest.raises(UsageError, match=word):
        options(**changes)


def test_the_learning_rate_rises_stays_and_falls():
    o = TrainOptions(tokens=100 * 2048, warmup=0.1, decay=0.2)
    rates = [o.rate_at(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert 0 < rates[99] < 0.1


def test_calibration_gives_batchtopk_its_k_latents_a_token():
    torch.manual_seed(0)
    made = objective(architecture="batchtopk")
    x = 3 * torch.randn(3000, WIDTH)
    made.calibrate(x)
    active = (made.dictionary().encode(x) > 0).sum() / len(x)
    assert float(active) == pytest.approx(8, rel=1e-3)

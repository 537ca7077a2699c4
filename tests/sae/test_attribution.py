"""What latents do to the model's words: gradients against finite differences, effects against tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_chat import hooks_on, replies_of, save_tiny_chat

from steer.core.dictionary import Dictionary
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.errors import MismatchError
from steer.measure.contrast import Reply
from steer.model.steered import SteeredModel, load
from steer.sae.attribution import attribution, output_scores
from steer.sae.logit_lens import logit_lens

LATENTS = 60


@pytest.fixture(scope="module")
def place(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tiny_llama, tmp_path_factory.mktemp("attribution") / "chat", tie=False)


@pytest.fixture
def model64(place: Path) -> SteeredModel:
    return load(place, dtype=torch.float64)


@pytest.fixture
def model(place: Path) -> SteeredModel:
    return load(place)


def dictionary(site: int = 1, dtype: torch.dtype = torch.float64, **more: object) -> Dictionary:
    torch.manual_seed(0)
    rows = torch.randn(LATENTS, 32, dtype=dtype) / 32**0.5
    zeros = torch.zeros(LATENTS, dtype=dtype), torch.zeros(32, dtype=dtype)
    return Dictionary("standard", rows.T.contiguous(), zeros[0], 2 * rows, zeros[1], site=site, **more)  # type: ignore[arg-type]


def mean_logprob(model: SteeredModel, d: Dictionary, reply: Reply, latent: int, scale: float) -> float:
    """Mean log-probability of the reply's tokens with one latent's part scaled at every response token."""
    prompt = model.prompt_ids(reply.chat)
    ids = torch.tensor([prompt + list(reply.ids)])

    def hook(module, args, output):  # type: ignore[no-untyped-def]
        h = (output[0] if isinstance(output, tuple) else output).clone()
        part = d.encode(h[0, len(prompt) :])[:, latent, None] * d.W_dec[latent]
        h[0, len(prompt) :] += (scale - 1) * part
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = model.hf.get_submodule(model.anatomy.block_module(d.site or 0)).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logprobs = model.hf(ids).logits[0].log_softmax(-1)
    finally:
        handle.remove()
    return float(logprobs[range(len(prompt) - 1, ids.shape[1] - 1), list(reply.ids)].mean())


@pytest.mark.parametrize("site", [0, 1, 2])
def test_attribution_is_the_derivative_by_finite_differences(model64: SteeredModel, site: int) -> None:
    d = dictionary(site)
    with_, without = (
        replies_of(model64, ["lie ba be", "well lie friend bo bu"]),
        replies_of(model64, ["truth", "yes di do"]),
    )
    # A model in fp64 still takes its RMSNorms in fp32: too small a step drowns in their rounding.
    indices, eps = [3, 0, 41], 1e-2
    got = attribution(model64, d, with_, without, indices, batch=2)

    def slope(replies: list[Reply], j: int) -> float:
        rises = [mean_logprob(model64, d, r, j, 1 + eps) - mean_logprob(model64, d, r, j, 1 - eps) for r in replies]
        return sum(rises) / len(rises) / (2 * eps)

    expected = [slope(with_, j) - slope(without, j) for j in indices]
    assert min(map(abs, expected)) > 1e-3
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=2e-3, atol=2e-5)


def test_neither_batches_nor_chunks_of_logits_change_it(model: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    d = dictionary(dtype=torch.float32)
    with_, without = (
        replies_of(model, ["lie ba be", "well lie friend bo bu", "da"]),
        replies_of(model, ["truth", "yes di"]),
    )
    whole = attribution(model, d, with_, without, range(LATENTS))
    monkeypatch.setattr("steer.model.forward.AT_ONCE", 1)
    torch.testing.assert_close(attribution(model, d, with_, without, range(LATENTS), batch=1), whole)


def test_a_half_precision_model_agrees(model: SteeredModel, place: Path) -> None:
    d = dictionary(dtype=torch.float32)
    with_, without = (
        replies_of(model, ["lie ba be bi", "well lie friend bo bu"]),
        replies_of(model, ["truth ba", "yes di"]),
    )
    exact = attribution(model, d, with_, without, range(LATENTS))
    rough = attribution(load(place, dtype=torch.bfloat16), d, with_, without, range(LATENTS))
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.99


def test_it_leaves_the_model_as_it_was(model: SteeredModel) -> None:
    asking = [p.requires_grad for p in model.hf.parameters()]
    replies = replies_of(model, ["lie", "truth"])
    attribution(model, dictionary(dtype=torch.float32), replies, replies, [0])
    with pytest.raises(IndexError, match="out of range"):  # the tokens of another vocabulary
        attribution(model, dictionary(dtype=torch.float32), [replace(replies[0], ids=(10_000,))], replies, [0])
    assert hooks_on(model) == 0
    assert [p.requires_grad for p in model.hf.parameters()] == asking
    assert all(p.grad is None for p in model.hf.parameters())


def test_outlier_tokens_have_no_part(model: SteeredModel) -> None:
    replies = replies_of(model, ["lie ba", "truth be"])
    d = dictionary(dtype=torch.float32)
    assert attribution(model, d, replies[:1], replies[1:], range(LATENTS)).abs().max() > 0
    assert attribution(model, replace(d, norm=1e-6), replies[:1], replies[1:], range(LATENTS)).abs().max() == 0


def speaking(model: SteeredModel, token: str) -> tuple[Dictionary, int]:
    """A dictionary whose latent 5, at the last site, writes what the unembedding reads for a token."""
    d = dictionary(site=2, dtype=torch.float32)
    word = model.tokenizer(token).input_ids[0]
    gain = model.hf.base_model.norm.weight
    d.W_dec[5] = (model.hf.lm_head.weight[word] / gain).detach()
    return d, word


def test_the_lens_reads_a_row_through_gain_and_unembedding(
    model: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, _ = speaking(model, "truth")
    logits = (d.W_dec * model.hf.base_model.norm.weight) @ model.hf.lm_head.weight.T
    monkeypatch.setattr("steer.model.forward.AT_ONCE", 7 * logits.shape[1])  # seven rows at a time
    top, bottom = logit_lens(model, d.W_dec, top=4)
    assert len(top) == len(bottom) == LATENTS
    assert top[5][0][0] == "truth"
    for i in range(LATENTS):
        assert [v for _, v in top[i]] == pytest.approx(logits[i].topk(4).values.tolist(), rel=1e-4)
        assert [v for _, v in bottom[i]] == pytest.approx(logits[i].topk(4, largest=False).values.tolist(), rel=1e-4)
        assert [t for t, _ in bottom[i]] == [model.tokenizer.decode([j]) for j in logits[i].topk(4, largest=False)[1]]


def test_a_feature_scores_by_how_much_it_raises_its_own_tokens(model: SteeredModel) -> None:
    d, _ = speaking(model, "truth")
    loud = Feature("loud", d, (5,), (8.0,))
    quiet = Feature("quiet", d, (5,), (0.5,))
    against = Feature("against", d, (5,), (-8.0,))
    prompts = ["hello", "friend ba be bi", "well"]
    scores = output_scores(model, d, [loud, quiet, against], prompts, batch=2)
    assert scores[0] > scores[1] > 0
    # A negative unit moves the other way, and then speaks for other tokens.
    assert scores[2] > 0
    assert scores == pytest.approx(output_scores(model, d, [loud, quiet, against], prompts), abs=1e-5)


def test_an_output_score_is_the_rise_in_log_probability_under_the_slider(model: SteeredModel) -> None:
    d, _ = speaking(model, "lie")
    feature = Feature("liar", d, (5, 9), (3.0, 2.0))
    prompts = ["hello", "friend ba be bi"]
    row = 3.0 * d.W_dec[5] + 2.0 * d.W_dec[9]
    own = ((row * model.hf.base_model.norm.weight) @ model.hf.lm_head.weight.T).topk(8).indices

    def logprobs(prompt: str) -> torch.Tensor:
        ids = torch.tensor([model.prompt_ids([{"role": "user", "content": prompt}])])
        with torch.no_grad():
            return model.hf(ids).logits[0, -1].log_softmax(-1)[own].mean()

    rises = []
    for prompt in prompts:
        before = logprobs(prompt)
        with model.edited(Edit(moves=(Slider(feature, "add", 1.0),))):
            rises.append(float(logprobs(prompt) - before))
    assert output_scores(model, d, [feature], prompts)[0] == pytest.approx(sum(rises) / 2, abs=1e-5)


def test_a_dictionary_of_another_width_is_refused(model: SteeredModel) -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 16)
    other = Dictionary("standard", rows.T.contiguous(), torch.zeros(8), rows, torch.zeros(16), site=1)
    with pytest.raises(MismatchError, match="width 16"):
        attribution(model, other, [], [], [0])
    with pytest.raises(MismatchError, match="width 16"):
        output_scores(model, other, [], [])

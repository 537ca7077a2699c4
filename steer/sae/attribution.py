"""Input and output scores of SAE latents for a trait.

`attribution` (input): gradient times activation on the model's own replies. `output_scores` (output): the effect of
adding a latent on the probability of its top tokens. `steer.finding.latents` selects latents by both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer.core.dictionary import Dictionary
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.measure.contrast import Reply, padded_replies
from steer.model.fit_check import check_fits
from steer.model.forward import changed_output, chunks, hidden_states, logits
from steer.model.loaded import Message, as_messages
from steer.model.steered import SteeredModel
from steer.model.tokens import padded
from steer.progress import Advance
from steer.sae.logit_lens import lens_topk
from steer.sae.pooling import inliers

TOP_TOKENS = 8
"""Number of a feature's top tokens that its output score is computed over."""


def attribution(
    model: SteeredModel,
    dictionary: Dictionary,
    with_replies: Sequence[Reply],
    without_replies: Sequence[Reply],
    indices: Sequence[int],
    *,
    batch: int = 16,
    on_rows: Advance = lambda n: None,
) -> Float[Tensor, " latents"]:
    """How much more the model's replies with the trait depend on each latent than its replies without, nats per token.

    For one reply: the sum over response tokens of a_j (dM/dh . d_j), with M the mean log-probability of the reply's
    own tokens, a_j the activation and d_j the decoder row. That is dM/d(eps) when the latent's part of the residual
    stream is scaled by (1 + eps) at every response token: attribution patching (Nanda 2023; Syed et al. 2023) with
    zero ablation, on dictionary latents (Marks et al. 2024). Returned is the mean over `with_replies` minus the mean
    over `without_replies`, for the latents `indices`. `on_rows` is called with the number of replies of each batch.
    Errors: those of `check_fits`.
    """
    site = check_fits(model, dictionary)

    def mean(replies: Sequence[Reply]) -> Tensor:
        rows = sorted(replies, key=lambda r: len(r.ids))
        parts = []
        for start in range(0, len(rows), batch):
            parts.append(_reply_attributions(model, dictionary, site, rows[start : start + batch], indices))
            on_rows(len(parts[-1]))
        return torch.cat(parts).mean(0) if parts else torch.zeros(len(indices))

    return mean(with_replies) - mean(without_replies)


def _reply_attributions(
    model: SteeredModel, dictionary: Dictionary, site: int, replies: Sequence[Reply], indices: Sequence[int]
) -> Float[Tensor, "replies latents"]:
    ids, mask, response = padded_replies(model, [r.prompt_ids(model) for r in replies], replies)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model.hf):
        leaf: list[Tensor] = []

        def cut(h: Tensor) -> Tensor:
            """Make the residual stream at the site a leaf that gradients flow back to."""
            leaf.append(h.detach().requires_grad_())
            return leaf[0]

        block = model.hf.get_submodule(model.anatomy.block_module(site))
        with model.untouched(), changed_output(block, cut):
            hidden = hidden_states(model, ids, mask)
        h = leaf[0]
        # The gradient of the sum over a reply's tokens; it is divided for the mean below, in fp32, to lose less in half
        # precision.
        (gradient,) = torch.autograd.grad(hidden, h, _logprob_gradient(model, hidden, ids, response))
    with torch.no_grad():
        h, gradient = h.detach(), gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        use = response.to(h.device) & inliers(dictionary, h)
        device = dictionary.W_enc.device
        along = gradient[use].to(device) @ dictionary.decoder_rows(indices).to(gradient.dtype).T
        effect = dictionary.encode_rows(h[use].to(device), indices) * along
        of = use.nonzero()[:, 0].cpu()
        out = torch.zeros(len(replies), len(indices)).index_add_(0, of, effect.float().cpu())
    return out / response.sum(1, keepdim=True)


def _logprob_gradient(model: SteeredModel, hidden: Tensor, ids: Tensor, response: Tensor) -> Tensor:
    """d(sum of the log-probabilities of response tokens) / d(hidden states after the final norm).

    Computed in chunks of tokens: with a large vocabulary the logits of a batch and their gradients would not fit in
    memory.
    """
    rows, at = (i.to(hidden.device) for i in response.nonzero(as_tuple=True))
    out = torch.zeros_like(hidden)
    for chunk in chunks(len(rows), model.anatomy.vocab):
        r, t = rows[chunk], at[chunk]
        part = hidden.detach()[r, t - 1].requires_grad_()
        logprobs = logits(model, part).log_softmax(-1)
        picked = logprobs.gather(1, ids[r, t].to(logprobs.device)[:, None]).sum()
        (gradient,) = torch.autograd.grad(picked, part)
        out[r, t - 1] = gradient
    return out


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of all parameters inside, so that the blocks below the site store nothing for a backward
    pass."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@torch.inference_mode()
def output_scores(
    model: SteeredModel,
    dictionary: Dictionary,
    features: Sequence[Feature],
    prompts: Sequence[str | Sequence[Message]],
    *,
    batch: int = 64,
    on_rows: Advance = lambda n: None,
) -> list[float]:
    """How much adding a feature raises the probability of the feature's own tokens, in nats; one number per feature.

    A feature's own tokens are the eight whose logits its displacement at one unit raises most, by `logit_lens`. The
    score is the rise of the mean of their log-probabilities, as first token of the reply, over the unsteered model
    when the feature is added at one unit; averaged over prompts. The idea is the output score of Arad, Mueller and
    Belinkov 2025 ("SAEs are good for steering if you select the right features"), which weighs rank and probability
    of the tokens instead. `on_rows` is called with the number of (feature, prompt) pairs of each batch.
    Errors: those of `check_fits`.
    """
    check_fits(model, dictionary)
    chats = [model.prompt_ids(as_messages(p), thoughts=False) for p in prompts]
    if not features or not chats:
        return [0.0 for _ in features]
    top_ids = lens_topk(model, torch.stack([f.direction.vector for f in features]), TOP_TOKENS)[0][1]
    edits = [None, *(Edit(moves=(Slider(f, "add", 1.0),)) for f in features)]
    rows = [(e, p) for p in range(len(chats)) for e in range(len(edits))]
    rows.sort(key=lambda row: len(chats[row[1]]))
    # Row e: the mean log-probability of every feature's tokens under edit e, summed over the prompts.
    totals = torch.zeros(len(edits), len(features), dtype=torch.float64)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        found = _next_logprobs(model, [chats[p] for _, p in part], [edits[e] for e, _ in part])
        for (e, _), logprobs in zip(part, found, strict=True):
            totals[e] += logprobs[top_ids].mean(1)
        on_rows(sum(e > 0 for e, _ in part))
    return ((totals[1:].diagonal() - totals[0]) / len(chats)).tolist()


def _next_logprobs(
    model: SteeredModel, prompts: Sequence[Sequence[int]], edits: Sequence[Edit | None]
) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities of the token after each prompt, each row under its own edit; on the CPU."""
    ids, mask = padded(prompts, left=True, device=model.device)
    with model.steering.alone(edits):
        logits = model.hf(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    return logits.float().log_softmax(-1).cpu()

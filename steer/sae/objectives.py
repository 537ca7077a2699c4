"""Training objectives: the loss of a step and the gradients of a dictionary's weights.

`train` calls `Objective.step` per batch and then the optimiser. `SparseObjective` is TopK and BatchTopK;
`LensObjective` leaves JumpReLU and Matryoshka-BatchTopK to sae_lens.

`SparseObjective` chooses the active latents, and then runs the forward and backward pass over those only. An inactive
latent has zero gradient, so nothing is approximated: per token a dense step takes `12 d m` FLOPs, this one
`2 d m + 10 d k`. The remaining dense product, that of the encoder, is used only to choose the latents, so it may run in
bf16; the chosen values are computed again in fp32.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steer.checkpoint.dtypes import is_fast
from steer.core.dictionary import Dictionary
from steer.errors import MismatchError, UnsupportedError
from steer.sae import parallel
from steer.sae.options import TrainOptions

# torch warns once per process whatever part of CSR is used. The one product used here is covered by tests.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

THRESHOLD_RATE = 0.01
"""Weight of a batch's smallest activation in the running mean that is BatchTopK's threshold."""
GROUPS = 16
"""Elements per strided group; the first pass of `top_k` compares the groups' maxima."""


class Stopwatch:
    """Sums the seconds spent in named parts of a training step: `with watch("gradients"): ...`.

    Given a CUDA `device`, it waits for the GPU before it reads the clock.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device is not None and device.type == "cuda"

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - start

    def shares(self) -> dict[str, float]:
        """Each part's share of the time that was measured, the largest first."""
        total = sum(self.seconds.values()) or 1.0
        return {p: s / total for p, s in sorted(self.seconds.items(), key=lambda x: -x[1])}

    def _now(self) -> float:
        if self._cuda:  # kernels run on after the call that launched them returned
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True, eq=False)
class Step:
    """Figures of one step, over all processes together."""

    mse: float
    """Mean over tokens of the squared error, summed over the width, in scaled units."""
    aux: float
    """The other terms of the loss: dead latents, sparsity."""
    l0: float
    """Active latents per token."""
    fired: Bool[Tensor, " m"]
    """Latents that were active on at least one token."""


class Objective(nn.Module, ABC):
    """A dictionary's weights in training, and their loss. Activations are scaled so that their mean norm is the square
    root of the width, which makes one learning rate fit every model; in the finished dictionary the scale is folded
    into the weights. `state_dict` holds everything that the next step depends on."""

    weights: dict[str, nn.Parameter] | nn.ParameterDict
    """Among them "encoder" and "decoder", which start as the same rows, and "b_dec"."""
    scale: float
    """Factor from raw to scaled activations."""

    @abstractmethod
    def step(self, x: Float[Tensor, "n d"], dead: Bool[Tensor, " m"], number: int, watch: Stopwatch) -> Step:
        """Compute the loss of a batch of raw activations `x` and set the gradients of the weights.

        `dead` marks latents that count as dead, `number` is the step's number. The gradients are not averaged over
        processes yet.
        """

    @abstractmethod
    def dictionary(self) -> Dictionary:
        """The weights as a Dictionary: decoder rows of unit norm, activations in units of the residual stream. It has
        no site and no name yet."""

    def calibrate(self, x: Float[Tensor, "n d"]) -> None:
        """Set values that a dictionary needs beyond its weights, such as a threshold, from training rows. Called once,
        before the final `dictionary()`."""
        return


def objective_for(options: TrainOptions, width: int, scale: float, mean: Tensor, device: torch.device) -> Objective:
    """The objective for `options`, with weights initialised from the seed.

    `width` is that of the residual stream, `scale` the factor that activations are multiplied by in training, `mean`
    the mean activation before scaling.
    """
    options = settled(options, device)
    # Small rows of equal norm are the initialisation of Anthropic's circuits update of April 2024.
    rows = torch.randn(options.latents, width, generator=torch.Generator().manual_seed(options.seed))
    decoder = 0.1 * rows / rows.norm(dim=1, keepdim=True)
    kind = SparseObjective if options.architecture in ("topk", "batchtopk") else LensObjective
    return kind(options, decoder, (mean.double() * scale).float(), scale=scale, device=device)


def settled(options: TrainOptions, device: torch.device) -> TrainOptions:
    """The options with `products="auto"` replaced by the device's choice, which a run resumed elsewhere must keep."""
    if options.products != "auto":
        return options
    return replace(options, products="bfloat16" if is_fast(torch.bfloat16, device) else "float32")


class SparseObjective(Objective):
    """TopK (Gao et al. 2024) and BatchTopK (Bussmann et al. 2024), exact and sparse.

    Latents are chosen by pre-activation times decoder norm, so that the norm of a decoder row does not affect the
    choice. In the reconstruction the norm cancels: `x_hat = sum_j relu(u_j) W_j + b` with `u` the pre-activation.
    """

    def __init__(
        self, options: TrainOptions, decoder: Tensor, b_dec: Tensor, *, scale: float, device: torch.device
    ) -> None:
        super().__init__()
        self.options, self.scale = options, scale
        decoder = decoder.to(device)
        # Rows that do not learn have norm 1; training begins with small ones.
        frozen = options.frozen_decoder
        written = F.normalize(decoder, dim=-1) if frozen else decoder.clone()
        self.weights = nn.ParameterDict(
            [  # pairs, whose order stays: that of a dict would be sorted, and clipping would round in another order
                # Transposed, so that the encoder weights of a latent are contiguous, as its decoder weights are.
                ("encoder", nn.Parameter(decoder.clone())),
                ("b_enc", nn.Parameter(torch.zeros(len(decoder), device=device))),
                ("decoder", nn.Parameter(written, requires_grad=not frozen)),
                ("b_dec", nn.Parameter(b_dec.to(device))),
            ]
        )
        # Running mean of the smallest activation kept in a batch, in scaled units. After training it replaces the
        # choice within a batch.
        self.threshold = nn.Buffer(torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def step(self, x: Tensor, dead: Tensor, number: int, watch: Stopwatch) -> Step:
        w = {name: p.data for name, p in self.weights.items()}
        n, m = len(x), len(w["encoder"])
        xs = x.float() * self.scale
        centred = xs - w["b_dec"]
        norms = w["decoder"].norm(dim=1)
        with watch("encoder product"):
            # In bf16 where that is fast, as the scores are only used to choose latents.
            scores = self._scores(centred, norms, getattr(torch, self.options.products))
        with watch("choice of latents"):
            active = self._choose(scores)
        with watch("values and reconstruction"):
            u = products(centred, w["encoder"], active) + w["b_enc"][active.latents]
            values = u.relu()
            error = decode(values, active, w["decoder"]) - centred
            mse = error.square().sum() / n
        with watch("gradients"):
            by_latent = ByLatent.of(active, m)
            slope = error * (2 / n)
            into = products(slope, w["decoder"], active) * (u > 0)
            self.weights["encoder"].grad = by_latent.gradient(into, centred)
            if not self.options.frozen_decoder:
                self.weights["decoder"].grad = by_latent.gradient(values, slope)
            into_bias = torch.zeros_like(w["b_enc"]).index_add_(0, active.latents, into)
            self.weights["b_enc"].grad = into_bias
            # The bias is also subtracted from the input, so it gets a gradient through every active encoder row.
            self.weights["b_dec"].grad = slope.sum(0) - into_bias @ w["encoder"]
        aux = 0.0
        if self.options.aux and bool(dead.any()):
            with watch("dead latents"):
                aux = self._revive(centred, error, dead, norms)
        on = values > 0
        fired = torch.zeros(m, dtype=torch.bool, device=x.device)
        fired[active.latents[on]] = True
        if self.options.architecture == "batchtopk":
            self._follow(values[on] * norms[active.latents[on]])
        mse, aux, l0 = parallel.means(float(mse), aux, float(on.sum()) / n)
        return Step(mse, aux, l0, parallel.any_of(fired))

    def _scores(self, centred: Tensor, norms: Tensor, dtype: torch.dtype) -> Float[Tensor, "n m"]:
        """Pre-activation times decoder norm."""
        encoder, bias = self.weights["encoder"].data * norms[:, None], self.weights["b_enc"].data * norms
        return F.linear(centred.to(dtype), encoder.to(dtype), bias.to(dtype))

    def _choose(self, scores: Tensor) -> Active:
        if self.options.architecture == "topk":
            return top_k(scores, self.options.k)
        count = self.options.k * len(scores)
        places, values = above(scores, 0.8 * float(self.threshold))
        if parallel.total(len(values)) < count * parallel.world():
            places, values = above(scores, 0.0)
        if parallel.world() > 1:
            # The batch is that of all processes together, and so is the threshold within it.
            chosen = values >= parallel.joint_least(values, count)
            places, values, count = places[chosen], values[chosen], int(chosen.sum())
        return largest(scores, places, values, count)

    def _revive(self, centred: Tensor, error: Tensor, dead: Tensor, norms: Tensor) -> float:
        """The loss of predicting the reconstruction error from dead latents (Gao et al. 2024, appendix A.2); its
        gradients are added to those of the step.

        It is computed densely, over the dead latents only.
        """
        at = torch.nonzero(dead).squeeze(1)
        leaves = {name: self.weights[name].data[at].requires_grad_() for name in ("encoder", "b_enc", "decoder")}
        bias = self.weights["b_dec"].data.clone().requires_grad_()
        k = min(centred.shape[1] // 2, len(at))
        with torch.enable_grad():
            source = centred + self.weights["b_dec"].data - bias
            u = F.linear(source, leaves["encoder"], leaves["b_enc"])
            if k < len(at):
                chosen = (u.detach() * norms[at]).topk(k, dim=1, sorted=False).indices
                u = torch.zeros_like(u).scatter(1, chosen, u.gather(1, chosen))
            missing = -error
            loss = (u @ leaves["decoder"] - missing).square().sum() / len(centred)
            # A few dead latents can explain little of the error, so they get less weight.
            loss = loss * self.options.aux * min(len(at) / (centred.shape[1] // 2), 1.0)
        for name, g in zip([*leaves, "b_dec"], torch.autograd.grad(loss, [*leaves.values(), bias]), strict=True):
            weight = self.weights[name]
            if weight.grad is not None:
                if name == "b_dec":
                    weight.grad += g
                else:
                    weight.grad[at] += g
        return float(loss)

    def _follow(self, activations: Tensor) -> None:
        """Move the running threshold towards the smallest of the activations kept in this batch."""
        least = parallel.least(float(activations.min()) if len(activations) else math.inf)
        if least < math.inf:
            rate = THRESHOLD_RATE if float(self.threshold) else 1.0
            self.threshold = (1 - rate) * self.threshold + rate * least

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set BatchTopK's threshold so that on these rows k latents per token are active on average.

        The running threshold lags behind weights that still change, which costs a tenth of L0.
        """
        if self.options.architecture != "batchtopk":
            return
        norms = self.weights["decoder"].data.norm(dim=1)
        best = torch.zeros(0, device=x.device)
        wanted = self.options.k * len(x)
        for part in x.split(2048):
            centred = part.float() * self.scale - self.weights["b_dec"].data
            scores = self._scores(centred, norms, torch.float32).flatten()
            best = torch.cat([best, scores[scores > 0]])
            if len(best) > wanted:
                best = best.topk(wanted, sorted=False).values
        # Slightly below the smallest score that should be active: a latent exactly at the threshold is off.
        self.threshold = best.min().double().cpu() * (1 - 1e-6) if len(best) else self.threshold

    @torch.no_grad()
    def dictionary(self) -> Dictionary:
        w = {name: p.detach().float().cpu() for name, p in self.weights.items()}
        norms = w["decoder"].norm(dim=1).clamp(min=1e-8)
        batch = self.options.architecture == "batchtopk"
        return Dictionary(
            architecture="jumprelu" if batch else "topk",
            # Fold in the scale of the input: biases and threshold are divided by it.
            W_enc=(w["encoder"] * norms[:, None]).T.contiguous(),
            b_enc=w["b_enc"] * norms / self.scale,
            W_dec=w["decoder"] / norms[:, None],
            b_dec=w["b_dec"] / self.scale,
            threshold=torch.full((len(norms),), float(self.threshold) / self.scale) if batch else None,
            k=None if batch else self.options.k,
            subtract_b_dec=True,
        )


class LensObjective(Objective):
    """JumpReLU or Matryoshka-BatchTopK, by a training class of sae_lens."""

    def __init__(
        self, options: TrainOptions, decoder: Tensor, b_dec: Tensor, *, scale: float, device: torch.device
    ) -> None:
        import sae_lens  # here, as it is slow to import

        if options.architecture == "matryoshka" and parallel.world() > 1:
            raise UnsupportedError(
                "architecture matryoshka: expected one process, found several; sae_lens chooses its latents in the "
                "batch of one process, so train in one, or take batchtopk"
            )
        super().__init__()
        self.options, self.scale = options, scale
        shape = {
            "d_in": decoder.shape[1], "d_sae": options.latents, "device": str(device), "apply_b_dec_to_input": True,
        }  # fmt: skip
        if options.architecture == "matryoshka":
            m = options.latents
            widths = list(options.widths) or [max(1, m // 16), max(2, m // 4), m]
            config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
                **shape, k=float(options.k), matryoshka_widths=widths, aux_loss_coefficient=options.aux
            )
            self.sae: Any = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
        else:
            config = sae_lens.JumpReLUTrainingSAEConfig(
                **shape,
                l0_coefficient=options.l0_weight,
                l0_warm_up_steps=round(0.1 * options.steps),
                jumprelu_bandwidth=options.bandwidth,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=float(options.k),
                jumprelu_ste_to_input=True,
            )
            self.sae = sae_lens.JumpReLUTrainingSAE(config)
        with torch.no_grad():
            self.sae.W_dec.copy_(decoder)
            self.sae.W_enc.copy_(decoder.T)
            self.sae.b_dec.copy_(b_dec)
        self.weights = dict(self.sae.named_parameters())
        self.weights["encoder"], self.weights["decoder"] = self.weights.pop("W_enc"), self.weights.pop("W_dec")

    def step(self, x: Tensor, dead: Tensor, number: int, watch: Stopwatch) -> Step:
        from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput

        coefficients = {}
        for name, c in self.sae.get_coefficients().items():
            value, rise = (c.value, c.warm_up_steps) if isinstance(c, TrainCoefficientConfig) else (c, 0)
            coefficients[name] = value * min(1.0, number / rise) if rise else value
        for weight in self.weights.values():
            weight.grad = None
        with watch("sae_lens forward"):
            out = self.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x.float() * self.scale,
                    dead_neuron_mask=dead,
                    coefficients=coefficients,
                    n_training_steps=number,
                    is_logging_step=False,
                )
            )
        with watch("sae_lens backward"):
            out.loss.backward()
        mse = float(out.losses["mse_loss"].detach())
        on = out.feature_acts.detach() > 0
        mse, aux, l0 = parallel.means(mse, float(out.loss.detach()) - mse, float(on.sum()) / len(x))
        return Step(mse, aux, l0, parallel.any_of(on.any(0)))

    @torch.no_grad()
    def dictionary(self) -> Dictionary:
        state = {name: t.detach().clone() for name, t in self.sae.state_dict().items()}
        # This folds the decoder norm into the weights and converts BatchTopK's threshold to that of JumpReLU.
        self.sae.process_state_dict_for_saving_inference(state)
        norms = state["W_dec"].float().norm(dim=1).clamp(min=1e-8)
        return Dictionary(
            architecture="jumprelu",
            W_enc=(state["W_enc"].float() * norms).cpu(),
            b_enc=(state["b_enc"].float() * norms / self.scale).cpu(),
            W_dec=(state["W_dec"].float() / norms[:, None]).cpu(),
            b_dec=(state["b_dec"].float() / self.scale).cpu(),
            threshold=(state["threshold"].float().clamp(min=0) * norms / self.scale).cpu(),
            subtract_b_dec=True,
        )


def start_from(objective: Objective, parent: Dictionary) -> None:
    """Copy a dictionary's weights into an objective, undoing the scale. Errors: MismatchError for another shape."""
    rows, width = objective.weights["decoder"].shape
    if (parent.latents, parent.width) != (rows, width):
        raise MismatchError(
            f"{parent.place or parent.name}: expected a dictionary of {rows} latents and width {width}, found "
            f"{parent.latents} and {parent.width}; pass --latents {parent.latents}, or another parent"
        )
    b_dec = parent.b_dec.float() * objective.scale
    new = {
        "encoder": parent.W_enc.float().T,
        "b_enc": parent.b_enc.float() * objective.scale,
        "decoder": parent.W_dec.float(),
        "b_dec": b_dec,
    }
    if not parent.subtract_b_dec:
        # Objectives subtract b_dec before the encoder and the parent does not: the encoder's bias makes up for it.
        new["b_enc"] = new["b_enc"] + b_dec @ parent.W_enc.float()
    with torch.no_grad():
        for name, value in new.items():
            objective.weights[name].copy_(value)


@dataclass(frozen=True, eq=False)
class Active:
    """The active latents of a batch, as the entries of a sparse matrix `[n tokens, m latents]` in row order (CSR)."""

    rows: Int[Tensor, " entries"]
    """The token of each entry, ascending."""
    latents: Int[Tensor, " entries"]
    """The latent of each entry."""
    offsets: Int[Tensor, " n+1"]
    """Index of each token's first entry; the last element is the number of entries."""


def top_k(scores: Float[Tensor, "n m"], k: int) -> Active:
    """The k largest scores of every row, exactly; which of equal scores is taken is not defined.

    The k largest values lie in the k groups with the largest maxima, so two small top-k passes replace a large one.
    """
    n, m = scores.shape
    groups = m // GROUPS
    if m % GROUPS or groups < 2 * k:
        chosen = scores.topk(k, dim=1, sorted=False).indices
    else:
        # Strided groups, so that the maximum over a group reads contiguous memory.
        grouped = scores.view(n, GROUPS, groups)
        best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
        candidates = grouped.gather(2, best[:, None].expand(n, GROUPS, k)).reshape(n, GROUPS * k)
        inside = candidates.topk(k, dim=1, sorted=False).indices
        chosen = (inside // k) * groups + best.gather(1, inside % k)
    rows = torch.arange(n, device=scores.device).repeat_interleave(k)
    offsets = torch.arange(0, n * k + 1, k, device=scores.device)
    return Active(rows, chosen.reshape(-1), offsets)


def above(scores: Float[Tensor, "n m"], floor: float) -> tuple[Int[Tensor, " found"], Float[Tensor, " found"]]:
    """(flat indices, values as fp32) of the scores above `floor`."""
    flat = scores.reshape(-1)
    places = torch.nonzero(flat > floor).squeeze(1)
    return places, flat[places].float()


def largest(scores: Float[Tensor, "n m"], places: Tensor, values: Float[Tensor, " found"], count: int) -> Active:
    """The `count` largest of the values that `above` returned, as entries in row order."""
    n, m = scores.shape
    if len(values) > count:
        places = places[values.topk(count, sorted=False).indices].sort().values
    rows = places // m
    offsets = torch.zeros(n + 1, dtype=torch.long, device=scores.device)
    offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return Active(rows, places - rows * m, offsets)


def products(x: Float[Tensor, "n d"], table: Float[Tensor, "m d"], active: Active) -> Float[Tensor, " entries"]:
    """`x[row] . table[latent]` for every entry."""
    if x.device.type == "cpu" and torch.backends.mkl.is_available() and x.dtype == torch.float32:
        n, m = len(x), len(table)
        zeros = torch.zeros(len(active.latents))
        wanted = torch.sparse_csr_tensor(active.offsets, active.latents, zeros, (n, m), check_invariants=False)
        return torch.sparse.sampled_addmm(wanted, x, table.T, beta=0.0).values()
    chunk = max(1, (1 << 22) // x.shape[1])
    parts = [
        (x[active.rows[a : a + chunk]] * table[active.latents[a : a + chunk]]).sum(1)
        for a in range(0, len(active.rows), chunk)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0)


def weighted_sums(
    values: Float[Tensor, " entries"], picks: Int[Tensor, " entries"], offsets: Tensor, table: Float[Tensor, "rows d"]
) -> Float[Tensor, "bags d"]:
    """For every bag of entries the sum of `value * table[pick]`: a sparse matrix times a dense one. Bag i holds the
    entries from `offsets[i]` to `offsets[i + 1]`."""
    if not len(picks):
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(picks, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def decode(values: Float[Tensor, " entries"], active: Active, W_dec: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """The weighted sum of each token's decoder rows, without bias."""
    return weighted_sums(values, active.latents, active.offsets, W_dec)


@dataclass(frozen=True, eq=False)
class ByLatent:
    """The entries of an `Active` in the order of their latents (CSC), in which weight gradients are summed."""

    order: Int[Tensor, " entries"]
    """Index of each entry in the row order of `Active`."""
    rows: Int[Tensor, " entries"]
    """The token of each entry."""
    offsets: Int[Tensor, " m+1"]
    """Index of each latent's first entry; the last element is the number of entries."""

    @classmethod
    def of(cls, active: Active, latents: int) -> ByLatent:
        """Sort the entries once; both weight gradients use the order."""
        # Stable, so that the order of each sum, and with it the rounding, is the same in every run.
        order = torch.sort(active.latents.int(), stable=True).indices
        offsets = torch.zeros(latents + 1, dtype=torch.long, device=order.device)
        offsets[1:] = torch.bincount(active.latents, minlength=latents).cumsum(0)
        return cls(order, active.rows[order], offsets)

    def gradient(self, values: Float[Tensor, " entries"], per_row: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        """`sum over tokens of value[token, latent] * per_row[token]`, for every latent."""
        return weighted_sums(values[self.order], self.rows, self.offsets, per_row)

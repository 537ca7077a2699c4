"""Training objectives: the loss of a step and the gradients of a dictionary's weights.

`trainer` calls `Objective.step` per batch and then the optimiser. `SparseObjective` is TopK and BatchTopK;
`architectures` adds those of sae_lens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steer.checkpoint.dtypes import is_fast
from steer.core.dictionary import Dictionary
from steer.errors import MismatchError
from steer.sae import parallel
from steer.sae.options import TrainOptions
from steer.sae.sparse import Active, ByLatent, above, decode, largest, products, top_k
from steer.sae.stopwatch import Stopwatch

THRESHOLD_RATE = 0.01
"""Weight of a batch's smallest activation in the running mean that is BatchTopK's threshold."""


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


class Objective(ABC):
    """A dictionary's weights in training, and their loss. Activations are scaled so that their mean norm is the square
    root of the width, which makes one learning rate fit every model; in the finished dictionary the scale is folded
    into the weights."""

    weights: dict[str, nn.Parameter]
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
        """Set what a dictionary needs beyond its weights, such as a threshold, from training rows. Called once, before
        the final `dictionary()`."""
        return

    def buffers(self) -> dict[str, Tensor]:
        """State besides the weights that a checkpoint must hold."""
        return {}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Restore the state that `buffers` returned."""
        return


def settled(options: TrainOptions, device: torch.device) -> TrainOptions:
    """The options with `products="auto"` replaced by the device's choice, which a run resumed elsewhere must keep."""
    if options.products != "auto":
        return options
    return replace(options, products="bfloat16" if is_fast(torch.bfloat16, device) else "float32")


def initial_weights(
    options: TrainOptions, width: int, scale: float, mean: Tensor
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " d"]]:
    """(random decoder rows of norm 0.1, from which the encoder starts as well; decoder bias: the data's scaled mean).

    Small rows of equal norm are the initialisation of Anthropic's circuits update of April 2024.
    """
    rows = torch.randn(options.latents, width, generator=torch.Generator().manual_seed(options.seed))
    return 0.1 * rows / rows.norm(dim=1, keepdim=True), (mean.double() * scale).float()


class SparseObjective(Objective):
    """TopK (Gao et al. 2024) and BatchTopK (Bussmann et al. 2024), exact and sparse.

    Latents are chosen by pre-activation times decoder norm, so that the norm of a decoder row does not affect the
    choice. In the reconstruction the norm cancels: `x_hat = sum_j relu(u_j) W_j + b` with `u` the pre-activation.
    """

    def __init__(
        self, options: TrainOptions, decoder: Tensor, b_dec: Tensor, *, scale: float, device: torch.device
    ) -> None:
        self.options, self.scale, self.device = options, scale, device
        m = len(decoder)
        decoder = decoder.to(device)
        self.weights = {
            # Transposed, so that the encoder weights of a latent are contiguous, as its decoder weights are.
            "encoder": nn.Parameter(decoder.clone()),
            "b_enc": nn.Parameter(torch.zeros(m, device=device)),
            "decoder": nn.Parameter(decoder.clone(), requires_grad=not options.frozen_decoder),
            "b_dec": nn.Parameter(b_dec.to(device)),
        }
        if options.frozen_decoder:
            self.weights["decoder"].data /= 0.1
        # Running mean of the smallest activation kept in a batch, in scaled units. After training it replaces the
        # choice within a batch.
        self.threshold = torch.zeros((), dtype=torch.float64)
        self.half = options.products == "bfloat16"

    @torch.no_grad()
    def step(self, x: Tensor, dead: Tensor, number: int, watch: Stopwatch) -> Step:
        w = {name: p.data for name, p in self.weights.items()}
        n, m = len(x), len(w["encoder"])
        xs = x.float() * self.scale
        centred = xs - w["b_dec"]
        norms = w["decoder"].norm(dim=1)
        with watch("encoder product"):
            scores = self._scores(x, centred, w, norms)
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
            self._gradient("encoder", by_latent.gradient(into, centred))
            self._gradient("decoder", by_latent.gradient(values, slope))
            into_bias = torch.zeros_like(w["b_enc"]).index_add_(0, active.latents, into)
            self._gradient("b_enc", into_bias)
            # The bias is also subtracted from the input, so it gets a gradient through every active encoder row.
            self._gradient("b_dec", slope.sum(0) - into_bias @ w["encoder"])
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

    def _scores(self, x: Tensor, centred: Tensor, w: dict[str, Tensor], norms: Tensor) -> Float[Tensor, "n m"]:
        """Pre-activation times decoder norm, in bf16 where that is fast: the scores are only used to choose latents."""
        if not self.half:
            return F.linear(centred, w["encoder"] * norms[:, None], w["b_enc"] * norms)
        encoder = (w["encoder"] * norms[:, None]).bfloat16()
        return F.linear(centred.bfloat16(), encoder, (w["b_enc"] * norms).bfloat16())

    def _choose(self, scores: Tensor) -> Active:
        if self.options.architecture == "topk":
            return top_k(scores, self.options.k)
        count = self.options.k * len(scores)
        places, values = above(scores, 0.8 * float(self.threshold))
        if parallel.total(len(values)) < count * parallel.world():
            places, values = above(scores, 0.0)
        least = parallel.joint_least(values, count)
        if least is not None:
            # The batch is that of all processes together, and so is the threshold within it.
            chosen = values >= least
            return largest(scores, places[chosen], values[chosen], int(chosen.sum()))
        return largest(scores, places, values, count)

    def _gradient(self, name: str, value: Tensor) -> None:
        if self.weights[name].requires_grad:
            self.weights[name].grad = value

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
        least = parallel.least(activations.min().double().cpu() if len(activations) else None)
        if least is not None:
            rate = THRESHOLD_RATE if float(self.threshold) else 1.0
            self.threshold = (1 - rate) * self.threshold + rate * least

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set BatchTopK's threshold so that on these rows k latents per token are active on average.

        The running threshold lags behind weights that still change, which costs a tenth of L0.
        """
        if self.options.architecture != "batchtopk":
            return
        w = {name: p.data for name, p in self.weights.items()}
        norms = w["decoder"].norm(dim=1)
        best = torch.zeros(0, device=x.device)
        wanted = self.options.k * len(x)
        for part in x.split(2048):
            centred = part.float() * self.scale - w["b_dec"]
            scores = F.linear(centred, w["encoder"] * norms[:, None], w["b_enc"] * norms).flatten()
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

    def buffers(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        self.threshold = buffers["threshold"]


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

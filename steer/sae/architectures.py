"""The training objective of each architecture.

TopK and BatchTopK use `objectives.SparseObjective`; JumpReLU and Matryoshka-BatchTopK are computed by sae_lens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.errors import UnsupportedError
from steer.sae import parallel
from steer.sae.objectives import Objective, SparseObjective, Step, initial_weights, settled
from steer.sae.options import TrainOptions
from steer.sae.stopwatch import Stopwatch


def objective_for(options: TrainOptions, width: int, scale: float, mean: Tensor, device: torch.device) -> Objective:
    """The objective for `options`, with weights initialised from the seed.

    `width` is that of the residual stream, `scale` the factor that activations are multiplied by in training, `mean`
    the mean activation before scaling.
    """
    options = settled(options, device)
    if options.architecture in ("topk", "batchtopk"):
        return SparseObjective(options, *initial_weights(options, width, scale, mean), scale=scale, device=device)
    return LensObjective(options, *initial_weights(options, width, scale, mean), scale=scale, device=device)


class LensObjective(Objective):
    """Wraps a sae_lens training class in the interface of `Objective`."""

    def __init__(
        self, options: TrainOptions, decoder: Tensor, b_dec: Tensor, *, scale: float, device: torch.device
    ) -> None:
        if options.architecture == "matryoshka" and parallel.world() > 1:
            raise UnsupportedError(
                "architecture matryoshka: expected one process, found several; sae_lens chooses its latents in the "
                "batch of one process, so train in one, or take batchtopk"
            )
        self.options, self.scale = options, scale
        self.sae = _training_sae(options, decoder.shape[1], device)
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

    def buffers(self) -> dict[str, Tensor]:
        return {name: b.detach().cpu() for name, b in self.sae.named_buffers()}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        for name, value in self.sae.named_buffers():
            value.copy_(buffers[name])


def _training_sae(options: TrainOptions, width: int, device: torch.device) -> Any:
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    shape = {"d_in": width, "d_sae": options.latents, "device": str(device), "apply_b_dec_to_input": True}
    if options.architecture == "matryoshka":
        return MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **shape, k=float(options.k), matryoshka_widths=options.nested, aux_loss_coefficient=options.aux
            )
        )
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            **shape,
            l0_coefficient=options.l0_weight,
            l0_warm_up_steps=round(0.1 * options.steps),
            jumprelu_bandwidth=options.bandwidth,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=float(options.k),
            jumprelu_ste_to_input=True,
        )
    )

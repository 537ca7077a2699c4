"""Damage done to a model in memory on purpose: a probe that does not detect it measures nothing.

The damaged model is dropped after its arm, and the files of the checkpoint are never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from steer.errors import CheckpointError
from steer.model.steered import SteeredModel

NOISE = (0.03, 0.1, 0.3)
"""Noise on every matrix, as shares of its root mean square. More leaves no words."""
BITS = 2
"""Bits that the weights of the MLPs are rounded to."""
GROUP = 32
"""Weights that share a scale when they are rounded, as in the formats of llama.cpp."""
FAR = 256
"""Tokens that lie as far apart as the ends of the context, once positions are stretched."""
FACTOR = 3
"""How many times the end of its safe range the slider is moved to."""
SAFE_SHARE = 0.2
"""How far a slider without a calibrated range may move the residual stream, as a share of its norm: the default merge's
`moralizing` is safe to 0.2."""
Damage = Callable[[SteeredModel], None]


def damages() -> dict[str, Damage]:
    """Return what is done to the weights, by the name of the arm."""
    noise = {f"noise {share:g}": partial(add_noise, share=share) for share in NOISE}
    return {**noise, f"MLPs in {BITS} bits": partial(round_mlps, bits=BITS), "past its context": stretch_positions}


@torch.no_grad()
def add_noise(model: SteeredModel, *, share: float) -> None:
    """Add Gaussian noise to every matrix, `share` times its root mean square; the same noise in every run."""
    for name, weight in _matrices(model.hf):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        generator = torch.Generator(weight.device).manual_seed(seed)
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
        weight += (noise * share * weight.float().square().mean().sqrt()).to(weight.dtype)


@torch.no_grad()
def round_mlps(model: SteeredModel, *, bits: int) -> None:
    """Round the matrices of every MLP to `bits` bits, with one scale and offset per `GROUP` weights of a row."""
    anatomy = model.anatomy
    blocks = {anatomy.block_module(block) for block in range(anatomy.blocks)}
    writers = {w.module: w.module.rpartition(".")[0] for w in anatomy.live_writers if w.kind == "mlp"}
    # In some classes the MLP's matrices are modules of the block itself, beside its attention.
    for path in sorted({module if parent in blocks else parent for module, parent in writers.items()}):
        for _, weight in _matrices(model.hf.get_submodule(path)):
            size = GROUP if weight.shape[-1] % GROUP == 0 else weight.shape[-1]
            groups = weight.float().reshape(-1, size)
            low, high = groups.aminmax(dim=-1, keepdim=True)
            step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
            weight.copy_((((groups - low) / step).round() * step + low).reshape(weight.shape))


@torch.no_grad()
def stretch_positions(model: SteeredModel) -> None:
    """Move tokens apart until `FAR` of them span the context, so that a probe's texts reach past its limit.

    What a model meets in a text that is too long are distances between tokens that it has never seen, and rotary
    positions know nothing else. Errors: CheckpointError for a model without rotary positions.
    """
    frequencies = [b for name, b in model.hf.named_buffers() if name.rpartition(".")[2] == "inv_freq"]
    if not frequencies:
        raise CheckpointError(f"{model.name}: expected rotary positions to stretch, found none")
    for frequency in frequencies:
        frequency *= max(1.0, model.context / FAR)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.data) for name, p in module.named_parameters() if p.ndim > 1 and p.is_floating_point())

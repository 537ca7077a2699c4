"""The options of `steer train`: a field is option, default and help text, in Python and on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

from steer.errors import UsageError

Architecture = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]
Products = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class TrainOptions:
    """How a dictionary is trained."""

    architecture: Annotated[Architecture, "topk, batchtopk, jumprelu or matryoshka."] = "batchtopk"
    latents: Annotated[int, "How many latents."] = 4608
    k: Annotated[int, "Active latents a token; for batchtopk and matryoshka on average, for jumprelu the target."] = 32
    tokens: Annotated[int, "Tokens to train on in all; a harvest is read several times over."] = 10_000_000
    batch: Annotated[int, "Tokens a step, over all processes together."] = 2048
    lr: Annotated[float, "Learning rate of Adam at its height."] = 5e-4
    warmup: Annotated[float, "Share of the steps over which the learning rate rises."] = 0.02
    decay: Annotated[float, "Share of the steps, at the end, over which it falls to zero."] = 0.2
    aux: Annotated[float, "Weight of the loss in which dead latents explain the error (not jumprelu)."] = 1.0
    dead_tokens: Annotated[int, "A latent that has not fired for as many tokens counts as dead."] = 500_000
    l0_weight: Annotated[float, "Weight of the sparsity loss (jumprelu)."] = 0.1
    bandwidth: Annotated[float, "Width of the step's estimated gradient (jumprelu)."] = 0.1
    widths: Annotated[tuple[int, ...], "Nested widths, the last is `latents`; by halving without it (matryoshka)."] = ()
    frozen_decoder: Annotated[bool, "Keep the random decoder as it is: the control (topk, batchtopk)."] = False
    held_out: Annotated[float, "Share of the documents that is never trained on."] = 0.05
    products: Annotated[Products, "Precision of the product that chooses the latents; values are always fp32."] = "auto"
    buffer: Annotated[int, "Tokens in the shuffle buffer when activations are streamed from a model."] = 131_072
    seed: Annotated[int, "Of weights and order."] = 0

    def __post_init__(self) -> None:
        positive = ("latents", "k", "tokens", "batch", "lr", "dead_tokens", "bandwidth", "buffer")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("warmup", "decay", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: expected a share from 0 to below 1, found {getattr(self, name)}")
        if self.warmup + self.decay > 1:
            raise UsageError(f"warmup and decay: expected at most 1 together, found {self.warmup + self.decay:g}")
        choices = {
            "architecture": ("topk", "batchtopk", "jumprelu", "matryoshka"),
            "products": ("auto", "bfloat16", "float32"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}")
        if self.k > self.latents:
            raise UsageError(f"k: expected at most latents = {self.latents}, found {self.k}")
        if self.frozen_decoder and self.architecture not in ("topk", "batchtopk"):
            raise UsageError(
                f"frozen_decoder: expected architecture topk or batchtopk with it, found {self.architecture}"
            )
        if self.widths and (list(self.widths) != sorted(set(self.widths)) or self.widths[-1] != self.latents):
            raise UsageError(
                f"widths: expected rising widths that end at latents = {self.latents}, found {self.widths}"
            )
        if self.tokens < self.batch:
            raise UsageError(f"tokens: expected at least one batch of {self.batch}, found {self.tokens}")

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.tokens // self.batch

    @property
    def nested(self) -> list[int]:
        """Matryoshka's widths: those given, or latents / 16, / 4 and all."""
        return list(self.widths) or [max(1, self.latents // 16), max(2, self.latents // 4), self.latents]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step as a share of `lr`: up, flat, down to zero."""
        rise, fall = round(self.warmup * self.steps), round(self.decay * self.steps)
        up = min(1.0, (step + 1) / rise) if rise else 1.0
        down = min(1.0, (self.steps - step) / fall) if fall else 1.0
        return up * down

    def as_json(self) -> dict[str, Any]:
        """For manifests and checkpoints."""
        return asdict(self) | {"widths": list(self.widths)}

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field -> what it is."""
        hints = get_type_hints(cls, include_extras=True)
        return {f.name: hints[f.name].__metadata__[0] for f in fields(cls)}

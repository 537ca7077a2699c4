"""The options of `steer train`. Each field is the option, its default and its help text, both in Python and on the
command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from steer.errors import UsageError

Architecture = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]
Products = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training; each field's annotation is its help text.

    >>> TrainOptions(latents=1024, tokens=409_600).steps
    200

    Errors: UsageError for a value out of range, or options that contradict each other.
    """

    architecture: Annotated[Architecture, "topk, batchtopk, jumprelu or matryoshka."] = "batchtopk"
    latents: Annotated[int, "Number of latents."] = 4608
    k: Annotated[int, "Active latents per token: for batchtopk and matryoshka the mean, for jumprelu the target."] = 32
    tokens: Annotated[int, "Training tokens in total; a smaller harvest is read several times."] = 10_000_000
    batch: Annotated[int, "Tokens per step, over all processes together."] = 2048
    lr: Annotated[float, "Largest learning rate of Adam."] = 5e-4
    warmup: Annotated[float, "Share of the steps over which the learning rate rises."] = 0.02
    decay: Annotated[float, "Share of the steps, at the end, over which the learning rate falls to zero."] = 0.2
    aux: Annotated[float, "Weight of the loss that makes dead latents predict the error (not jumprelu)."] = 1.0
    dead_tokens: Annotated[int, "A latent that has not fired for this many tokens counts as dead."] = 500_000
    l0_weight: Annotated[float, "Weight of the sparsity loss (jumprelu)."] = 0.1
    bandwidth: Annotated[float, "Width of the kernel that estimates the step function's gradient (jumprelu)."] = 0.1
    widths: Annotated[tuple[int, ...], "Nested widths up to `latents`; default a 16th, 4th and all (matryoshka)."] = ()
    frozen_decoder: Annotated[bool, "Do not train the random decoder, as a control (topk, batchtopk)."] = False
    held_out: Annotated[float, "Share of the documents that are never trained on."] = 0.05
    products: Annotated[Products, "Precision of the product that chooses the latents; values are always fp32."] = "auto"
    buffer: Annotated[int, "Tokens in the shuffle buffer when activations are streamed from a model."] = 131_072
    seed: Annotated[int, "Seed of the initial weights and of the order of the data."] = 0

    def __post_init__(self) -> None:
        for name in ("latents", "k", "tokens", "batch", "lr", "dead_tokens", "bandwidth", "buffer"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("warmup", "decay", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: expected a share from 0 to below 1, found {getattr(self, name)}")
        if self.warmup + self.decay > 1:
            raise UsageError(f"warmup and decay: expected at most 1 together, found {self.warmup + self.decay:g}")
        for name, known in (("architecture", get_args(Architecture)), ("products", get_args(Products))):
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
        """Number of optimiser steps."""
        return self.tokens // self.batch

    def rate_at(self, step: int) -> float:
        """The learning rate of a step as a share of `lr`: it rises, stays constant, and falls to zero."""
        rise, fall = round(self.warmup * self.steps), round(self.decay * self.steps)
        up = min(1.0, (step + 1) / rise) if rise else 1.0
        down = min(1.0, (self.steps - step) / fall) if fall else 1.0
        return up * down

"""A dictionary: a sparse autoencoder (SAE) on one site of the residual stream, with sae_lens's names and maths.

`dictionary_files` reads and writes dictionaries, `feature` makes sliders of their latents, and `steer.sae` trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import CheckpointError, UsageError

Architecture = Literal["standard", "gated", "jumprelu", "topk"]
"""How pre-activations become activations. BatchTopK and Matryoshka dictionaries are stored as jumprelu."""
Normalize = Literal["none", "layer_norm", "constant_norm_rescale"]
"""Normalisation of every input before it is encoded; decoding undoes it."""

_LATENT_FIELDS = ("b_enc", "threshold", "b_mag", "r_mag")
_EPSILON = 1e-5  # the epsilon of sae_lens's layer norm


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Encoder and decoder of `m` latents on a residual stream of width `d`.

    Tensors keep the dtype they are stored in; all maths is in fp32 at least. Compared and hashed by identity.

        dictionary = steer.load_dictionary("path/to/dictionary")
        activations = dictionary.encode(residuals)  # [tokens, d] -> [tokens, m]
    """

    architecture: Architecture
    W_enc: Float[Tensor, "d m"]
    b_enc: Float[Tensor, " m"]
    """Bias of the encoder. Gated: the bias of the gate."""
    W_dec: Float[Tensor, "m d"]
    b_dec: Float[Tensor, " d"]
    threshold: Float[Tensor, " m"] | None = None
    """Jumprelu: a pre-activation at or below its threshold gives an activation of 0."""
    k: int | None = None
    """Topk: the largest number of latents that may be active on a token."""
    b_mag: Float[Tensor, " m"] | None = None
    """Gated: the bias of the magnitude."""
    r_mag: Float[Tensor, " m"] | None = None
    """Gated: the encoder of the magnitude is the gate's encoder times exp(r_mag)."""
    subtract_b_dec: bool = True
    """Whether b_dec is subtracted from the input before it is encoded; sae_lens's `apply_b_dec_to_input`."""
    rescale_by_decoder_norm: bool = False
    """Topk: whether each pre-activation is multiplied by the norm of its decoder row before the top k are chosen. The
    products are the activations, and decoding divides by the norms."""
    normalize: Normalize = "none"
    site: int | None = None
    """The dictionary reads the residual stream after this block. None: unknown, or another place in the model."""
    norm: float | None = None
    """Median norm of the residual stream at the site in the training data, outliers left out."""
    place: Path | None = None
    """The directory it was loaded from; None for a dictionary that was not loaded from disk."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The `metadata` entry of cfg.json."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Contents of manifest.json; empty without that file."""

    def __post_init__(self) -> None:
        d, m = self.W_enc.shape if self.W_enc.ndim == 2 else (-1, -1)
        wanted: dict[str, tuple[int, ...]] = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_enc": (m,)}
        if self.architecture == "jumprelu":
            wanted["threshold"] = (m,)
        if self.architecture == "gated":
            wanted |= {"b_mag": (m,), "r_mag": (m,)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None or tuple(value.shape) != shape:
                found = "none" if value is None else str(list(value.shape))
                raise CheckpointError(
                    f"{self.place or 'dictionary'}: {name}: expected shape {list(shape)} in a {self.architecture} "
                    f"dictionary, found {found}; fetch or train it again"
                )
        if self.architecture == "topk" and not (type(self.k) is int and 1 <= self.k <= m):
            raise CheckpointError(f"{self.place or 'dictionary'}: k: expected 1 to {m} latents, found {self.k}")

    @property
    def width(self) -> int:
        """Width `d` of the residual stream."""
        return self.W_enc.shape[0]

    @property
    def latents(self) -> int:
        """Number of latents, `m`."""
        return self.W_enc.shape[1]

    @property
    def name(self) -> str:
        """The name in its manifest, else the name of its directory."""
        named = self.manifest.get("name")
        return str(named) if named else self.place.name if self.place is not None else "dictionary"

    @cached_property
    def placed(self) -> dict[Any, Any]:
        """Cache of values computed from this dictionary for a device; it lives as long as the dictionary."""
        return {}

    @cached_property
    def decoder_norms(self) -> Float[Tensor, " m"]:
        """Norm of every decoder row, in fp32 at least."""
        return _wide(self.W_dec).norm(dim=-1)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... m"]:
        """Activations of all latents, equal to sae_lens's `SAE.encode`. Computed in fp32 at least, whatever the dtype
        of `x`."""
        pre = self._pre(x)
        if self.architecture == "gated":
            assert self.b_mag is not None
            assert self.r_mag is not None
            magnitude = pre * self.r_mag.to(pre.dtype).exp() + self.b_mag.to(pre.dtype)
            return magnitude.relu() * (pre + self.b_enc.to(pre.dtype) > 0)
        pre = pre + self.b_enc.to(pre.dtype)
        if self.rescale_by_decoder_norm:
            pre = pre * self.decoder_norms.to(pre.dtype)
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold.to(pre.dtype))
        if self.architecture == "topk":
            assert self.k is not None
            values, at = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, at, values.relu())
        return pre.relu()

    def encode_rows(self, x: Float[Tensor, "... d"], indices: Sequence[int]) -> Float[Tensor, "... n"]:
        """The columns `indices` of `encode(x)`, from those latents' rows of the encoder wherever they decide it."""
        return self.rows(indices)(x)

    def rows(self, indices: Sequence[int]) -> EncoderRows:
        """The encoder rows that `encode_rows` reads, copied once for many calls."""
        return EncoderRows(self.part(indices), self if self.architecture == "topk" else None, tuple(indices))

    def decode(self, acts: Float[Tensor, "... m"], like: Tensor | None = None) -> Float[Tensor, "... d"]:
        """Reconstruct the residual stream from activations.

        `like` is the input that was encoded. A dictionary that normalises its inputs needs it to undo the
        normalisation.
        Errors: UsageError if `like` is needed and missing.
        """
        wide = torch.promote_types(acts.dtype, _wide_dtype(self.W_dec))
        acts = acts.to(wide)
        if self.rescale_by_decoder_norm:
            acts = acts / self.decoder_norms.to(wide)
        out = acts @ self.W_dec.to(wide) + self.b_dec.to(wide)
        if self.normalize == "none":
            return out
        if like is None:
            raise UsageError(
                f"dictionary {self.name!r} normalises its inputs ({self.normalize}), so decoding wants the input "
                "too; use reconstruct(x), or decode(acts, like=x)"
            )
        shift, scale = self._statistics(like.to(wide))
        return out * scale + shift

    def reconstruct(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """`x` encoded and decoded again."""
        return self.decode(self.encode(x), like=x)

    def decoder_rows(self, indices: Sequence[int]) -> Float[Tensor, "n d"]:
        """For each latent, the vector that one unit of its activation adds to the reconstruction, before a
        normalisation is undone."""
        at = self._at(indices)
        rows = _wide(self.W_dec[at])
        return rows / rows.norm(dim=-1, keepdim=True) if self.rescale_by_decoder_norm else rows

    def part(self, indices: Sequence[int]) -> Dictionary:
        """A dictionary of these latents alone. A topk dictionary gets `k` equal to their number, so all of them may be
        active."""
        at = self._at(indices)
        selected = {f: getattr(self, f)[at] for f in _LATENT_FIELDS if getattr(self, f) is not None}
        k = None if self.k is None else len(at)
        return replace(self, W_enc=self.W_enc[:, at], W_dec=self.W_dec[at], k=k, **selected)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Dictionary:
        """The same dictionary on another device or in another dtype; the object itself if nothing changes."""
        names = ("W_enc", "W_dec", "b_dec", *(f for f in _LATENT_FIELDS if getattr(self, f) is not None))
        moved = {n: getattr(self, n).to(device=device, dtype=dtype) for n in names}
        return replace(self, **moved) if any(moved[n] is not getattr(self, n) for n in names) else self

    def _pre(self, x: Tensor) -> Tensor:
        """The normalised and shifted input times the encoder, before the encoder's bias is added."""
        wide = torch.promote_types(x.dtype, _wide_dtype(self.W_enc))
        x = x.to(wide)
        if self.normalize == "layer_norm":
            mean, std = self._statistics(x)
            x = (x - mean) / (std + _EPSILON)
        elif self.normalize == "constant_norm_rescale":
            x = x / self._statistics(x)[1]
        if self.subtract_b_dec:
            x = x - self.b_dec.to(wide)
        return x @ self.W_enc.to(wide)

    def _statistics(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        """(shift, scale): decoding multiplies by the scale and adds the shift to undo the normalisation."""
        if self.normalize == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return 0.0, x.norm(dim=-1, keepdim=True) / self.width**0.5

    def _at(self, indices: Sequence[int]) -> Tensor:
        for i in indices:
            if not 0 <= i < self.latents:
                raise UsageError(f"dictionary {self.name!r}: expected a latent from 0 to {self.latents - 1}, found {i}")
        return torch.tensor(list(indices), dtype=torch.long, device=self.W_enc.device)


@dataclass(frozen=True, eq=False)
class EncoderRows:
    """The parts of a dictionary that the activations of a few latents depend on."""

    part: Dictionary
    """A dictionary of these latents alone."""
    whole: Dictionary | None
    """Topk: the whole dictionary, whose latents compete for the top k. None for other architectures."""
    indices: tuple[int, ...]
    """Indices of the latents in the whole dictionary."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> EncoderRows:
        """The same rows on another device or in another dtype."""
        whole = None if self.whole is None else self.whole.to(device, dtype)
        return EncoderRows(self.part.to(device, dtype), whole, self.indices)

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Activations of these latents."""
        acts = self.part.encode(x)
        if self.whole is None:
            return acts
        # A latent can be active only where its pre-activation is positive, so the whole encoder is needed for those
        # tokens alone.
        contested = (acts > 0).any(-1)
        if bool(contested.any()):
            won = self.whole.encode(x[contested])[..., list(self.indices)]
            acts = acts.index_put((contested,), won.to(acts.dtype))
        return acts


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))

"""What sliders do to a model, worked out slowly from their definitions: in fp64, token by token, one text at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.feature import Feature
from steer.core.schedule import Gate, Schedule
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.model.steered import SteeredModel
from steer.model.steering.low_rank import ForwardContext

EXACT = 1e-10


def exact(model: SteeredModel) -> SteeredModel:
    """The model with its norms in the dtype of its weights; transformers computes them in fp32 whatever that is."""

    def norm(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    return model


def share_at(when: Schedule, index: int) -> float:
    """The share of a slider that acts on the pass that writes reply token `index`, gates left out."""
    if when.part == "text" and when.first is None and when.after is None and when.ramp is None:
        return 1.0
    begins = when.after or 0
    if index < begins or (when.first is not None and index >= when.first):
        return 0.0
    return 1.0 if when.ramp is None else min(1.0, (index - begins + 1) / when.ramp)


def activation(dictionary: Dictionary, latent: int, h: np.ndarray) -> float:
    """One latent's activation, from the definition of its architecture."""
    pre = (h - numpy(dictionary.b_dec)) @ numpy(dictionary.W_enc) + numpy(dictionary.b_enc)
    if dictionary.architecture == "jumprelu":
        assert dictionary.threshold is not None
        return float(pre[latent]) if pre[latent] > max(0.0, float(dictionary.threshold[latent])) else 0.0
    if dictionary.architecture == "topk":
        assert dictionary.k is not None
        return max(0.0, float(pre[latent])) if latent in np.argsort(-pre)[: dictionary.k] else 0.0
    assert dictionary.architecture == "standard"
    return max(0.0, float(pre[latent]))


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def asked(operation: str, amount: float, a: float, without: float, unit: float) -> float:
    """Where a reading `a` is to stand, by the table of operations."""
    if operation == "clamp":
        return without + amount * unit
    if operation == "cap":
        return min(a, without + amount * unit)
    if operation == "scale":
        return without + amount * (a - without)
    assert operation == "ablate"
    return (1 - amount) * a


def least_change(rows: list[np.ndarray], by: list[float]) -> np.ndarray:
    """The smallest vector whose projections on unit `rows` are `by`."""
    return np.linalg.lstsq(np.stack(rows), np.array(by), rcond=1e-6)[0]


@dataclass
class Slow:
    """A model under moves, each token under those in force when it was read."""

    model: SteeredModel
    moves: Callable[[int], Sequence[Slider]]
    """Position in the text -> what acts on it."""
    prompt: int
    """How many tokens of the text are the prompt."""
    ablated: dict[tuple[int, Slider], float] = field(default_factory=dict)
    done: dict[Slider, dict[int, float]] = field(default_factory=dict)
    """Of every move: on which tokens it moved something, and by what share of the residual norm."""
    _gates: dict[tuple[int, Gate], bool] = field(default_factory=dict)

    @torch.inference_mode()
    def logits(self, text: Sequence[int]) -> Tensor:
        """Logits of the whole text in one pass: `[tokens, vocab]`."""
        hf, anatomy = self.model.hf, self.model.anatomy
        handles = [hf.get_submodule(anatomy.embedding_modules[0]).register_forward_hook(self._writer(-1))]
        for block in range(anatomy.blocks):
            for name in (w.module for w in anatomy.live_writers if w.block == block):
                handles.append(hf.get_submodule(name).register_forward_hook(self._writer(block)))
            name = anatomy.block_module(block)
            handles.append(hf.get_submodule(name).register_forward_hook(self._site(block)))
        try:
            out = hf(input_ids=torch.tensor([list(text)])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        for (t, move), by in self.ablated.items():
            self._tell(move, t, abs(by) / move.target.residual_norm)  # type: ignore[union-attr]
        return out

    def _writer(self, block: int) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            y = y.clone()
            for t in range(y.shape[1]):
                gone = [m for m in self.moves(t) if m.operation == "ablate" and isinstance(m.target, Direction)]
                gone = [(m, s) for m in gone if (s := self._share(m, t)) > 0]
                v = numpy(y[0, t])
                rows = [numpy(m.target.vector) for m, _ in gone]  # type: ignore[union-attr]
                reads = [float(v @ r) for r in rows]
                by = [s * (asked("ablate", m.amount, a, 0, 0) - a) for (m, s), a in zip(gone, reads, strict=True)]
                for (m, _), b in zip(gone, by, strict=True):
                    if block <= m.site:
                        self.ablated[t, m] = self.ablated.get((t, m), 0.0) + b
                if rows:
                    y[0, t] += torch.from_numpy(least_change(rows, by))
            return y

        return hook

    def _site(self, block: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for t in range(h.shape[1]):
                for m in self.moves(t):
                    if m.when.gate is not None and m.when.gate.site == block:
                        self._gates[t, m.when.gate] = self._open(m.when.gate, numpy(h[0, t]))
                h[0, t] = torch.from_numpy(self._moved(t, block, numpy(h[0, t])))
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    def _moved(self, t: int, block: int, before: np.ndarray) -> np.ndarray:
        acting = [(m, s) for m in self.moves(t) if m.site == block and (s := self._share(m, t)) > 0]
        h = before.copy()
        for m, s in acting:
            target = m.target
            if m.operation == "add":
                d = target if isinstance(target, Direction) else target.direction
                shift = s * m.amount * d.gap * numpy(d.vector)
                norm = d.residual_norm
            elif isinstance(target, Feature):
                shift, norm = self._feature(m, s, before), target.dictionary.norm or math.nan
            else:
                continue
            h += shift
            self._tell(m, t, float(np.linalg.norm(shift)) / norm)
        rows, by = [], []
        for m, s in acting:
            if not m.reads or m.operation == "ablate" or not isinstance(m.target, Direction):
                continue
            d = m.target
            rows.append(numpy(d.vector))
            a = float(h @ rows[-1])
            outlier = np.linalg.norm(h) > 10 * d.residual_norm
            by.append(0.0 if outlier else s * (asked(m.operation, m.amount, a, d.without_mean, d.gap) - a))
            self._tell(m, t, abs(by[-1]) / d.residual_norm)
        return h + least_change(rows, by) if rows else h

    def _feature(self, m: Slider, share: float, before: np.ndarray) -> np.ndarray:
        f = m.target
        assert isinstance(f, Feature)
        out = np.zeros_like(before)
        if f.dictionary.norm is not None and np.linalg.norm(before) > 10 * f.dictionary.norm:
            return out
        for latent, unit in zip(f.indices, f.units, strict=True):
            a = activation(f.dictionary, latent, before)
            out += share * (asked(m.operation, m.amount, a, 0.0, unit) - a) * numpy(f.dictionary.W_dec[latent])
        return out

    def _share(self, m: Slider, t: int) -> float:
        return share_at(m.when, t - (self.prompt - 1)) * (m.when.gate is None or self._gates[t, m.when.gate])

    def _open(self, gate: Gate, h: np.ndarray) -> bool:
        on = gate.on
        if isinstance(on, Direction):
            amount = (float(h @ numpy(on.vector)) - on.without_mean) / on.gap
        else:
            reads = [activation(on.dictionary, i, h) / u for i, u in zip(on.indices, on.units, strict=True)]
            amount = sum(reads) / len(reads)
        return (gate.above is None or amount > gate.above) and (gate.below is None or amount < gate.below)

    def _tell(self, move: Slider, t: int, share: float) -> None:
        if share > 0:
            self.done.setdefault(move, {})[t] = share


def slow_logits(model: SteeredModel, text: Sequence[int], moves: Sequence[Slider], prompt: int) -> Tensor:
    """Logits of a whole text under moves: `[tokens, vocab]`."""
    return Slow(model, lambda t: moves, prompt).logits(text)


@torch.inference_mode()
def fast_logits(model: SteeredModel, text: Sequence[int], moves: Sequence[Slider], prompt: int) -> Tensor:
    """The same by the model's own steering, in one pass."""
    with model.steering.lock, model.steering.applied([Edit.of(moves)]):
        index = torch.arange(len(text))[None] - (prompt - 1)
        with model.steering.passing(ForwardContext(index=index)):
            return model.hf(input_ids=torch.tensor([list(text)])).logits[0]


@contextmanager
def watched(model: SteeredModel) -> Iterator[list[Tensor]]:
    """The logits of every pass inside: `[batch, vocab]`, at each text's last position."""
    seen: list[Tensor] = []
    handle = model.hf.lm_head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def make_dictionary(kind: str = "jumprelu", *, seed: int = 0, site: int = 1, norm: float | None = 5.0) -> Dictionary:
    """Random, 40 latents on a stream of width 32, each active on about a third of the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    extra: dict[str, Any] = {"jumprelu": {"threshold": rand(40).abs() * 0.3}, "topk": {"k": 12}}.get(kind, {})
    W_enc, W_dec = rand(32, 40) / 32**0.5, rand(40, 32) / 32**0.5
    architecture: Any = kind
    return Dictionary(architecture, W_enc, rand(40) * 0.1, W_dec, rand(32) * 0.1, site=site, norm=norm, **extra)


def close_directions(site: int = 1, n: int = 4, seed: int = 3, spread: float = 0.7) -> list[Direction]:
    """Directions around one another, far from orthogonal, each with different statistics."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(32, generator=g)
    out = []
    for i in range(n):
        numbers = torch.rand(3, generator=g).tolist()
        vector = base / base.norm() + spread * torch.randn(32, generator=g) / 32**0.5
        out.append(
            Direction(
                f"d{i}", site, vector, mean=0.2, without_mean=numbers[0] - 0.5,
                with_mean=numbers[0] + 0.3 + numbers[1], residual_norm=3.0 + numbers[2],
            )
        )  # fmt: skip
    return out


def compatible(moves: Sequence[Slider]) -> list[Slider]:
    """As many of them, from the first on, as may stand together."""
    out: list[Slider] = []
    for move in moves:
        with suppress(UsageError):
            Edit.of([*out, move])
            out.append(move)
    return out

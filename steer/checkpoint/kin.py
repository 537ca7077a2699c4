"""How tunes of one base differ: norms of their differences to it, cosines, and what a merge keeps of each.

Every tensor is read once, a chunk at a time, of all models together. Of the differences only their Gram matrix is kept,
for each tensor: norms, cosines, model_stock's `t` and what is new in a model follow from it. Nothing is merged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import AutoConfig

from steer.checkpoint.anatomy import Anatomy, WriterMap
from steer.checkpoint.fetch import hub_errors, read_tokenizer, transformers_errors
from steer.checkpoint.merge import locate, read_recipe, recipe_models
from steer.checkpoint.projection import DTYPES, read_tensor
from steer.checkpoint.quantised import FLOATS, dequantised
from steer.checkpoint.reader import BITS, CheckpointFiles, DecodedTensor, TensorInfo, read_into
from steer.checkpoint.tiny import model_class_of
from steer.errors import CheckpointError, UnsupportedError, UsageError
from steer.files import one_line

Advance = Callable[[int, int], None]
"""Called with (bytes read, bytes to read in all), now and then."""

_CHUNK = 1 << 20
"""Elements of each model that are read at a time."""
_BLOCK = 1 << 16
"""Elements of each model that are multiplied at a time, in fp32: fewer cost more calls, more leave the processor's
caches."""
_THREADS = min(8, 2 * (os.cpu_count() or 1))
"""Tensors at a time: while some threads wait for the disk, others multiply. numpy's loops release the interpreter."""
_COPY, _ALONG = 0.1, 0.95
"""Two models are nearly copies if their difference has at most this share of the larger one's norm, and have nearly one
direction from this cosine on."""


@dataclass(frozen=True)
class Family:
    """Models that might be merged, the base that their differences are taken to, and how they would be merged."""

    models: tuple[str, ...]
    """As they were named, without the base."""
    base: str
    recipe: Path | None = None
    """The mergekit recipe that names them."""
    method: str = "model_stock"
    filter_wise: bool = False
    """Whether model_stock computes its `t` for each row of a matrix."""
    weights: tuple[float, ...] | None = None
    """Factor of each model's difference in a linear merge; None for other methods."""
    dtype: torch.dtype = torch.float32
    """The recipe's `dtype`, in which adapters are merged into their models."""

    @classmethod
    def of(cls, models: Sequence[str | Path], base: str | Path | None = None) -> Family:
        """The family that a recipe (a .yml file) names, or that is named by models and their base.

        `base` replaces the base model of a recipe.
        Errors: UsageError without a base, or without another model.
        """
        names = [str(m) for m in models]
        if len(names) == 1 and names[0].endswith((".yml", ".yaml")):
            return cls._of_recipe(Path(names[0]), base)
        if any(name.endswith((".yml", ".yaml")) for name in names):
            raise UsageError(f"expected one recipe, or models and --base, found {', '.join(names)}")
        if base is None:
            raise UsageError(
                "--base: expected the model that these are tunes of, found none; name it, or give a recipe"
            )
        return cls(_others(names, str(base)), str(base))

    @classmethod
    def _of_recipe(cls, path: Path, base: str | Path | None) -> Family:
        raw = read_recipe(path)
        found = recipe_models({"base_model": raw.get("base_model")})
        if base is None and not found:
            raise UsageError(f"{path}: expected a base_model, found none; name the base with --base")
        named = str(base or found[0])
        models = recipe_models({key: raw[key] for key in ("models", "slices") if key in raw})
        parameters, method = raw.get("parameters") or {}, raw.get("merge_method") or "slices"
        family = cls(
            _others(models, named),
            named,
            path,
            method,
            parameters.get("filter_wise") is True,
            dtype=_dtype(raw, path),
        )
        if method != "linear" or "models" not in raw or parameters.get("normalize", True) is not True:
            return family
        entries = [recipe_models({"model": entry["model"]})[0] for entry in raw["models"]]
        weights: list[Any] = [
            (e.get("parameters") or {}).get("weight", parameters.get("weight")) for e in raw["models"]
        ]
        if not all(isinstance(w, (int, float)) for w in weights) or not sum(weights):
            return family  # weights that differ from layer to layer
        shares = {m: sum(w for e, w in zip(entries, weights, strict=True) if e == m) / sum(weights) for m in models}
        return replace(family, weights=tuple(shares[m] for m in family.models))


def _dtype(raw: Mapping[str, Any], path: Path) -> torch.dtype:
    name = str(raw.get("dtype") or "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"{path}: dtype: expected float32, bfloat16 or float16, found {name}; mend the recipe")
    return found


def _others(names: Sequence[str], base: str) -> tuple[str, ...]:
    others = tuple(name for name in dict.fromkeys(names) if name != base)
    if not others:
        raise UsageError(f"expected a model beside the base {base}, found none; name the tunes to compare")
    return others


@dataclass(frozen=True, eq=False)
class TensorKinship:
    """The differences of all models to the base in one tensor."""

    name: str
    block: int | None
    """None outside of the blocks."""
    kind: str
    """attention, mlp, embedding, head, norm or other."""
    base_norm: float
    gram: Float[np.ndarray, "models models"]
    """Products of the differences."""
    t: float | None
    """model_stock's factor of the mean difference, the mean over the filters; None for fewer than two models."""
    kept: Float[np.ndarray, " models"]
    """Share of each difference that a merge keeps, times its squared norm; NaN where the method has no such share."""


@dataclass(frozen=True, eq=False)
class Kinship:
    """How models differ from their base, and from each other. Norms are those of all weights as one vector."""

    family: Family
    tensors: tuple[TensorKinship, ...]
    bytes_read: int

    @property
    def names(self) -> tuple[str, ...]:
        """The models, as they were named."""
        return self.family.models

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Short names of the models: the last part of their path where that is not another's."""
        short = [name.rpartition("+")[2].rstrip("/").rpartition("/")[2] for name in self.names]
        return tuple(s if short.count(s) == 1 else n for s, n in zip(short, self.names, strict=True))

    @cached_property
    def gram(self) -> Float[np.ndarray, "models models"]:
        """Products of the whole differences."""
        return np.sum([t.gram for t in self.tensors], axis=0)

    @cached_property
    def norms(self) -> Float[np.ndarray, " models"]:
        """Norm of each difference to the base."""
        return np.sqrt(np.diag(self.gram))

    @cached_property
    def base_norm(self) -> float:
        """Norm of the base's weights."""
        return math.hypot(*(t.base_norm for t in self.tensors))

    @cached_property
    def cosines(self) -> Float[np.ndarray, "models models"]:
        """Cosines between the differences; 0 for a model that is the base."""
        return _cosines(self.gram)

    def cosine(self, a: str | Path, b: str | Path) -> float:
        """Cosine between the differences of two models to the base. Errors: UsageError for a model not compared."""
        return float(self.cosines[self._at(a), self._at(b)])

    def new(self, candidate: str | Path, beside: Collection[str | Path] | None = None) -> float:
        """Share (0 to 1) of the squared norm of a model's difference that no mixture of the differences of `beside`,
        by default all others, gives. Errors: UsageError for a model not compared."""
        i = self._at(candidate)
        others = [j for j in range(len(self.names)) if j != i] if beside is None else [self._at(b) for b in beside]
        return _outside(self.gram, i, others) if others else float(self.norms[i] > 0)

    def _at(self, name: str | Path) -> int:
        if str(name) not in self.names:
            raise UsageError(f"expected one of the models {', '.join(self.names)}, found {name}")
        return self.names.index(str(name))

    @cached_property
    def left(self) -> Float[np.ndarray, " models"] | None:
        """Share of each difference that the merge keeps: `t` / models by model_stock, on average over the weights; the
        normalised weight by linear; None for other methods."""
        kept = np.sum([t.kept for t in self.tensors], axis=0)
        squares = np.diag(self.gram)
        return None if np.isnan(kept).any() else np.divide(kept, squares, out=np.zeros_like(kept), where=squares > 0)

    @cached_property
    def by_block(self) -> dict[int, Float[np.ndarray, " models"]]:
        """Norms of the differences in each block, as shares of the base's norm there."""
        return self._grouped({t.block: None for t in self.tensors if t.block is not None}, lambda t: t.block)

    @cached_property
    def by_kind(self) -> dict[str, Float[np.ndarray, " models"]]:
        """Norms as in `by_block`, by kind of tensor over all blocks."""
        return self._grouped({t.kind: None for t in self.tensors}, lambda t: t.kind)

    def by_kind_of_block(self, kind: str) -> dict[int, Float[np.ndarray, " models"]]:
        """Norms as in `by_block`, of one kind of tensor."""
        keys = {t.block: None for t in self.tensors if t.kind == kind and t.block is not None}
        return self._grouped(keys, lambda t: t.block if t.kind == kind else None)

    def _grouped(self, keys: Mapping[Any, None], key: Callable[[TensorKinship], Any]) -> dict[Any, Any]:
        out = {}
        for k in sorted(keys):
            group = [t for t in self.tensors if key(t) == k]
            norm = math.hypot(*(t.base_norm for t in group))
            out[k] = np.sqrt(np.sum([np.diag(t.gram) for t in group], axis=0)) / (norm or 1.0)
        return out

    @cached_property
    def changed(self) -> tuple[TensorKinship, ...]:
        """The tensors in which any model differs from the base."""
        return tuple(t for t in self.tensors if t.gram.any())

    def sentences(self) -> list[str]:
        """What the figures say, for people: copies, nearest kin, model_stock's t, what is left, who adds most."""
        return [*self._near(), *self._merged(), *self._newest()]

    def _near(self) -> Iterator[str]:
        norms, labels = self.norms, self.labels
        yield from (f"{label} is the base: no weight differs." for label, n in zip(labels, norms, strict=True) if not n)
        pairs = [p for p in combinations(range(len(labels)), 2) if norms[p[0]] and norms[p[1]]]
        close = []
        for i, j in pairs:
            c = self.cosines[i, j]
            apart = math.sqrt(max(0.0, self.gram[i, i] + self.gram[j, j] - 2 * self.gram[i, j]))
            if apart <= _COPY * max(norms[i], norms[j]):
                close.append(f"{labels[i]} is nearly a copy of {labels[j]}: cosine {c:.3f}, nearly the same length.")
            elif abs(c) >= _ALONG:
                way = "the same way as" if c > 0 else "the opposite way of"
                close.append(
                    f"{labels[i]} goes {way} {labels[j]}, {norms[i] / norms[j]:.2f} times as far: cosine {c:.3f}."
                )
        yield from close
        if pairs and not close:
            i, j = max(pairs, key=lambda p: self.cosines[p])
            yield f"Nobody is nearly a copy of another; the nearest are {labels[i]} and {labels[j]}, " \
                  f"cosine {self.cosines[i, j]:.2f}."  # fmt: skip

    def _merged(self) -> Iterator[str]:
        changed = [t for t in self.changed if t.t is not None]
        if changed and self.family.method == "model_stock":
            values = [t.t for t in changed if t.t is not None]
            low, high = int(np.argmin(values)), int(np.argmax(values))
            yield (
                f"model_stock's t is {np.mean(values):.2f} on average over the {len(values)} of {len(self.tensors)} "
                f"tensors that differ, from {values[low]:.2f} ({changed[low].name}) to {values[high]:.2f} "
                f"({changed[high].name})."
            )
        if self.left is None:
            yield f"How much of each difference {self.family.method} keeps is not computed."
            return
        shares = ", ".join(f"{label} {left:.1%}" for label, left in zip(self.labels, self.left, strict=True))
        yield f"Left of each difference in the merge ({self.family.method}): {shares}."

    def _newest(self) -> Iterator[str]:
        if len(self.names) < 2 or not self.norms.any():
            return
        lengths = [n * math.sqrt(self.new(name)) for n, name in zip(self.norms, self.names, strict=True)]
        i = int(np.argmax(lengths))
        yield (
            f"{self.labels[i]} adds most that is new: {self.new(self.names[i]):.0%} of its difference (squared norm) "
            f"is in no mixture of the others, {lengths[i] / self.base_norm:.2%} of the base's norm."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values: for each model, for each pair, by block and kind, and t of each tensor."""
        left = [None] * len(self.names) if self.left is None else self.left.tolist()
        return {
            "base": self.family.base,
            "method": self.family.method,
            "base_norm": self.base_norm,
            "sentences": self.sentences(),
            "models": [
                {"name": name, "label": label, "norm": float(norm), "of_base": float(norm) / (self.base_norm or 1.0),
                 "new": self.new(name), "left": share}
                for name, label, norm, share in zip(self.names, self.labels, self.norms, left, strict=True)
            ],
            "cosines": self.cosines.tolist(),
            "by_block": {str(k): v.tolist() for k, v in self.by_block.items()},
            "by_kind": {k: v.tolist() for k, v in self.by_kind.items()},
            "tensors": [
                {"name": t.name, "block": t.block, "kind": t.kind, "t": t.t, "base_norm": t.base_norm,
                 "norms": np.sqrt(np.diag(t.gram)).tolist()}
                for t in self.tensors
            ],
            "bytes_read": self.bytes_read,
        }  # fmt: skip


def kin(*models: str | Path, base: str | Path | None = None, advance: Advance | None = None) -> Kinship:
    """Compare tunes of one base before they are merged. Returns norms, cosines, model_stock's t, and what is new.

    `models`: a mergekit recipe (.yml), or models as recipes name them (`directory`, `hub/id`, `model+adapter`) with
    their `base`. Reads each tensor once, in memory of a few megabytes a model. `advance` is called with (bytes read,
    bytes in all).

        kinship = steer.kin("recipe.yml")
        print(kinship.cosines, *kinship.sentences())

    Errors: UsageError without a base; CheckpointError for a model that is not there, lacks a tensor of the base, has
    another shape, or has weights that are not finite.
    """
    family = Family.of(models, base)
    return Kinship(family, *_Comparison(family).tensors(advance or (lambda done, total: None)))


def mismatches(models: Sequence[str | Path], base: str | Path | None = None) -> list[str]:
    """Return a line for each thing in which models and base differ, with what mergekit would do: architectures, shapes,
    vocabularies, tokens with other ids, special tokens. No weights are read.

    Errors: UsageError without a base; CheckpointError for a model that is not there or is broken.
    """
    family = Family.of(models, base)
    comparison = _Comparison(family)
    first, *others = comparison.sources
    return [line for other in others for line in _lines(other, first, comparison.anatomy, comparison.map)]


# --- the models on disk ---


class _Source:
    """One model: its files, and its adapter if it has one."""

    def __init__(self, name: str, family: Family) -> None:
        self.name = name
        parts = {key: _folder(name, part) for key, part in locate(name, family.recipe).items()}
        self.folder = parts["model"]
        self.files = dequantised(CheckpointFiles.open(self.folder))
        self.tune, self.dtype = parts.get("lora"), family.dtype
        self.adapter: _Adapter | None = None
        self.aliases: dict[str, str] = {}
        """Tensors that the files lack, and those that they are tied to."""

    def stored(self, tensor: str) -> TensorInfo | None:
        """The header's entry of a tensor, or of the one that it is tied to; None if there is neither."""
        return self.files.tensors.get(tensor) or self.files.tensors.get(self.aliases.get(tensor, ""))

    def load_adapter(self) -> None:
        """Read the adapter, if the model has one, before tensors are opened."""
        if self.tune is not None:
            self.adapter = _Adapter(self.folder, self.tune, self.dtype, self.name)
            lost = [name for name in self.adapter.changed if name not in self.files.tensors]
            if lost:
                raise UnsupportedError(
                    f"{self.name}: the adapter changes {lost[0]}, which {self.folder} holds in another form; merge "
                    "the two first, by a recipe with this model alone"
                )

    def open(self, tensor: str, stack: ExitStack) -> _Values:
        """The values of a tensor, until the stack is closed."""
        info = self.stored(tensor)
        assert info is not None  # checked before anything is read
        if self.adapter is not None and tensor in self.adapter.changed:
            whole = read_tensor(self.files, tensor)
            return _Values("F32", self.adapter.merged(tensor, whole).reshape(-1).data.cast("B"), None, self.folder)
        if isinstance(info, DecodedTensor):
            return _Values(info.dtype, memoryview(self.files.read(info)), None, self.folder)
        path = self.files.root / info.file
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        os.posix_fadvise(fd, info.start, info.nbytes, os.POSIX_FADV_SEQUENTIAL)
        return _Values(info.dtype, None, (fd, info.start), path)


def _folder(name: str, part: Mapping[str, str | None]) -> Path:
    """The directory of a model or an adapter; that of a hub id is downloaded."""
    place = Path(str(part["path"]))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(str(part["path"]), revision=part["revision"]))


@dataclass(frozen=True)
class _Values:
    """The values of one tensor: in memory, or in a file from an offset on."""

    dtype: str
    held: memoryview | None
    file: tuple[int, int] | None
    """Descriptor and offset."""
    path: Path

    def read(self, at: int, count: int, buffer: bytearray) -> memoryview:
        """The bytes of `count` elements from the element `at` on; `buffer` has room for them."""
        size = BITS[self.dtype] // 8
        if self.held is not None:
            return self.held[at * size : (at + count) * size]
        assert self.file is not None
        view = memoryview(buffer)[: count * size]
        read_into(self.file[0], self.file[1] + at * size, view, self.path)
        return view


class _Adapter:
    """A PEFT adapter, merged into its model's weights one at a time, by peft as mergekit has it merge them all."""

    def __init__(self, model: Path, adapter: Path, dtype: torch.dtype, name: str) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        from steer.checkpoint.adapters import fitting_adapters

        with transformers_errors(name):
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            made = model_class_of(config)
            if made is None:
                raise CheckpointError(f"{name}: expected an architecture of transformers, found {config.model_type}")
            with torch.device("meta"):
                live = made._from_config(config, dtype=dtype)
        for module in live.modules():
            for key, p in module._parameters.items():
                if p is not None:  # one zero in every place: peft needs weights with a device, and they take no memory
                    zeros = torch.zeros(1, dtype=p.dtype).expand(p.shape)
                    module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
        try:
            with fitting_adapters():
                whole: Any = PeftModel.from_pretrained(live, str(adapter), low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(
                f"{name}: the adapter does not fit the model ({one_line(e)}); name the one it was made for"
            ) from e
        tuned = whole.base_model.model
        self.layers = {n: m for n, m in tuned.named_modules() if isinstance(m, BaseTunerLayer)}
        self.trained = {
            n.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): p
            for n, p in tuned.named_parameters()
            if p.numel() > 1 and any(p.stride()) and not (".lora_" in n or "original_module" in n)
        }
        """Whole weights that the adapter holds, by their names on disk."""
        self.dtype, self.lock = dtype, Lock()

    @property
    def changed(self) -> set[str]:
        """The tensors that the adapter changes, by the names that they should have on disk."""
        return {*self.trained, *(f"{path}.weight" for path in self.layers)}

    def merged(self, tensor: str, weight: torch.Tensor) -> Float[np.ndarray, ...]:
        """The weight with the adapter in it, in fp32."""
        whole = self.trained.get(tensor, weight).detach().to(self.dtype, copy=True)
        layer = self.layers.get(tensor.rpartition(".")[0])
        if layer is None or not tensor.endswith(".weight"):
            return whole.float().numpy()
        base: Any = layer.get_base_layer()
        with self.lock, torch.no_grad():
            empty, base.weight = base.weight, nn.Parameter(whole, requires_grad=False)
            layer.merge()
            out = base.weight.detach().float().numpy()
            layer.merged_adapters.clear()
            base.weight = empty
        return out


# --- reading and multiplying ---


class _Comparison:
    """The models of a family, checked against the base by their headers."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.sources = [_Source(name, family) for name in (family.base, *family.models)]
        base = self.sources[0].files
        self.anatomy = Anatomy.of(base.config, family.base)
        self.map: WriterMap = self.anatomy.find(base.config, base.tensors)
        for source in self.sources:
            config = source.files.config
            alike = config.get("model_type") == base.config.get("model_type")
            if alike and Anatomy.of(config, source.name).tied:
                source.aliases[self.map.head] = self.map.embedding

    @property
    def names(self) -> list[str]:
        """The tensors to compare: the floats of the base, and a head that any model has."""
        names = [t.name for shard in self.sources[0].files.shards for t in shard.tensors if t.dtype in FLOATS]
        heads = [self.map.head] if any(self.map.head in s.files.tensors for s in self.sources) else []
        return list(dict.fromkeys([*names, *heads]))

    def tensors(self, advance: Advance) -> tuple[tuple[TensorKinship, ...], int]:
        """Every tensor's kinship, and the bytes that were read."""
        names = self.names
        counts = [self._elements(name) for name in names]
        sizes = [sum(info.nbytes for source in self.sources if (info := source.stored(name))) for name in names]
        for source in self.sources:
            source.load_adapter()
        found, done, total = [], 0, sum(sizes)
        # Products this thin gain nothing from threads of BLAS, which would wait for each other.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(_THREADS) as pool:
            for tensor, size in zip(pool.map(self._measure, names, counts), sizes, strict=True):
                found.append(tensor)
                done += size
                advance(done, total)
        return tuple(found), total

    def _elements(self, name: str) -> int:
        """How many elements of a tensor all models have. Errors: CheckpointError for one that is missing or that has
        another shape."""
        stored = []
        for source in self.sources:
            info = source.stored(name)
            if info is None:
                raise CheckpointError(
                    f"{source.name}: expected tensor {name} of {self.family.base}, found none; leave the model out"
                )
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{source.name}: {name}: expected floats, found {info.dtype}; leave the model out"
                )
            stored.append(info)
        shapes = [info.shape for info in stored]
        rows = name in (self.map.embedding, self.map.head)  # the rows that all vocabularies have
        for source, shape in zip(self.sources, shapes, strict=True):
            if shape[rows:] != shapes[0][rows:]:
                raise CheckpointError(
                    f"{source.name}: {name}: expected the shape {list(shapes[0])} of {self.family.base}, found "
                    f"{list(shape)}; leave the model out"
                )
        return min(math.prod(shape) for shape in shapes)

    def _measure(self, name: str, count: int) -> TensorKinship:
        shape = self.sources[0].stored(name)
        assert shape is not None
        row = shape.shape[-1] if self.family.filter_wise and len(shape.shape) > 1 else None
        with ExitStack() as stack:
            values = [source.open(name, stack) for source in self.sources]
            base, filters = _products(values, count, row)
        if not (math.isfinite(base) and np.isfinite(filters).all()):
            diagonal = [base, *np.einsum("fii->i", filters)]
            where = next(s.name for s, square in zip(self.sources, diagonal, strict=True) if not math.isfinite(square))
            raise CheckpointError(f"{where}: {name}: expected finite weights, found some that are not; fetch it again")
        t = _stock_t(filters) if len(self.family.models) > 1 else None
        block, kind = _place(name, shape, self.anatomy, self.map)
        squares, count_of = np.einsum("fii->fi", filters), len(self.family.models)
        if self.family.method == "model_stock":
            kept = np.full(count_of, np.nan) if t is None else (t[:, None] / count_of * squares).sum(0)
        else:
            kept = np.array(self.family.weights or [np.nan] * count_of) * squares.sum(0)
        return TensorKinship(
            name, block, kind, math.sqrt(base), filters.sum(0), None if t is None else float(t.mean()), kept
        )


def _products(
    values: Sequence[_Values], count: int, row: int | None
) -> tuple[float, Float[np.ndarray, "filters models models"]]:
    """The base's squared norm, and the Gram matrix of the others' differences to it: one for each row of `row`
    elements, or one for all. The base comes first in `values`. fp32 within a block, float64 over blocks."""
    models = len(values) - 1
    block = _BLOCK if row is None else row * max(1, _BLOCK // row)
    chunk = block * max(1, _CHUNK // block)
    space = np.empty((models + 1, block), np.float32)
    size = max(BITS[v.dtype] // 8 for v in values)
    buffers = [bytearray(min(chunk, count) * size) for _ in values]
    base, grams, total = 0.0, [], np.zeros((models, models))
    for at in range(0, count, chunk):
        n = min(chunk, count - at)
        raw = [v.read(at, n, buffer) for v, buffer in zip(values, buffers, strict=True)]
        for rows in _decoded(raw, values, n, space, paired=row is None):
            first, differences = rows[0], np.subtract(rows[1:], rows[0], out=rows[1:])
            base += float(first @ first)
            if row is not None:
                filters = differences.reshape(models, -1, row).transpose(1, 0, 2)
                grams.append((filters @ filters.transpose(0, 2, 1)).astype(np.float64))
                continue
            for i in range(models):
                total[i, i:] += differences[i:] @ differences[i]
    if row is None:
        return base, (np.triu(total) + np.triu(total, 1).T)[None]
    return base, np.concatenate(grams)


def _decoded(
    raw: Sequence[memoryview], values: Sequence[_Values], count: int, space: Float[np.ndarray, "n block"], paired: bool
) -> Iterator[Float[np.ndarray, "n elements"]]:
    """The same elements of all models as fp32, a block at a time, in `space`. `paired`: in any order.

    bf16 is the upper half of fp32, so of two elements in a 32-bit word one is the word without its lower half and the
    other is the word moved up by 16 bits: on AVX2 five times as fast as torch's conversion.
    """
    block = space.shape[1]
    if paired and count % 2 == 0 and all(v.dtype == "BF16" for v in values):
        words = [np.frombuffer(r, np.uint32) for r in raw]
        for at in range(0, count // 2, block):
            n = min(block, count // 2 - at)
            for half in (np.bitwise_and, np.uint32(0xFFFF0000)), (np.left_shift, np.uint32(16)):
                for source, target in zip(words, space, strict=True):
                    half[0](source[at : at + n], half[1], out=target[:n].view(np.uint32))
                yield space[:, :n]
        return
    tensors = [torch.frombuffer(r, dtype=DTYPES[v.dtype]) for r, v in zip(raw, values, strict=True)]
    for at in range(0, count, block):
        n = min(block, count - at)
        for source, target in zip(tensors, torch.from_numpy(space), strict=True):
            target[:n].copy_(source[at : at + n])
        yield space[:, :n]


def _cosines(gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    norms = np.sqrt(np.diag(gram))
    products = np.outer(norms, norms)
    return np.clip(np.divide(gram, products, out=np.zeros_like(gram), where=products > 0), -1, 1)


def _stock_t(grams: Float[np.ndarray, "filters n n"]) -> Float[np.ndarray, " filters"]:
    """model_stock's `t` (Jang et al. 2024, arXiv 2403.19522), with mergekit's bounds on norms and denominators."""
    n = grams.shape[1]
    norms = np.sqrt(np.einsum("fii->fi", grams))
    pairs = list(combinations(range(n), 2))
    cosines = [np.clip(grams[:, i, j] / np.maximum(norms[:, i] * norms[:, j], 1e-6), -1, 1) for i, j in pairs]
    c = np.mean(cosines, axis=0)
    below = 1 + (n - 1) * c
    return np.divide(n * c, below, out=np.zeros_like(c), where=np.abs(below) >= 1e-6)


def _outside(gram: Float[np.ndarray, "n n"], i: int, others: Sequence[int]) -> float:
    """Share of the squared norm of the vector `i` that is orthogonal to the vectors `others`."""
    square = gram[i, i]
    if not square:
        return 0.0
    lengths = np.sqrt(np.diag(gram)[list(others)])
    lengths[lengths == 0] = 1.0
    among = gram[np.ix_(others, others)] / np.outer(lengths, lengths)  # of unit vectors, so that small ones count too
    along = gram[i, list(others)] / lengths
    inside = along @ np.linalg.pinv(among, rcond=1e-9, hermitian=True) @ along
    return float(np.clip(1 - inside / square, 0, 1))


def _place(name: str, info: TensorInfo, anatomy: Anatomy, writers: WriterMap) -> tuple[int | None, str]:
    """The block that a tensor belongs to, and its kind."""
    if name == writers.embedding or name in (w.tensor for w in writers.writers if w.kind == "embedding"):
        return None, "embedding"
    if name == writers.head:
        return None, "head"
    before, after = (writers.base + anatomy.layout.block).split("{}")
    number, _, below = name.removeprefix(before).partition(f"{after}.")
    inside = name.startswith(before) and number.isdigit()
    block = int(number) if inside and int(number) < anatomy.blocks else None
    if block is not None:
        for addend in anatomy.addends(block):
            modules = (addend.module, *(part.weight for part in addend.parts))
            if below.partition(".")[0] in {module.partition(".")[0] for module in modules}:
                return block, addend.kind
    return block, "norm" if len(info.shape) == 1 else "other"


# --- what does not fit ---


def _lines(other: _Source, base: _Source, anatomy: Anatomy, writers: WriterMap) -> Iterator[str]:
    a, b = (s.files.config.get("model_type") for s in (other, base))
    if a != b:
        yield f"{other.name}: is a {a}, the base {base.name} a {b}; mergekit refuses to mix architectures"
    vocabulary = {writers.embedding, writers.head}
    shapes = {n: (i.shape, t.shape) for n, t in base.files.tensors.items() if (i := other.stored(n)) is not None}
    wrong = [(n, a, b) for n, (a, b) in shapes.items() if a[n in vocabulary :] != b[n in vocabulary :]]
    if wrong:
        name, found, wanted = wrong[0]
        yield (f"{other.name}: {name} is {list(found)}, in the base {list(wanted)}, and {len(wrong) - 1} other tensors "
               "differ in shape; mergekit stops at the first")  # fmt: skip
    missing = [n for n in base.files.tensors if other.stored(n) is None]
    if missing:
        yield f"{other.name}: lacks {_some(missing)}; mergekit stops at the first"
    extra = [n for n in other.files.tensors if base.stored(n) is None]
    if extra:
        yield f"{other.name}: has {_some(extra)} that the base lacks; mergekit leaves them out"
    rows = shapes.get(writers.embedding)
    if rows and rows[0][0] != rows[1][0]:
        yield (
            f"{other.name}: has a vocabulary of {rows[0][0]:,} rows, the base {rows[1][0]:,}; mergekit stops unless "
            f"the recipe says tokenizer_source: base, and here the first {min(rows[0][0], rows[1][0]):,} are compared"
        )
    yield from _tokens(other, base)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"


def _tokens(other: _Source, base: _Source) -> Iterator[str]:
    """What differs between two tokenizers."""
    if other.folder == base.folder:
        return
    compared, expected = _tokenizer(other.folder), _tokenizer(base.folder)
    for source, tokenizer in ((other, compared), (base, expected)):
        if isinstance(tokenizer, str):
            yield f"{source.name}: its tokenizer cannot be compared: {tokenizer}"
            return
    ids, wanted = compared.get_vocab(), expected.get_vocab()
    moved = [token for token, i in wanted.items() if ids.get(token, i) != i]
    lost, added = [t for t in wanted if t not in ids], [t for t in ids if t not in wanted]
    for tokens, what in ((moved, "with other ids"), (lost, "missing"), (added, "that the base lacks")):
        if tokens:
            first = ", ".join(map(repr, sorted(tokens, key=lambda t: wanted.get(t, ids.get(t)))[:3]))
            yield (
                f"{other.name}: {len(tokens):,} of {len(wanted):,} tokens {what}, the first {first}; mergekit mixes "
                "rows of different tokens unless the recipe says tokenizer_source: base"
            )
    for key, token in expected.special_tokens_map.items():
        found = compared.special_tokens_map.get(key)
        if found != token:
            yield f"{other.name}: {key} is {found!r}, in the base {token!r}; the merge takes the base's"


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model, or why there is none."""
    try:
        return read_tokenizer(folder, str(folder))
    except CheckpointError as e:
        return str(e).removeprefix(f"{folder}: ")

"""Finds the anatomy of an architecture that is not in `layouts`, and proves it on a tiny random model of its class.

It runs the model and compares numbers, and relies on no names: it finds the modules that return the residual stream,
the outputs that each block adds to it, the weights that write these outputs, and how the logits follow from the last
residual stream. Then it makes the same edit by hooks and in the weights, and both must give the same logits. The model
is in fp64, so that an identity holds to ten digits or does not hold.

`structure` returns what was found for a config. It is cached by the config and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from steer.checkpoint.fetch import home
from steer.checkpoint.layouts import Addend, BlockKind, Layout, Part, Structure, architecture_of, pattern
from steer.checkpoint.projection import ablate, through_norm
from steer.checkpoint.tiny import IDS, model_class_of, own_config, tiny_config, tiny_model, tiny_world
from steer.core.version import __version__
from steer.errors import UnsupportedError
from steer.files import one_line, write_atomic

TOLERANCE = 1e-9
"""Largest error of an identity, as a share of the numbers compared. Rounding of fp64 gives 1e-13 or so."""
_PADDED = 1e-5
"""The same for a text in a batch, since blocks of linear attention compute in fp32."""
_MOST_ADDENDS = 4
_MOST_CANDIDATES = 14
_MLP = re.compile(r"mlp|moe|ffn|feed_?forward|expert|\bfc", re.IGNORECASE)
_MIXER = re.compile(r"attn|attention|mamba|ssm|conv|temporal", re.IGNORECASE)
"""Names of modules that are an MLP, and of those that mix tokens. Strengths can differ between the two; nothing else
depends on it."""


class NotProved(UnsupportedError):
    """The anatomy of an architecture could not be proved; says which identity does not hold, where, and by how much."""


def structure(config: Mapping[str, Any], where: str) -> Structure:
    """The anatomy of a config.json, found and proved, or taken from the cache. `where`: the model, for messages.

    Errors: UnsupportedError for an architecture that transformers does not have, and NotProved.
    """
    typed = _typed(config, where)
    model_class = model_class_of(typed)
    if model_class is None:
        raise UnsupportedError(
            f"{where}: architecture {architecture_of(config)} is unknown to transformers {transformers.__version__}; "
            "expected one of its language models"
        )
    typed = _completed(typed, model_class)
    path = cache_file(typed, model_class)
    if path not in _known:
        _known[path] = _cached(path) or _proved(typed, model_class, path)
    found = _known[path]
    if isinstance(found, str):
        raise NotProved(f"{where}: the anatomy of {model_class.__name__} is not proved: {found}")
    return found


def cache_file(config: PreTrainedConfig, model_class: type[PreTrainedModel], what: str = "structure") -> Path:
    """The file that keeps what was found for a config: `what` it is, by the class, the config and the versions."""
    made_by = [__version__, transformers.__version__, torch.__version__, _ADAPTER.json_schema()]
    key = json.dumps([what, model_class.__name__, *made_by, _plain(config)], sort_keys=True)
    return home() / "anatomies" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


_known: dict[Path, Structure | str] = {}
_ADAPTER: TypeAdapter[Structure | str] = TypeAdapter(Structure | str)


def _typed(config: Mapping[str, Any], where: str) -> PreTrainedConfig:
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{where}: model type {model_type} is unknown to transformers {transformers.__version__}; expected one of "
            "its language models"
        )
    try:
        # Infinity, which JSON lacks, is stored as an object.
        return CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats(dict(config)))
    except Exception as e:  # a class may check its config in any way
        raise UnsupportedError(f"{where}: config.json: transformers refuses it: {one_line(e)}") from e


def _completed(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The class's own config, with the sizes of the heads filled in that most classes work out and some leave out."""
    config = own_config(config, model_class)
    text = config.get_text_config()
    values = text.to_dict()
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        for key, value in (("head_dim", width // heads), ("num_key_value_heads", heads)):
            if key in values and values[key] is None:
                setattr(text, key, value)
    return config


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config without the fields that say nothing about the model's structure."""
    unrelated = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    return {k: v for k, v in config.to_dict().items() if k not in unrelated}


def _cached(path: Path) -> Structure | str | None:
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError):  # written by another program, or not at all: it is found again
        return None


def _proved(config: PreTrainedConfig, model_class: type[PreTrainedModel], path: Path) -> Structure | str:
    try:
        found: Structure | str = prove(config, model_class)
    except UnsupportedError as e:
        found = str(e)
    write_atomic(path, _ADAPTER.dump_json(found))
    return found


def prove(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Structure:
    """Find the anatomy of a config, and prove it. Errors: NotProved."""
    config = _completed(config, model_class)
    with tiny_world():
        proved = _Proof(tiny_model(tiny_config(config, model_class), model_class)).found()
    return _of_config(config, model_class, proved)


@dataclass(frozen=True)
class _Proved:
    """Findings that hold for every config that differs from the tiny one only in sizes and in the order of blocks."""

    layout: Layout
    signatures: tuple[frozenset[str], ...]
    """The parameters of each kind of block, by which blocks of another model are recognised."""
    tied: bool
    logit_softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class _Source:
    """One vector that a block adds, in the live model."""

    module: str
    """Path of the module that puts it out, before the norms, or that is `given` it."""
    given: bool
    norms: tuple[str, ...]
    """The norms between it and the residual stream, the one before the residual stream first."""
    kind: BlockKind
    u: Float[Tensor, " d"]
    """The direction that has to leave its output so that the direction of the proof leaves the residual stream."""
    scale: float
    weights: dict[str, int]
    """Path of each weight that writes it -> the axis that faces the residual stream."""
    biases: tuple[str, ...]


class _Proof:
    """One proof on one tiny model, in fp64."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.head: Any = model.get_output_embeddings()
        if self.head is None:
            raise NotProved("LM head: expected a module that puts out the logits, found none")
        self.ids = torch.randint(IDS.start, IDS.stop, (2, 12), generator=torch.Generator().manual_seed(0))
        self.run = _Run(model, self.ids)
        if not bool(self.run.logits.isfinite().all()):
            raise NotProved("the logits of a random model are not finite")
        self.blocks = self._blocks()
        self.given = [self.run.given[b] for b in self.blocks]
        self.out = [self.run.out[b] for b in self.blocks]
        self.width = self.out[0].shape[-1]
        self.r = nn.functional.normalize(torch.randn(self.width, generator=torch.Generator().manual_seed(5)), dim=0)
        self.offset: float | None = None

    def found(self) -> _Proved:
        """All steps; see the module."""
        self._check_own_residuals()
        self._check_alone()
        sources = [self._sources(i) for i in range(len(self.blocks))]
        embeddings, output = self._embeddings()
        norm, centred, head, scale, softcap = self._head()
        base = self._decoder(norm, embeddings)
        tied = self.head.weight is self.model.get_input_embeddings().weight
        stored = self._stored()
        path = self.blocks[0].removeprefix(base).removesuffix("0") + "{}"
        signatures: dict[frozenset[str], tuple[Addend, ...]] = {}
        prefixes: dict[str, None] = {}
        for i, (block, found) in enumerate(zip(self.blocks, sources, strict=True)):
            addends = tuple(self._addend(block, i, source, path, stored, prefixes) for source in found)
            if signatures.setdefault(_signature(self.model, block), addends) != addends:
                raise NotProved(f"{block}: writes in another way than a block with the same parameters")
        self._hooks_and_weights(sources, embeddings, output, tied)
        place = _on_disk(self.head_alone, stored)
        inside = [(path.format(i), n) for i in range(len(self.blocks)) for n in (*stored, *self.run.parameters)]
        names = {pattern(n.partition(f"{p}.")[2]) for p, n in inside if f"{p}." in n}
        names |= {pattern(n.removeprefix(b)) for n in (*stored, *self.run.parameters) for b in (base, *prefixes)}
        layout = Layout(
            self.model.config.get_text_config().model_type,
            base=base,
            bases=tuple(p for p in prefixes if p != base),
            block=path,
            blocks=tuple(signatures.values()),
            embeddings=tuple(e.removeprefix(base) for e in embeddings),
            embedding_output=output and output.removeprefix(base),
            heads=tuple(dict.fromkeys((place[0].removesuffix(".weight") if place else head, head))),
            head_module=head,
            gain_offset=self.offset or 0.0,
            softcap_or_sinks=self._softcap_or_sinks(),
            final_norm=norm.removeprefix(base),
            centred=centred,
            mlp_bias="always" if self._constant_passes(sources) else None,
            names=tuple(sorted(names - {""})),
        )
        return _Proved(layout, tuple(signatures), tied, softcap, scale)

    def _check_own_residuals(self) -> None:
        """Raise NotProved where the residual streams are not those that the class itself gives."""
        out = self.model(input_ids=self.ids, use_cache=False, output_hidden_states=True)
        states = getattr(out, "hidden_states", None) or ()
        for block, output in zip(self.blocks, self.out[:-1] if states else (), strict=False):
            if not any(_equal(output, its) for its in states):  # the last one may be after the final norm
                raise NotProved(f"{block}: puts out another residual stream than output_hidden_states gives")

    def _check_alone(self) -> None:
        """Raise NotProved where blocks share weights, or where padding on the left changes a text's logits."""
        owner: dict[int, str] = {}
        for block in self.blocks:
            for name, parameter in self.model.get_submodule(block).named_parameters():
                if owner.setdefault(id(parameter), block) != block:
                    raise NotProved(f"{block}.{name}: is a weight of {owner[id(parameter)]} too")
        width, short = self.ids.shape[1], 7
        mask = torch.ones_like(self.ids)
        mask[0, : width - short] = 0
        padded, alone = self.ids.clone(), self.ids[:1, width - short :]
        padded[0, : width - short] = 0
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        more = {"position_ids": places} if "position_ids" in signature(self.model.forward).parameters else {}
        try:
            with_others = self.model(input_ids=padded, attention_mask=mask, use_cache=False, **more).logits[:1, -short:]
        except Exception as e:  # whatever the code of any class raises
            raise NotProved(f"a text padded on the left cannot be read: {type(e).__name__}: {one_line(e)}") from e
        off = float((with_others - self.model(input_ids=alone, use_cache=False).logits).abs().max())
        if not off < _PADDED * (1 + float(with_others.abs().max())):
            raise NotProved(f"a text padded on the left in a batch has logits that differ by {off:.1e} from it alone")

    def _blocks(self) -> list[str]:
        """Paths of the blocks: the longest list of modules in which the output of each is the input of the next."""
        lists = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module):
                paths = [f"{name}.{i}" for i in range(len(module))]
                pairs = [(self.run.out.get(a), self.run.given.get(b)) for a, b in itertools.pairwise(paths)]
                ends = self.run.out.get(paths[-1]), self.run.given.get(paths[0])
                shaped = all(x is not None and x.shape[:-1] == self.ids.shape for x in ends)
                if shaped and all(a is not None and b is not None and _equal(a, b) for a, b in pairs):
                    lists.append(paths)
        if not lists:
            raise NotProved("blocks: expected a list of modules that hand the residual stream on unchanged, found none")
        return max(lists, key=len)

    def _sources(self, i: int) -> list[_Source]:
        """The additions of block `i` to the residual stream: the fewest outputs of modules that sum to its change."""
        block, groups = self.blocks[i], self._groups(i)
        if found := self._summed(self.out[i], groups, [self.given[i]]):
            return [source for scale, group in found for source in self._written(i, group, scale, self.r, ())]
        names = ", ".join(g[0].removeprefix(f"{block}.") for g in groups)
        raise NotProved(f"{block}: what it adds to the residual stream is no sum of what its modules put out ({names})")

    def _groups(self, i: int) -> list[list[str]]:
        """The modules of block `i` that put out a vector for each token, those with equal outputs in one group, the
        outermost first."""
        block, run = self.blocks[i], self.run
        groups: list[list[str]] = []
        for name in run.order:
            out = run.out[name]
            if not name.startswith(f"{block}.") or out.numel() != self.out[i].numel() or not float(out.abs().max()):
                continue
            if _equal(out.reshape(self.given[i].shape), self.given[i]):
                continue
            same = next((g for g in groups if _equal(run.out[g[0]].flatten(), out.flatten())), None)
            if same is None:
                groups.append([name])
            else:
                same.append(name)
        for group in groups:
            group.sort(key=lambda name: name.count("."))
        return sorted(groups, key=lambda g: g[0].count("."))[:_MOST_CANDIDATES]

    def _summed(
        self, target: Tensor, groups: Sequence[list[str]], residual: Sequence[Tensor]
    ) -> list[tuple[float, list[str]]]:
        """(factor, modules) of the fewest outputs that sum to `target`, together with a multiple of the residual stream
        where one is given; empty if none do."""
        for count in range(1, _MOST_ADDENDS + 1):
            for chosen in itertools.combinations(groups, count):
                factors, error = _solved(target, [*residual, *(self.run.out[g[0]] for g in chosen)])
                if error < TOLERANCE and all(abs(f) > TOLERANCE for f in factors[: len(residual)]):
                    return [(round(f, 9), g) for f, g in zip(factors[len(residual) :], chosen, strict=True)]
        return []

    def _written(
        self, i: int, group: Sequence[str], scale: float, u: Float[Tensor, " d"], norms: tuple[str, ...]
    ) -> list[_Source]:
        """The vectors that sum to the output of the modules `group`, each with its writers. `norms`: those between it
        and the residual stream. `u`: the direction that has to leave it."""
        module = self._writing(group)
        if module is None:
            raise NotProved(f"{group[0]}: adds to the residual stream, and has no parameters")
        if (gain := self._gain(module)) is None:
            return [self._source(i, module, scale, u, norms)]
        norm, given, (weight, offset, centred) = module, self.run.given[module], gain
        if centred:
            raise NotProved(f"{norm}: a LayerNorm lies between a writer and the residual stream")
        self._one_offset(norm, offset)
        u, norms, groups = through_norm(u[:, None], weight)[:, 0], (*norms, norm), self._groups(i)
        before = next((g for g in groups if _equal(self.run.out[g[0]].flatten(), given.flatten())), [])
        if self._writing(before) is not None:
            return self._written(i, before, scale, u, norms)
        try:
            return [self._source(i, norm, scale, u, norms, given=True)]
        except NotProved:  # its input passes norms itself
            found = self._summed(given, [g for g in groups if norm not in g], ())
            if not found:
                raise
            return [s for factor, g in found for s in self._written(i, g, scale * factor, u, norms)]

    def _source(
        self, i: int, module: str, scale: float, u: Float[Tensor, " d"], norms: tuple[str, ...], *, given: bool = False
    ) -> _Source:
        """The vector that a module puts out, or is `given`, with its writers."""
        weights, biases = self._writers(self.blocks[i], module, u, given=given)
        return _Source(module, given, norms, self._kind(next(iter(weights), module)), u, scale, weights, biases)

    def _writing(self, group: Sequence[str]) -> str | None:
        """Return the innermost of modules with equal outputs that has parameters and is given texts. `group` begins
        with the outermost. A module that is given a list of tokens does not know which text each belongs to."""
        shaped = [n for n in group if (g := self.run.given.get(n)) is not None and g.shape[:-1] == self.ids.shape]
        owning = [n for n in shaped if any(True for _ in self.model.get_submodule(n).parameters())]
        return owning[-1] if owning else None

    def _writers(
        self, block: str, module: str, u: Float[Tensor, " d"], *, given: bool
    ) -> tuple[dict[str, int], tuple[str, ...]]:
        """The weights and the biases that write a module's output, or its input (`given`): without `u` in one of
        them, it changes along `u` alone, and without `u` in all of them, nothing of it is left along `u`."""
        names = [n for n in self.run.parameters if n.startswith(f"{block if given else module}.")]
        base = self._again(block, module, given=given)
        found: dict[str, int] = {}
        silent: list[tuple[str, int]] = []
        for name in names:
            parameter = self.run.parameters[name]
            for axis in range(parameter.ndim == 3, parameter.ndim):  # the first axis of a stack counts experts
                if parameter.ndim > 3 or parameter.shape[axis] != self.width:
                    continue
                with self._without(u, {name: axis}):
                    change = self._again(block, module, given=given) - base
                size = float(change.abs().max())
                if size < 1e-13:
                    silent.append((name, axis))  # an expert that no token chose
                elif float((change - (change @ u)[..., None] * u).abs().max()) < TOLERANCE * max(size, 1.0):
                    found.setdefault(name, axis)
        alike = {(pattern(n), axis) for n, axis in found.items()}
        found |= {n: axis for n, axis in silent if (pattern(n), axis) in alike}
        if not found:
            raise NotProved(f"{module}: adds to the residual stream, and none of its weights alone decides what")
        with self._without(u, found):
            left = float((self._again(block, module, given=given) @ u).abs().max())
        if not left < TOLERANCE * (1 + float(base.abs().max())):
            names = sorted({pattern(n) for n in found})
            raise NotProved(f"{module}: without a direction in {', '.join(names)} it still puts out {left:.1e} of it")
        matrices = {n: axis for n, axis in found.items() if self.run.parameters[n].ndim >= 2 and not n.endswith("bias")}
        return matrices, tuple(n for n in found if n not in matrices)

    def _again(self, block: str, module: str, *, given: bool = False) -> Tensor:
        """A module's output now, or its input (`given`), for the input of its block in the first run."""
        args, kwargs = self.run.calls[block]
        run = partial(self.model.get_submodule(block), *_copied(args), **_copied(kwargs))
        return self._seen_at(module, run, given=given)

    def _seen_at(self, module: str, run: Callable[[], Any], *, given: bool) -> Tensor:
        """A module's output in `run()`, or its input (`given`). The pass ends there."""
        out: list[Tensor] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            out.append(_given(args, kwargs).clone())
            raise _Enough

        def behind(_: nn.Module, args: Any, output: Any) -> None:
            put_out = _first(output)
            assert put_out is not None
            out.append(put_out.clone())
            raise _Enough

        place = self.model.get_submodule(module)
        handle = (
            place.register_forward_pre_hook(before, with_kwargs=True) if given else place.register_forward_hook(behind)
        )
        try:
            run()
        except _Enough:
            pass
        finally:
            handle.remove()
        return out[0]

    @contextmanager
    def _without(self, u: Float[Tensor, " d"], writers: Mapping[str, int]) -> Iterator[None]:
        """While inside, ablate `u` from these parameters (path -> axis), with the arithmetic of a bake."""
        before = {name: self.run.parameters[name].detach().clone() for name in writers}
        try:
            for name, axis in writers.items():
                _ablate(self.run.parameters[name], u, axis)
            yield
        finally:
            for name, value in before.items():
                self.run.parameters[name].copy_(value)

    def _gain(self, module: str) -> tuple[Tensor, float, bool] | None:
        """(gain, gain minus weight, whether the mean is subtracted) of a norm over the residual
        width; None for other modules."""
        norm: Any = self.model.get_submodule(module)
        parameters = dict(norm.named_parameters())
        if parameters.keys() - {"weight", "bias"} or any(p.shape != (self.width,) for p in parameters.values()):
            return None
        x = torch.randn(3, self.width, generator=torch.Generator().manual_seed(7)) * 100  # epsilon matters less
        try:
            y = norm(x)
        except Exception:  # a module that is no norm, called with an argument that it does not expect
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        weight, bias = parameters.get("weight"), parameters.get("bias", 0.0)
        for centred in (False, True):
            z = x - x.mean(-1, keepdim=True) if centred else x
            z = z / z.square().mean(-1, keepdim=True).sqrt()
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                gain = torch.ones(self.width) if weight is None else weight + offset
                if float((z * gain + bias - y).abs().max()) < 1e-6 * float(y.abs().max()):
                    return gain, offset, centred
        return None

    def _one_offset(self, norm: str, offset: float) -> None:
        if self.offset not in (None, offset):
            raise NotProved(
                f"{norm}: its gain is its weight plus {offset:g}, that of another norm plus {self.offset:g}"
            )
        self.offset = offset

    def _embeddings(self) -> tuple[list[str], str | None]:
        """(paths of the modules whose rows begin the residual stream, the module that puts out their sum)."""

        def begun() -> Tensor:
            run = partial(self.model, input_ids=self.ids, use_cache=False)
            return self._seen_at(self.blocks[0], run, given=True)

        base, found = begun(), []
        for name, parameter in self.run.parameters.items():
            if name.startswith(tuple(f"{b}." for b in self.blocks)) or parameter.ndim != 2:
                continue
            if parameter.shape[1] != self.width or not name.endswith(".weight"):
                continue
            with self._without(self.r, {name: 1}):
                change = begun() - base
            outside = change - (change @ self.r)[..., None] * self.r
            if float(change.abs().max()) > 1e-13 and float(outside.abs().max()) < TOLERANCE:
                found.append(name)
        with self._without(self.r, dict.fromkeys(found, 1)):
            left = float((begun() @ self.r).abs().max())
        if not found or not left < TOLERANCE * (1 + float(base.abs().max())):
            names = ", ".join(found) or "any embedding"
            raise NotProved(f"{self.blocks[0]}: without a direction in {names} it is still given {left:.1e} of it")
        first = self.model.get_input_embeddings()
        modules = sorted(
            (n.removesuffix(".weight") for n in found), key=lambda n: self.model.get_submodule(n) is not first
        )
        begins = self.given[0]
        for name in self.run.order:
            if self.run.out[name].shape == begins.shape and not name.startswith(tuple(self.blocks)):
                factors, error = _solved(begins, [self.run.out[name]])
                if error < TOLERANCE and factors[0]:
                    return modules, name
        return modules, None

    def _head(self) -> tuple[str, bool, str, float, float | None]:
        """(final norm, whether it subtracts the mean, LM head, scale of the logits, bound on the logits)."""
        run, head = self.run, next(n for n, m in self.model.named_modules() if m is self.head)
        if head not in run.given:
            raise NotProved(f"LM head: {head} does not put out the logits")
        given, last = run.given[head], self.out[-1]
        for norm in run.order:
            out = run.out[norm]
            given_here = run.given.get(norm)
            if norm.startswith(tuple(self.blocks)) or given_here is None or not _equal(given_here, last):
                continue
            if out.shape != last.shape or (gain := self._gain(norm)) is None:
                continue
            _, offset, centred = gain
            _, error = _solved(given, [out])
            if error < TOLERANCE:
                if any(True for _ in self.model.get_submodule(norm).parameters()):
                    self._one_offset(norm, offset)
                plain = self.model.get_submodule(head)(out)
                return norm, centred, head, *self._bound(plain)
        raise NotProved(f"{head}: its input is no norm of the last residual stream")

    def _bound(self, plain: Tensor) -> tuple[float, float | None]:
        """(scale, bound) that make the model's logits of the plain ones. Both have to stand in the config, as a size of
        the tiny model might decide them otherwise."""
        logits = self.run.logits
        values = {float(v) for v in self.model.config.get_text_config().to_dict().values()
                  if isinstance(v, int | float) and not isinstance(v, bool) and v and abs(v) < 1e6}  # fmt: skip
        scales = sorted({1.0, *values, *(1 / v for v in values)}, key=lambda v: v != 1.0)
        for scale in scales:
            if _equal(plain * scale, logits):
                return scale, None
        for cap in values:
            for scale in (1.0, *(scales if float(logits.abs().max()) <= cap else ())):
                if _equal(cap * torch.tanh(plain * scale / cap), logits):
                    return scale, cap
        raise NotProved("LM head: the logits are not its output, times a number of the config or bounded by one")

    def _decoder(self, norm: str, embeddings: Sequence[str]) -> str:
        """Prefix of the innermost module that holds blocks, embeddings and the final norm, and maps token ids to
        the input of the LM head."""
        parts = self.blocks[0].split(".")[:-2]
        for count in range(len(parts), 0, -1):
            path = ".".join(parts[:count])
            if not all(name.startswith(f"{path}.") for name in (norm, *embeddings)):
                continue
            out = self.model.get_submodule(path)(input_ids=self.ids, use_cache=False)
            if _equal(getattr(out, "last_hidden_state", torch.zeros(0)), self.run.out[norm]):
                return f"{path}."
        raise NotProved("decoder: expected a module that maps token ids to the final norm's output, found none")

    def _hooks_and_weights(
        self, sources: Sequence[Sequence[_Source]], embeddings: Sequence[str], output: str | None, tied: bool
    ) -> None:
        """Ablate a direction by hooks at the modules and in the weights: the logits have to be equal, and no residual
        stream may hold anything of the direction."""
        writers = dict.fromkeys((f"{e}.weight" for e in embeddings), (1, self.r))
        hooked: dict[str, tuple[Tensor, bool]] = dict.fromkeys([output] if output else embeddings, (self.r, False))
        for source in itertools.chain(*sources):
            hooked[source.module] = source.u, source.given
            writers |= {n: (axis, source.u) for n, axis in source.weights.items()}
            writers |= {n: (self.run.parameters[n].ndim - 1, source.u) for n in source.biases}
        handles = [self.model.get_submodule(n).register_forward_hook(_projecting(*how)) for n, how in hooked.items()]
        try:
            by_hooks = _Run(self.model, self.ids)
        finally:
            for handle in handles:
                handle.remove()
        if tied:
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())
        for name, (axis, u) in writers.items():
            _ablate(self.run.parameters[name], u, axis)
        baked = _Run(self.model, self.ids)
        left = max(float((baked.out[b] @ self.r).abs().max()) for b in self.blocks)
        off = float((baked.logits - by_hooks.logits).abs().max())
        size = float(baked.logits.abs().max())
        if not left < TOLERANCE * (1 + max(float(o.abs().max()) for o in self.out)):
            raise NotProved(f"after an ablation from every writer, {left:.1e} of the direction is left")
        if not off < TOLERANCE * (1 + size):
            raise NotProved(
                f"an ablation by hooks and in the weights give logits that differ by {off:.1e} of {size:.1e}"
            )
        if _equal(self.run.logits, baked.logits):
            raise NotProved("an ablation changes no logits")

    def _constant_passes(self, sources: Sequence[Sequence[_Source]]) -> bool:
        """Whether every block has an MLP whose biases add a constant to the residual stream."""
        for block, found in zip(self.blocks, sources, strict=True):
            mlps = [s for s in found if s.kind == "mlp"]
            if len(mlps) != 1 or mlps[0].norms or mlps[0].scale != 1.0 or not mlps[0].biases:
                return False
            before = self._again(block, mlps[0].module)
            biases = [self.run.parameters[n] for n in mlps[0].biases]
            for bias in biases:
                bias.add_(1.0)
            change = self._again(block, mlps[0].module) - before
            for bias in biases:
                bias.sub_(1.0)
            if float((change - 1.0).abs().max()) > TOLERANCE or len(biases) != len(mlps[0].weights):
                return False
        return True

    def _kind(self, module: str) -> BlockKind:
        below = module.split(".")[self.blocks[0].count(".") + 1 :]
        for name in below:
            if _MIXER.search(name) or _MLP.search(name):
                return "attention" if _MIXER.search(name) else "mlp"
        outer = self.model.get_submodule(module.removesuffix("".join(f".{n}" for n in below[1:])))
        is_mlp = re.search(r"(mlp|moe|feedforward|experts)(block|layer)?$", type(outer).__name__, re.IGNORECASE)
        return "mlp" if is_mlp else "attention"

    def _softcap_or_sinks(self) -> bool:
        text = self.model.config.get_text_config()
        return bool(getattr(text, "attn_logit_softcapping", None)) or any("sinks" in n for n in self.run.parameters)

    def _stored(self) -> dict[str, Tensor]:
        """The tensors of the model's files, by their names there. A tied head gets a separate tensor."""
        head, config = self.head, self.model.config
        tied, ties = head.weight, [(c, c.tie_word_embeddings) for c in (config, config.get_text_config())
                                   if hasattr(c, "tie_word_embeddings")]  # fmt: skip
        head.weight = nn.Parameter(torch.randn(tied.shape, generator=torch.Generator().manual_seed(6)))
        for part, _ in ties:
            part.tie_word_embeddings = False
        try:
            self.head_alone = head.weight
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                out: dict[str, Tensor] = {}
                for path in Path(folder).glob("*.safetensors"):
                    with safe_open(path, "pt") as file:
                        out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return out
        finally:
            head.weight = tied
            for part, tie in ties:
                part.tie_word_embeddings = tie

    def _addend(
        self,
        block: str,
        number: int,
        source: _Source,
        path: str,
        stored: Mapping[str, Tensor],
        prefixes: dict[str, None],
    ) -> Addend:
        """Return a source's entry in a layout: its names below the block, live and on disk."""
        groups: dict[str, list[str]] = {}  # for experts that are separate modules: all of them
        for name in source.weights:
            groups.setdefault(pattern(name), []).append(name)
        biases, live, files = list(source.biases), [], []
        for names in groups.values():
            first, axis = names[0], source.weights[names[0]]
            parameter, bias = self.run.parameters[first], _bias_of(first, biases)
            stacked = parameter.ndim == 3
            if bias and len(names) > 1:
                raise NotProved(f"{bias}: a bias of one expert of many")
            places = [_on_disk(self.run.parameters[name], stored) for name in names[:2]]
            if stacked and places[0] is None:
                places = [_on_disk(expert, stored) for expert in parameter[:2]]
                stacked = False
            stored_as = [place for place in places if place is not None]
            if len(stored_as) != len(places):
                raise NotProved(f"{first}: is stored in another way than it is used")
            split = [place for file, _ in stored_as if (place := _split(file, number, path))]
            if len(split) != len(stored_as):
                raise NotProved(f"{first}: is stored as {stored_as[0][0]}, expected {path.format(number)} in it")
            prefixes[split[0][0]] = None
            on_disk = axis - (parameter.ndim == 3 and not stacked)
            if stored_as[0][1]:  # swapped: 0 and 1 of a matrix, 1 and 2 of a stack
                on_disk = (3 if stacked else 1) - on_disk
            live_name = _numbered([name.removeprefix(f"{block}.") for name in names[:2]])
            module = self.model.get_submodule(first.rpartition(".")[0])
            known = parameter.ndim < 3 or axis == 1 or bool(getattr(module, "is_transposed", False))
            live_bias = bias and bias.removeprefix(f"{block}.")
            live.append(Part(live_name, axis, live_bias, parameter.ndim == 3, known))
            disk_bias = _on_disk(self.run.parameters[bias], stored) if bias else None
            bias_rest = _split(disk_bias[0], number, path) if disk_bias else None
            name = _numbered([rest for _, rest in split])
            renamed = None if name == live_name else live_name
            files.append(Part(name, on_disk, bias_rest and bias_rest[1], stacked, known, renamed))
        if biases:
            raise NotProved(f"{biases[0]}: a bias that belongs to no weight")
        # What differs comes first: by it a checkpoint's form is recognised.
        order = sorted(range(len(live)), key=lambda n: files[n] == live[n])
        forms = dict.fromkeys((tuple(files[n] for n in order), tuple(live[n] for n in order)))
        norms, stored_norms = [], []
        for norm in source.norms:
            norms.append(norm.removeprefix(f"{block}."))
            place = _on_disk(self.run.parameters[f"{norm}.weight"], stored)
            name = place[0].partition(f"{path.format(number)}.")[2].removesuffix(".weight") if place else norms[-1]
            stored_norms.append(name)
        renamed = tuple(stored_norms) if stored_norms != norms else ()
        module = source.module.removeprefix(f"{block}.")
        return Addend(source.kind, module, tuple(forms), tuple(norms), renamed, source.scale, source.given)


def _of_config(config: PreTrainedConfig, model_class: type[PreTrainedModel], proved: _Proved) -> Structure:
    """The structure of a config, whose blocks are recognised by their parameters. No weights are allocated."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as e:  # a class may check its config in any way
        raise NotProved(f"transformers cannot build this config: {type(e).__name__}: {one_line(e)}") from e
    layout, first = proved.layout, proved.layout.block.format(0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    path = layout.base + first.removesuffix(".0")
    count = len(model.get_submodule(path))  # type: ignore[arg-type]
    kinds = []
    for block in range(count):
        found = _signature(model, f"{path}.{block}")
        if found not in proved.signatures:
            nearest = min((found ^ known for known in proved.signatures), key=len)
            raise NotProved(
                f"block {block}: no block of the tiny model has these parameters: {', '.join(sorted(nearest)[:3])}"
            )
        kinds.append(proved.signatures.index(found))
    values = {float(v) for v in config.get_text_config().to_dict().values() if isinstance(v, int | float)}
    for number in (proved.logit_scale, proved.logit_softcap):
        if number not in (None, 1.0) and number not in values and 1 / number not in values:
            raise NotProved(f"LM head: the logits are scaled by {number:.4g}, which is no number of the config")
    experts = set()
    for block, kind in enumerate(kinds):
        for part in (part for addend in layout.blocks[kind] for part in addend.forms[-1]):
            name = f"{path}.{block}.{part.weight}"
            if part.stacked:
                experts.add(len(parameters[name]))
            elif "{}" in name:
                experts.add(sum(pattern(n) == pattern(name) and n.startswith(f"{path}.{block}.") for n in parameters))
    if len(experts) > 1:
        raise NotProved(f"experts: expected one number of them in all blocks, found {sorted(experts)}")
    embedding, head = (parameters[f"{m}.weight"] for m in (layout.base + layout.embeddings[0], layout.head_module))
    return Structure(
        model_class.__name__,
        layout,
        blocks=count,
        kinds=tuple(kinds) if len(layout.blocks) > 1 else (),
        width=embedding.shape[1],
        vocab=head.shape[0],
        experts=max(experts, default=0),
        biased=layout.mlp_bias == "always",
        tied=proved.tied,
        logit_softcap=proved.logit_softcap,
        logit_scale=proved.logit_scale,
    )


class _Enough(Exception):
    """Ends a forward pass after the last module that is needed."""


class _Run:
    """One forward pass: what every module was given and put out, at its first call."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.order: list[str] = []
        """Modules that put out a tensor, in the order in which they ended."""
        self.given: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[Any, Any]] = {}
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._behind(name)))
        try:
            self.logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.calls:
                self.calls[name] = _copied(args), _copied(kwargs)  # a block may change its input in place
                if (given := _given(*self.calls[name])) is not None:
                    self.given[name] = given

        return hook

    def _behind(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if name not in self.out and (out := _first(output)) is not None:
                self.out[name] = out.clone()
                self.order.append(name)

        return hook


def _given(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The tensor that a module is given: its first argument, or the one named so."""
    return _first(args) if args else kwargs.get("hidden_states", _first(tuple(kwargs.values())))


def _first(value: Any) -> Tensor | None:
    """A tensor of numbers, or the first in a tuple."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, tuple | list):
        return next((x for x in map(_first, value) if x is not None), None)
    return getattr(value, "last_hidden_state", None)


def _copied(value: Any) -> Any:
    """Arguments with copies of their tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if (isinstance(value, tuple) and type(value) is tuple) or isinstance(value, list):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * (1 + float(b.abs().max()))


def _solved(target: Tensor, columns: Sequence[Tensor]) -> tuple[list[float], float]:
    """(factors of the columns whose sum is nearest to the target, the largest error as a share of the target)."""
    matrix = torch.stack([c.flatten() for c in columns], dim=1)
    factors = torch.linalg.lstsq(matrix, target.reshape(-1, 1)).solution[:, 0]
    error = float((matrix @ factors - target.flatten()).abs().max())
    return factors.tolist(), error / (1 + float(target.abs().max()))


def _ablate(parameter: Tensor, u: Float[Tensor, " d"], axis: int) -> None:
    """Remove `u` from a weight, or from a bias of one row or many, in place."""
    if parameter.ndim == 1:
        parameter.sub_(u * (parameter @ u))
    else:
        ablate(parameter, u[:, None], axis, 1.0)


def _projecting(u: Float[Tensor, " d"], given: bool) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that removes `u` from a module's output, or from its input (`given`)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _first(args if given else output)
        assert x is not None
        out = x - (x @ u)[..., None] * u
        if given:
            return module.forward(out, *args[1:])
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook


def _signature(model: nn.Module, block: str) -> frozenset[str]:
    """The parameters of a block with their ranks, by which blocks of one kind are alike."""
    module = model.get_submodule(block)
    return frozenset(f"{pattern(n)} of rank {p.ndim}" for n, p in module.named_parameters(remove_duplicate=False))


def _bias_of(weight: str, biases: list[str]) -> str | None:
    """The bias beside a weight, taken from the list; None without one."""
    stem = weight.removesuffix("weight")
    names = [f"{stem}bias"] if weight.endswith(".weight") else [f"{weight}_bias"]
    found = next((b for b in biases if b in names), None)
    if found is not None:
        biases.remove(found)
    return found


def _on_disk(parameter: Tensor, stored: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """(name in the files, whether its last two axes are swapped there) of a parameter; None if it is not there."""
    for name, tensor in stored.items():
        if tensor.shape == parameter.shape and torch.equal(tensor, parameter):
            return name, False
        swapped = parameter.mT if parameter.ndim > 1 else parameter
        if tensor.shape == swapped.shape and torch.equal(tensor, swapped):
            return name, True
    return None


def _split(name: str, number: int, path: str) -> tuple[str, str] | None:
    """(prefix of the decoder, name below the block) of a tensor of a block on disk; None if it is stored elsewhere."""
    found = re.fullmatch(rf"((?:.*\.)?){re.escape(path.format(number))}\.(.+)", name)
    return (found[1], found[2]) if found else None


def _numbered(names: Sequence[str]) -> str:
    """One name for all experts, of the names of two: `{}` stands for the number in which they differ."""
    if len(names) == 1:
        return names[0]
    pairs = zip(names[0].split("."), names[1].split("."), strict=True)
    return ".".join(a if a == b else "{}" for a, b in pairs)

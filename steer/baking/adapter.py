"""Bakes an edit as a LoRA adapter: which tensors it needs, their factors, and writing it.

`AdapterPlan.of` checks the edit against the source and lists the parts of the adapter; `bake_adapter` computes the
factors of each part, writes adapter_model.safetensors and adapter_config.json, and certifies them. `adapter_check`
verifies the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from steer.baking.card import card_header
from steer.baking.certificate import ADAPTER, Certificate
from steer.baking.forms import bakeable, check_bakeable
from steer.baking.journal import Journal
from steer.baking.outputs import finish, hub_name, save_directions, save_means, source_name, versions
from steer.baking.plan import head_is_embedding, unloaded_line
from steer.baking.proofs import BiasProof, WriterProof
from steer.checkpoint.ablation import Ablation, as_tensor, norm, shadow
from steer.checkpoint.anatomy import Anatomy, Writer, WriterMap
from steer.checkpoint.quantised import dequantised
from steer.checkpoint.reader import INDEX, CheckpointFiles, Shard, TensorInfo
from steer.checkpoint.staging import hash_file, staged, write_bytes, write_json
from steer.core.edit import Edit
from steer.core.method import Kind
from steer.errors import CheckpointError, UnsupportedError
from steer.files import sync

CONFIG = "adapter_config.json"
_PARTS = ".factors-"
"""Prefix of the temporary files that hold finished parts until all are finished."""
_GROUP = 1 << 30
"""Bytes of weights to read for each of these files, at least."""


@dataclass(frozen=True)
class AdapterPlan:
    """The contents of an adapter, checked against the source before anything is written."""

    files: CheckpointFiles
    anatomy: Anatomy
    edit: Edit
    """The edit, with features that add converted to directions."""
    found: WriterMap
    ablation: Ablation
    parts: tuple[Part, ...]
    biases: bool
    """Whether the adapter changes the bias of every Linear that it changes."""
    untie_to_merge: bool
    """Whether it changes an embedding that is the LM head too. As an adapter it leaves the head unchanged; merged into
    the shared tensor, it would change the head as well."""

    @classmethod
    def of(cls, source: Path, edit: Edit) -> AdapterPlan:
        """Plan the adapter for the checkpoint in `source`. Errors: as `bake_adapter`."""
        files = dequantised(CheckpointFiles.open(source))
        anatomy = Anatomy.of(files.config, str(source))
        anatomy.check_edit(edit)
        check_bakeable(bakeable(edit.as_moves(), "adapter", anatomy), str(source))
        edit = edit.with_adds_as_directions()
        found = anatomy.find(files.config, files.tensors)
        ablation = Ablation.of(edit, anatomy, files)
        parts = find_parts(files.tensors, anatomy, found, ablation)
        biases = any(p.kind == "linear" and p.bias for p in parts)
        untie = any(p.kind == "embedding" for p in parts) and head_is_embedding(files, anatomy, found)
        return cls(files, anatomy, edit, found, ablation, parts, biases, untie)

    def summary(self) -> str:
        """A description for people before anything is written: the writers found, how the adapter changes them, and
        coverage."""
        a, edited = self.anatomy, [w for p in self.parts for w in p.writers if self.ablation.strength(w) > 0]
        lines = [f"{self.files.root}: {a.architecture}, {a.blocks} blocks, residual width {a.width}"]
        for kind in get_args(Kind):
            writers = [w for w in self.found.writers if w.kind == kind]
            names = list(dict.fromkeys(p.kind for p in self.parts for w in p.writers if w.kind == kind))
            lines.append(f"  {kind}: {len({w.tensor for w in edited if w.kind == kind})} of {len(writers)} changed"
                         f"{', as ' + ', '.join(names) if names else ''}")  # fmt: skip
        ranks = ", ".join(map(str, sorted({p.rank for p in self.parts})))
        lines.append(f"  adapter: {len(self.parts)} targets, rank {ranks}{', with biases' if self.biases else ''}")
        lines.append(f"  coverage: {len({w.tensor for w in edited})} of {len(self.found.writers)} writers changed")
        lines += [f"  add after block {p.site}: {p.path}" for p in self.parts if p.site is not None]
        if others := self.found.unloaded:
            lines.append(unloaded_line(others))
        return "\n".join(lines)


def bake_adapter(
    source: Path,
    out: Path,
    edit: Edit,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write `edit` as an adapter for `source` to the directory `out`, and return the certificate of what was measured.

    `out` is complete or absent. `progress` is called with (bytes of weights read, bytes in total). `command` is the
    command line that the certificate and the card show.

    Errors: as `steer.baking.bake.bake`; UnsupportedError that names the part of the edit that an adapter cannot hold.
    """
    source, out = Path(source), Path(out)
    plan = AdapterPlan.of(source, edit)
    with staged(out, resume=True) as work:
        return _write(plan, work, command, progress)


def _write(
    plan: AdapterPlan, work: Path, command: str | None, progress: Callable[[int, int], None] | None
) -> Certificate:
    """Compute and write everything of the adapter into the staging directory `work`."""
    files, header = plan.files, card_header(plan.files.root / "README.md")
    journal = Journal.of(work, files, plan.edit, "adapter")
    tensors, proofs = _factors(plan, work, journal)
    sources = hash_sources(files, progress, journal)
    digest = write_bytes(work / ADAPTER, save(tensors, metadata={"format": "pt"}))
    for path in work.glob(f"{_PARTS}*"):
        path.unlink()
    base = hub_name(files.root) or str(files.root.resolve())
    config = adapter_config(base, plan.anatomy, plan.parts, plan.biases)
    written = {ADAPTER: digest, CONFIG: write_json(work / CONFIG, config)}
    directions = save_directions(plan.edit, work, written)
    order = {name: i for i, w in enumerate(plan.found.writers) for name in (w.tensor, w.bias)}
    cert = Certificate(
        source=source_name(files.root),
        architecture=plan.anatomy.architecture,
        edit=plan.edit.describe(),
        strength=min((w.strength for w in proofs.writers), default=plan.edit.strength),
        neutral=save_means(plan.edit, work, written),
        writers_found=len(plan.found.writers),
        writers=tuple(sorted(proofs.writers, key=lambda w: order[w.tensor])),
        biases=tuple(proofs.biases),
        directions=directions,
        config={},
        tensors={t.name: [t.file, t.dtype, list(t.shape)] for t in Shard.open(work / ADAPTER).tensors},
        source_files=sources,
        files=written,
        left_out=(),
        versions=versions(),
        command=command,
        form="adapter",
        unloaded=plan.found.unloaded,
        untie_to_merge=plan.untie_to_merge,
    )
    cert = finish(cert, work, header, written)
    journal.close()
    return cert


def _factors(plan: AdapterPlan, work: Path, journal: Journal) -> tuple[dict[str, Tensor], Proofs]:
    """All tensors of the adapter and their proofs. Tensors that a killed bake finished are read from its files."""
    tensors, proofs = {}, Proofs()
    for number, parts in enumerate(_groups(plan)):
        name = f"{_PARTS}{number}.safetensors"
        if finished := journal.finished.get(name):
            tensors |= load_file(work / name)
            proven = Proofs(
                [WriterProof(**w) for w in finished["writers"]], [BiasProof(**b) for b in finished["biases"]]
            )
        else:
            proven = Proofs()
            computed = dict(adapter_tensors(plan, parts, proven))
            digest = write_bytes(work / name, save(computed))
            sync(work / name)
            journal.record(name, written=digest, read="", **asdict(proven))
            tensors |= computed
        proofs.writers += proven.writers
        proofs.biases += proven.biases
    return tensors, proofs


def _groups(plan: AdapterPlan) -> Iterator[list[Part]]:
    """The parts in groups, each large enough to be worth syncing a file to the disk."""
    group, size = [], 0
    for part in plan.parts:
        group.append(part)
        size += sum(plan.files.tensors[w.tensor].nbytes for w in part.writers)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def hash_sources(
    files: CheckpointFiles, progress: Callable[[int, int], None] | None = None, journal: Journal | None = None
) -> dict[str, str]:
    """sha256 of the source's weights, index and config. Hashes that the journal knows are not computed again.

    Errors: CheckpointError for a shard that changed since its header was read.
    """
    done, total = 0, sum(s.size for s in files.shards)
    out = {}
    for shard in files.shards:
        noted = None if journal is None else journal.facts.get(shard.name)
        out[shard.name] = noted["read"] if noted else hash_file(shard.path)
        stat = shard.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(f"{shard.path}: changed while it was read; wait until it is finished, run again")
        if journal is not None and not noted:
            journal.note(shard.name, read=out[shard.name])
        done += shard.size
        if progress:
            progress(done, total)
    names = ["config.json", *([INDEX] if files.index is not None else [])]
    return out | {name: hash_file(files.root / name) for name in names}


PREFIX = "base_model.model."
"""Prefix of the names of an adapter's tensors."""
PartKind = Literal["linear", "parameter", "embedding", "experts", "expert biases"]
"""`parameter` is a Linear whose weight is named instead of the module: peft takes the name of a Linear beside experts
for the name of the experts."""


CONFIG_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "lora_dropout", "bias", "lora_bias", "fan_in_fan_out", "target_modules", "target_parameters"),
}
"""All keys of adapter_config.json. With another key, such as `use_rslora`, peft would compute something else."""


@dataclass(frozen=True)
class Part:
    """One module or parameter that the adapter changes."""

    kind: PartKind
    path: str
    """Path of the live module or parameter."""
    key: str
    """Prefix of the names of its tensors in the adapter."""
    writers: tuple[Writer, ...]
    """The writers on disk that it corresponds to: one, or one for each expert."""
    rank: int
    """Number of directions removed. 1 for a part that only adds, because that is peft's lowest rank."""
    site: int | None = None
    """Site of the add that it carries; None without one."""
    bias: bool = False
    """Whether it changes the bias of a Linear."""


def find_parts(
    tensors: Mapping[str, TensorInfo], anatomy: Anatomy, found: WriterMap, ablation: Ablation
) -> tuple[Part, ...]:
    """The parts of an adapter, in the order of the writers.

    Errors: UnsupportedError for an edit that no adapter can hold.
    """
    edit = ablation.edit
    if edit.ablate and edit.method.norm_preserving:
        raise _refusal(anatomy, "keeping the norms scales every column of a weight, which has no low rank")
    shifts, parts = set(edit.biases()), dict[tuple[str, PartKind], Part]()
    for writer in found.writers:
        site = writer.block if writer.kind == "mlp" and writer.block in shifts else None
        rank = ablation.subspace(writer).shape[1] if ablation.strength(writer) > 0 else 0
        if not rank and site is None:
            continue
        for part in _parts(tensors, anatomy, found, writer, rank, site):
            earlier = parts.get((part.path, part.kind))
            parts[part.path, part.kind] = replace(part, writers=(*earlier.writers, writer)) if earlier else part
    with_bias = next((p for p in parts.values() if p.bias), None)
    not_linear = next((p for p in parts.values() if p.kind != "linear"), None)
    if with_bias is not None and not_linear is not None:
        what, do = f"{not_linear.kind} {not_linear.path}", ""
        if all(p.kind in ("linear", "embedding") for p in parts.values()):
            do = f"leave the embedding out with blocks 0-{anatomy.blocks - 1}, or "
        raise _refusal(anatomy, f"peft changes the bias of {with_bias.path} in no adapter that changes the {what}", do)
    return tuple(parts.values())


def adapter_config(base: str, anatomy: Anatomy, parts: Sequence[Part], biases: bool) -> dict[str, Any]:
    """Contents of adapter_config.json. `base` is the hub name or directory of the base model."""
    (rank, _), *_ = Counter(p.rank for p in parts).most_common(1)
    ranks = {p.path: p.rank for p in parts if p.rank != rank}
    parameters = [p.path for p in parts if p.kind not in ("linear", "embedding")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1, because B contains the strength
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biases,
        "fan_in_fan_out": anatomy.layout.attention.axis == 1,
        "target_modules": [p.path for p in parts if p.kind in ("linear", "embedding")],
        "target_parameters": parameters or None,
    }


def _parts(
    tensors: Mapping[str, TensorInfo], anatomy: Anatomy, found: WriterMap, writer: Writer, rank: int, site: int | None
) -> list[Part]:
    """The parts of the adapter that one writer needs. `rank`: directions to remove; `site`: where it carries an add."""
    path = anatomy.layout.base + writer.tensor.removeprefix(found.base)
    biased = writer.bias in tensors
    if parameter := _stack(anatomy, found, writer, path):
        module = parameter.rpartition(".")[0]
        out = []
        if biased and (rank or site is not None):
            path = f"{module}.{str(writer.bias).rpartition('.')[2]}"
            count = rank + (site is not None)
            out.append(Part("expert biases", path, PREFIX + module, (writer,), count, site))
        # With two changed parameters in one module, peft wraps the first in the second.
        key = f"{PREFIX}{module}.base_layer" if biased and rank else PREFIX + module
        return [Part("experts", parameter, key, (writer,), rank), *out] if rank else out
    path = path.removesuffix(".weight")
    if writer.kind == "embedding":
        return [Part("embedding", path, PREFIX + path, (writer,), rank)]
    if writer.kind == "mlp" and anatomy.layout.experts_keys:
        return [Part("parameter", f"{path}.weight", PREFIX + path, (writer,), rank)]
    bias = site is not None or (biased and rank > 0)
    return [Part("linear", path, PREFIX + path, (writer,), max(rank, 1), site, bias)]


def _stack(anatomy: Anatomy, found: WriterMap, writer: Writer, path: str) -> str | None:
    """Path of the live parameter that holds all experts, for a writer that is one expert or all of them; None for other
    writers."""
    if writer.stacked:
        return path
    layout = anatomy.layout
    if writer.block is None or not layout.experts_keys:
        return None
    block = layout.block.format(writer.block)
    below = writer.tensor.removeprefix(f"{found.base}{block}.")
    parts = [part for form in layout.mlp for part in form]
    one_each = [re.escape(p.weight).replace(r"\{\}", r"\d+") for p in parts if "{}" in p.weight]
    if not any(re.fullmatch(pattern, below) for pattern in one_each):
        return None
    return f"{anatomy.block_module(writer.block)}.{next(p.weight for p in parts if p.stacked)}"


def _refusal(anatomy: Anatomy, why: str, do: str = "") -> UnsupportedError:
    return UnsupportedError(f"{anatomy.where}: an adapter cannot hold this edit, as {why}; {do}bake a checkpoint")


@dataclass
class Proofs:
    """Measurements taken while an adapter's tensors are computed."""

    writers: list[WriterProof] = field(default_factory=list)
    biases: list[BiasProof] = field(default_factory=list)


def adapter_tensors(plan: AdapterPlan, parts: Sequence[Part], proofs: Proofs) -> Iterator[tuple[str, Tensor]]:
    """Compute the tensors of these parts of the adapter as (name, tensor), and add the measurements to `proofs`. One
    part of the source is in memory at a time."""
    make = _Factory(plan, proofs)
    makers = {
        "linear": make.linear,
        "parameter": make.linear,
        "embedding": make.embedding,
        "experts": make.experts,
        "expert biases": make.expert_biases,
    }
    for part in parts:
        for name, tensor in makers[part.kind](part):
            yield name, tensor.contiguous().clone()  # tensors in one file must not share memory


class _Factory:
    """Computes the tensors of parts; A is `[rank, in]` and B `[out, rank]`, as in `W + B A`."""

    def __init__(self, plan: AdapterPlan, proofs: Proofs) -> None:
        self.plan, self.proofs = plan, proofs
        self.shifts = plan.edit.biases()

    def linear(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The factors of a Linear or a parameter, and the change of its bias if the adapter has biases."""
        (writer,) = part.writers
        weight, dtype = self._read(writer.tensor)
        width, other = weight.shape[writer.axis], weight.shape[1 - writer.axis]
        if self.plan.ablation.strength(writer) > 0:
            a, b = self._factors(writer, weight, writer.axis, dtype, f"{part.key}.lora_A.weight")
        else:  # only an add: peft has no rank 0, so the factors are zeros
            a, b = torch.zeros(1, other, dtype=dtype), torch.zeros(width, 1, dtype=dtype)
        yield f"{part.key}.lora_A.weight", a
        yield f"{part.key}.lora_B.weight", b
        if self.plan.biases:
            name = f"{part.key}.lora_B.bias"
            bias = self._bias_change(writer, part.site, width, dtype, name)
            if part.site is not None:
                self.proofs.biases.append(BiasProof(name, part.site, True, float(bias.double().norm())))
            yield name, bias

    def embedding(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The factors of an embedding."""
        (writer,) = part.writers
        weight, dtype = self._read(writer.tensor)
        a, b = self._factors(writer, weight, writer.axis, dtype, f"{part.key}.lora_embedding_A")
        yield f"{part.key}.lora_embedding_A", a
        yield f"{part.key}.lora_embedding_B", b

    def experts(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The factors of all experts of an MLP, in peft's layout for stacked parameters."""
        stacks = []
        for writer in part.writers:
            weight, dtype = self._read(writer.tensor)
            stack = weight if writer.stacked else weight[None]
            axis = writer.axis - 1 if writer.stacked else writer.axis
            stacks.append(self._factors(writer, stack, axis, dtype, f"{part.key}.lora_A.weight"))
        # The expert is the outer index in A's rows and the inner index in B's columns; B is the same for all experts.
        a, b = torch.cat([s[0] for s in stacks]), stacks[0][1]
        yield f"{part.key}.lora_A.weight", a.reshape(-1, a.shape[-1])
        yield f"{part.key}.lora_B.weight", b[:, :, None].expand(-1, -1, a.shape[0]).reshape(b.shape[0], -1)

    def expert_biases(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """The factors of a stack of experts' biases: the ablation, and a row for an add."""
        (writer,) = part.writers
        assert writer.bias is not None
        bias, dtype = self._read(writer.bias)
        a, b = torch.zeros(0, bias.shape[1], dtype=dtype), torch.zeros(bias.shape[0], 0, dtype=dtype)
        if self.plan.ablation.strength(writer) > 0:
            q, strength = self.plan.ablation.subspace(writer), self.plan.ablation.strength(writer)
            wide = bias.double()
            a, b = q.T.to(dtype), (-strength * wide @ q).to(dtype)
            remaining = (wide + b.double() @ a.double()) @ q
            key, before = f"{part.key}.lora_A.weight", float((wide @ q).norm())
            self._prove(writer, writer.bias, key, dtype, before, float(remaining.norm()), norm(bias))
        if part.site is not None:
            shift = self.shifts[part.site].to(dtype)
            a, b = torch.cat([a, shift[None]]), torch.cat([b, torch.ones(len(b), 1, dtype=dtype)], dim=1)
            name = f"{part.key}.lora_A.weight"
            self.proofs.biases.append(BiasProof(name, part.site, True, float(a.double().norm())))
        yield f"{part.key}.lora_A.weight", a
        yield f"{part.key}.lora_B.weight", b

    def _factors(
        self, writer: Writer, weight: Float[Tensor, "*experts out in"], axis: int, dtype: torch.dtype, key: str
    ) -> tuple[Float[Tensor, "*experts k in"], Float[Tensor, "d k"]]:
        """A for the weight, or for each weight of a stack, and B. Also measures and records what remains."""
        q, strength = self.plan.ablation.subspace(writer), self.plan.ablation.strength(writer)
        matrices = weight if weight.ndim == 3 else weight[None]
        casts = torch.stack([shadow(m, q, axis) for m in matrices]).double()
        a, b = casts.to(dtype), (-strength * q).to(dtype)
        remaining = casts + (q.T @ b.double()) @ a.double()
        before, after = float(casts.norm()), float(remaining.norm())
        size = max(norm(weight) ** 2 - (2 * strength - strength**2) * before**2, 0.0) ** 0.5
        self._prove(writer, writer.tensor, key, dtype, before, after, size)
        return (a if weight.ndim == 3 else a[0]), b

    def _bias_change(
        self, writer: Writer, site: int | None, width: int, dtype: torch.dtype, key: str
    ) -> Float[Tensor, " d"]:
        """The change of a Linear's bias: the ablation of the bias, and the vector that an add puts there."""
        change = torch.zeros(width, dtype=torch.float64)
        strength = self.plan.ablation.strength(writer)
        if writer.bias in self.plan.files.tensors and strength > 0:
            assert writer.bias is not None
            q, bias = self.plan.ablation.subspace(writer), self._read(writer.bias)[0].double()
            change -= strength * q @ (q.T @ bias)
            after = float((q.T @ (bias + change.to(dtype).double())).norm())
            self._prove(writer, writer.bias, key, dtype, float((q.T @ bias).norm()), after, norm(bias))
        return (change if site is None else change + self.shifts[site]).to(dtype)

    def _prove(
        self, writer: Writer, name: str, key: str, dtype: torch.dtype, before: float, after: float, size: float
    ) -> None:
        """Record what remains of the directions in a tensor; raise CheckpointError if that is too much."""
        bias, strength = name == writer.bias, self.plan.ablation.strength(writer)
        axis = len(self.plan.files.tensors[name].shape) - 1 if bias else writer.axis
        code = "F64" if dtype == torch.float64 else "F32"
        proof = WriterProof(name, writer.kind, writer.block, axis, bias, code, strength, before, after, size, key)
        if not proof.holds:  # also false for nan
            raise CheckpointError(
                f"{self.plan.files.root}: {name} puts {after:.3g} of {before:.3g} into the ablated directions under "
                "the adapter; expected finite weights, check the source"
            )
        self.proofs.writers.append(proof)

    def _read(self, name: str) -> tuple[Tensor, torch.dtype]:
        """A tensor, and the dtype of its LoRA factors: peft computes in fp32 if the weights are narrower."""
        info = self.plan.files.tensors[name]
        return as_tensor(self.plan.files.read(info), info.dtype, info.shape), (
            torch.float64 if info.dtype == "F64" else torch.float32
        )

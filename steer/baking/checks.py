"""The checks of `steer verify` that compute: what the files of each form hold, and what their source gives.

`verify` has already compared hashes and names. Each check raises CheckpointError at the first difference from the
certificate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.baking.adapter import CONFIG, CONFIG_KEYS, PREFIX, AdapterPlan, hash_sources
from steer.baking.certificate import (
    CONTROL_VECTOR,
    Certificate,
    Proofs,
    WriterProof,
    proved_structure,
    rounding,
    same_set,
)
from steer.baking.checkpoint import CheckpointPlan
from steer.baking.control_vector import read_control_vector
from steer.baking.llama_cpp import LlamaCppPlan, file_layout, lora_edits, lora_key, read_lora
from steer.baking.plan import Plan
from steer.checkpoint.gguf_file import ARCHITECTURES
from steer.checkpoint.layouts import Layout
from steer.checkpoint.projection import as_tensor, projection, read_tensor
from steer.checkpoint.reader import ADAPTER, CheckpointFiles, TensorInfo
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.method import Kernel, Kind, Method, Strengths
from steer.errors import CheckpointError

_SLACK = 1e-5  # relative difference between two orders of summing in fp32, with fp32 directions


def certified_edit(folder: Path, cert: Certificate) -> Edit:
    """The edit that a certificate describes, with the directions stored in the output."""
    loaded = [(Direction.load(folder / d.file), d.amount) for d in cert.directions]
    certified = [(d.name, d.site, _text(d.provenance)) for d in cert.directions]
    _check_claims(folder, {"directions": certified != [(d.name, d.site, _text(d.provenance)) for d, _ in loaded]})
    blocks, strengths = cert.edit.get("blocks"), cert.edit.get("strengths")
    kernels: dict[str, Any] = {k: Kernel(**v) if isinstance(v, dict) else v for k, v in (strengths or {}).items()}
    neutral = load_file(folder / cert.neutral)["neutral"] if cert.neutral else None
    edit = Edit(
        ablate=tuple(d for d, amount in loaded if amount is None),
        strength=cert.edit.get("strength") or 1.0,
        blocks=(blocks[0], blocks[1]) if isinstance(blocks, list) else None,
        add=tuple((d, amount) for d, amount in loaded if amount is not None),
        method=Method(**cert.edit.get("method", {}), neutral=neutral),
        strengths=None if strengths is None else Strengths(**kernels),
    )
    _check_claims(folder, {"edit": _text(edit.describe()) != _text(cert.edit)})
    return edit


def _text(value: Any) -> str:
    """A value as JSON, for comparing computed values with values from a file; nan equals nan in it, unlike in
    numbers."""
    return json.dumps(value, sort_keys=True)


def _check_claims(folder: Path, wrong: Mapping[str, bool]) -> None:
    """Raise CheckpointError for the first entry of a certificate that is wrong. `wrong`: entry -> whether it differs
    from the value computed from the edit and the files."""
    if key := next((key for key, is_wrong in wrong.items() if is_wrong), None):
        raise CheckpointError(
            f"{folder}: {key} of the certificate is not what its edit and these files give; bake again"
        )


def _check_source_files(folder: Path, cert: Certificate, source: CheckpointFiles) -> None:
    """Check that the output was made from the files of this source."""
    hashes = hash_sources(source)
    for name, sha in hashes.items():
        if cert.source_files.get(name) != sha:
            raise CheckpointError(
                f"{source.root / name}: is not the file that {folder} was made from; give that checkpoint with --source"
            )
    same_set(folder, "source's file", set(cert.source_files), set(hashes))


def check_checkpoint(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> str | None:
    """Measure what the writers of a baked checkpoint still put into the directions, and what its biases add. With a
    `source`, bake it again; returns what was compared with it."""
    # Planned again on the output, it names the tensors that must have a proof.
    plan = CheckpointPlan(folder, edit, edit_mtp=cert.edit_mtp)
    _check_checkpoint_claims(plan, cert)
    files, shifts = plan.files, plan.shifts
    writers = {name: w for w in plan.writers for name in (w.tensor, w.bias)}
    for proof in cert.writers:
        shift = shifts[plan.adds[proof.tensor]] if proof.tensor in plan.adds else None
        q = plan.ablation.subspace(writers[proof.tensor])
        after, size = projection(read_tensor(files, proof.tensor), q, proof.axis, bias=proof.bias, shift=shift)
        slack = rounding(proof.dtype) * size
        # If the strength leaves anything, the part measured before the edit follows from the part that is left.
        right = abs(size - proof.norm) <= 1e-3 * size and 0 <= proof.before < math.inf
        right = right and abs(after - (1 - proof.strength) * proof.before) <= slack + 1e-3 * after
        # Both numbers are computed from the same bytes; only the order of summation and the stored direction's rounding
        # differ.
        if not (abs(after - proof.after) <= 1e-3 * proof.after + 1e-6 * size and proof.holds and right):
            raise CheckpointError(
                f"{files.root}: {proof.tensor} puts {after:.3g} into the ablated directions, certified were "
                f"{proof.after:.3g} of {proof.before:.3g} at strength {proof.strength}; bake again"
            )
    for proof in cert.biases:
        bias = read_tensor(files, proof.tensor).double()
        right = abs(float(bias.norm()) - proof.norm) <= 1e-6 * proof.norm
        if proof.created:
            expected = torch.zeros_like(bias) if proof.site is None else shifts[proof.site]
            slack = rounding(files.tensors[proof.tensor].dtype) * float(expected.norm())
            right = right and float((bias - expected).norm()) <= slack
        if not right:
            raise CheckpointError(f"{files.root}: {proof.tensor} is not the bias certified; bake again")
    return None if source is None else _check_checkpoint_source(files, cert, edit, source)


def _check_checkpoint_claims(plan: CheckpointPlan, cert: Certificate) -> None:
    """Check all entries that the edit and the files determine: which tensors must have a proof, and what it must
    say."""
    tensors, anatomy = plan.files.tensors, plan.anatomy
    created = {b.tensor for b in cert.biases if b.created}
    proofs = set()
    for w in plan.writers:
        for name in {w.tensor, w.bias} & tensors.keys() - created:
            t, bias = tensors[name], name == w.bias
            axis = len(t.shape) - 1 if bias else w.axis
            proofs.add((name, w.kind, w.block, axis, bias, t.dtype, plan.ablation.strength(w)))
    claimed = {(p.tensor, p.kind, p.block, p.axis, p.bias, p.dtype, p.strength) for p in cert.writers}
    added = str(anatomy.layout.mlp_bias) in cert.config
    adds: dict[str, int | None] = {f"{m}.bias": None for m in anatomy.bias_carriers()} if added else {}
    adds |= plan.adds
    wrong = {
        "architecture": cert.architecture != anatomy.architecture,
        "structure": cert.structure is not None,
        "writers_found": cert.writers_found != len(plan.all_writers),
        "writers": claimed != proofs or len(cert.writers) != len(proofs),
        "strength": cert.strength != min((p[-1] for p in proofs), default=plan.edit.strength),
        "biases": {b.tensor: b.site for b in cert.biases} != adds
        or len(cert.biases) != len(adds)
        or any(b.created != added for b in cert.biases),
        "edit_mtp": type(cert.edit_mtp) is not bool or (cert.edit_mtp and not (plan.found.mtp and plan.edit.ablate)),
        "unloaded": cert.unloaded != plan.passed_through,
        "untie_to_merge": cert.untie_to_merge,
    }
    _check_claims(plan.files.root, wrong)


def _check_checkpoint_source(files: CheckpointFiles, cert: Certificate, edit: Edit, source: Path) -> str:
    """Bake the source again, one tensor in memory at a time, and compare the result with the files. Returns what was
    compared."""
    plan, proofs = CheckpointPlan(source, edit, edit_mtp=cert.edit_mtp), Proofs()
    _check_source_files(files.root, cert, plan.files)
    if cert.config != plan.files.decoded | plan.config or files.config != plan.files.config | plan.config:
        raise CheckpointError(f"{files.root / 'config.json'}: is not what {source} gives; bake again")
    new = {t.name: t for _, t in plan.new}
    same_set(files.root, "tensor", set(files.tensors), set(plan.files.tensors) | set(new))
    changes = plan.functions(plan.files.tensors.values(), proofs)
    for name, stored in files.tensors.items():
        data = plan.files.tensors[name] if name in plan.files.tensors else new[name].data
        expected = bytearray(plan.files.read(data) if isinstance(data, TensorInfo) else data)
        found = files.read(stored)
        if name in changes:
            changes[name](expected)
            rebaked, on_disk = (as_tensor(d, stored.dtype, stored.shape).double() for d in (expected, found))
            # Both are rounded once; sums differ between machines in their last bit.
            right = float((rebaked - on_disk).norm()) <= rounding(stored.dtype) * float(rebaked.norm())
        else:
            right = found == expected
        if not right:
            raise CheckpointError(f"{files.root}: {name} is not what {source} gives; bake again")
    claimed = {p.tensor: p.before for p in cert.writers}
    for proof in proofs.writers:
        if not abs(claimed[proof.tensor] - proof.before) <= 1e-3 * proof.before + 1e-6 * proof.norm:
            raise CheckpointError(f"{files.root}: {proof.tensor} put {proof.before:.3g} into the directions in the "
                                  f"source, certified were {claimed[proof.tensor]:.3g}; bake again")  # fmt: skip
    return f"all {len(files.tensors)} tensors come out of {source} again, whose files are those certified"


def check_llama_cpp(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> str | None:
    """Check that the files for llama.cpp hold what the directions beside them give: the control vector their sums, each
    LoRA an ablation. With a `source`, compute the LoRAs again; returns what was compared with it."""
    shifts = {f"direction.{site}": (site, shift) for site, shift in edit.biases().items() if shift.any()}
    sites, hint = read_control_vector(folder / CONTROL_VECTOR) if CONTROL_VECTOR in cert.files else ({}, None)
    vectors = {f"direction.{site}": vector for site, vector in sites.items()}
    loras = lora_edits(edit)
    same_set(folder, "file", {f for f in cert.files if f.endswith(".gguf")} - {CONTROL_VECTOR}, set(loras))
    model_type = cert.layout(folder).model_type
    raw = {file: read_lora(folder / file, ARCHITECTURES[model_type]) for file in loras}
    same_set(folder, "tensor", set(vectors), set(shifts))
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {
        name: (CONTROL_VECTOR, "F32", tuple(v.shape)) for name, v in vectors.items()
    }
    found |= {f"{file}:{name}": (file, "F32", tuple(t.shape)) for file, held in raw.items() for name, t in held.items()}
    cert.check_tensors(folder, found)
    for name, vector in vectors.items():
        shift = shifts[name][1]
        if not float((vector - shift).norm()) <= 1e-6 * float(shift.norm()):
            raise CheckpointError(
                f"{folder / CONTROL_VECTOR}: {name} is not what the directions beside it add up to; bake again"
            )
    norms = {name: float(v.double().norm()) for name, v in vectors.items()}
    blocks = 1 + max((w.block for w in cert.writers if w.block is not None), default=0)
    keys = [(str(w.key).partition(":")[0], w) for w in cert.writers]
    wrong = {
        "architecture": bool(vectors) and hint != model_type,
        "writers": any(f not in loras or w.key != lora_key(f, w.tensor, blocks) or w.bias for f, w in keys)
        or (not loras and bool(cert.writers_found or cert.unloaded))
        or cert.untie_to_merge,
        "strength": not loras and cert.strength != edit.strength,
        "config": cert.config != {},
        "edit_mtp": cert.edit_mtp,
        "biases": [(b.tensor, b.site, b.created) for b in cert.biases] != [(n, shifts[n][0], True) for n in vectors]
        or not all(abs(b.norm - norms[b.tensor]) <= 1e-6 * norms[b.tensor] for b in cert.biases),
    }
    _check_claims(folder, wrong)
    stored: dict[str, dict[str, Tensor]] = {}
    for file, part in loras.items():
        stored[file] = {f"{file}:{name}": t for name, t in file_layout(raw[file]).items()}
        of_file = replace(cert, writers=tuple(w for f, w in keys if f == file), biases=())
        _check_adapter_claims(folder, of_file, part, stored[file])
        _check_factors(folder, of_file, part, stored[file])
    return None if source is None else _check_llama_cpp_source(folder, cert, edit, stored, source)


def _check_llama_cpp_source(
    folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Mapping[str, Tensor]], source: Path
) -> str:
    """Compute the LoRAs from their source again and compare."""
    plan, proofs = LlamaCppPlan(source, edit), Proofs()
    _check_source_files(folder, cert, plan.files)
    for file, lora in plan.loras.items():
        again = {f"{file}:{name}": t for name, t in plan.factors(file, proofs).items()}
        same_set(folder, "tensor", set(stored[file]), set(again))
        for key in (key for key in again if key.endswith("lora_a")):
            off, size = _distance((key, _b_of(key)), lora.targets[0].rank, stored[file], again)
            if not off <= _SLACK * size:
                raise CheckpointError(f"{folder}: {key} is not what {source} gives; bake again")
    _check_against_source(folder, cert, plan, proofs)
    return f"all LoRAs come out of {source} again, whose files are those certified"


def _b_of(a: str) -> str:
    """Name of the factor B beside a factor A, in an adapter and in a LoRA for llama.cpp."""
    return re.sub(r"(lora(?:_embedding)?_)([Aa])", lambda m: m[1] + {"A": "B", "a": "b"}[m[2]], a)


def check_adapter(folder: Path, cert: Certificate, edit: Edit, source: Path | None) -> str:
    """Run all checks. `source` is the checkpoint the adapter was made from; by default its base model, if that is a
    directory on this machine. Returns what was compared with the source.

    Errors: CheckpointError at the first difference from the certificate, also if `source` is another checkpoint.
    """
    stored, config = load_file(folder / ADAPTER), json.loads((folder / CONFIG).read_bytes())
    _check_adapter_claims(folder, cert, edit, stored)
    _check_config(folder, cert, config, stored)
    _check_factors(folder, cert, edit, stored)
    _check_adds(folder, cert, edit, stored)
    base = config["base_model_name_or_path"]
    if source is None and not Path(base).is_dir():
        return f"{base} is not on this disk, so that it was not compared; give --source"
    return _check_adapter_source(folder, cert, edit, config, stored, source or Path(base))


def _check_adapter_claims(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check what the edit and the adapter determine without the source: which writers must have a proof and what it
    must say, and that no tensor changes anything without a proof.

    For a declared architecture the source's number of blocks is not known here, so missing proofs and tensors of its
    last blocks would not be noticed.
    """
    layout, structure = cert.layout(folder), cert.proved(folder)
    neutral, shifts = edit.method.neutral, edit.biases()
    known = [*(p.block for p in cert.writers if p.block is not None), *shifts, *(edit.blocks or ())]
    blocks = range(max(known, default=-1) + 1) if neutral is None else range(len(neutral))
    if structure is None:
        written: list[tuple[Kind, int]] = [(kind, block) for kind in ("attention", "mlp") for block in blocks]
    else:
        written = [(a.kind, block) for block in range(structure.blocks) for a in structure.addends(block)]
    places = [(kind, block) for kind, block in written if edit.strength_at(block, kind) > 0]
    ablated, strengths, misstated = set(), [], False
    for proof in cert.writers:
        kind, block, axis, bias = _place(layout, proof.tensor)
        strengths.append(edit.strength_at(block, kind))
        code = "F64" if stored[str(proof.key)].dtype == torch.float64 else "F32"
        decided = replace(proof, kind=kind, block=block, axis=axis, bias=bias, dtype=code, strength=strengths[-1])
        misstated |= decided != proof
        ablated |= {(kind, block)} if strengths[-1] > 0 and not bias else set()
    proved = {p.key for p in cert.writers} | {b.tensor for b in cert.biases}
    loose = [n for n in stored if n not in proved and not re.search(r"lora(_embedding)?_(B(\.weight)?|b)$", n)]
    wrong = {
        "writers": misstated
        or len({p.tensor for p in cert.writers}) != len(cert.writers)
        or ablated != {*places, *([("embedding", None)] if edit.embedding else [])}
        or sum(p.kind == "embedding" for p in cert.writers) != len(layout.embeddings) * edit.embedding,
        "strength": cert.strength != min(strengths, default=edit.strength),
        "biases": sorted(str(b.site) for b in cert.biases) != sorted(map(str, shifts))
        or not all(b.created and b.tensor in stored for b in cert.biases),
        "config": cert.config != {},
        "edit_mtp": cert.edit_mtp,
        "tensors": any(bool(stored[name].any()) for name in loose),  # the A of a part that only adds is zero
        "untie_to_merge": cert.untie_to_merge and ("embedding", None) not in ablated,
        "writers_found": cert.writers_found < cert.writers_edited,
    }
    _check_claims(folder, wrong)


def _place(layout: Layout, tensor: str) -> tuple[Kind, int | None, int, bool]:
    """(kind, block, axis that faces the residual stream, whether it is a bias) of a writer, from its name on disk.

    Errors: LookupError for a name that is not a writer's.
    """
    if any(f".{tensor}".endswith(f".{e}.weight") for e in layout.embeddings):
        return "embedding", None, 1, False
    inside = re.fullmatch(r"(?:.*\.)?" + re.escape(layout.block).replace(r"\{\}", r"(\d+)") + r"\.(.+)", tensor)
    block, rest = (int(inside[1]), inside[2]) if inside else (None, "")
    for addend in layout.addends:
        for part in addend.parts:
            if re.fullmatch(re.escape(part.weight).replace(r"\{\}", r"\d+"), rest):
                return addend.kind, block, part.axis, False
            if rest == part.bias:
                return addend.kind, block, int(part.stacked), True
    raise LookupError(f"{tensor} is no writer")


def _check_config(folder: Path, cert: Certificate, config: dict[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Check all entries of adapter_config.json that the tensors determine: which modules change, and that the scale is
    1."""
    found = [re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora(?:_embedding)?_A(?:\.weight)?", name) for name in stored]
    parameters = config["target_parameters"] or []
    changed = [*config["target_modules"], *(path.rpartition(".")[0] for path in parameters)]
    expected = {
        "peft_type": "LORA",
        "lora_alpha": config["r"],
        "alpha_pattern": config["rank_pattern"],
        "bias": "none",
        "lora_bias": any(n.endswith(".lora_B.bias") for n in stored),
        "fan_in_fan_out": cert.layout(folder).fan_in_first,
    }
    wrong = {key for key, value in expected.items() if config[key] != value} | config.keys() ^ CONFIG_KEYS
    if sorted(changed) != sorted(m[1].removesuffix(".base_layer") for m in found if m):
        wrong.add("target_modules")
    if wrong:
        raise CheckpointError(f"{folder / CONFIG}: {min(wrong)} is not what its tensors give; bake again")


def _check_factors(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check that each A puts out as much as certified, and that its B removes the strength's share of that, along the
    directions alone.

    Where a norm follows the writer, the directions depend on the norm's gain, which only the source has.
    """
    normed = {addend.kind for addend in cert.layout(folder).addends if addend.norms}
    proofs: dict[str, list[WriterProof]] = {}
    for proof in cert.writers:
        if not proof.bias and proof.key is not None:
            proofs.setdefault(proof.key, []).append(proof)
    for key, group in proofs.items():
        first, a, b = group[0], stored[key].double(), stored[_b_of(key)].double()
        rank = edit.basis(first.block).shape[1]
        q = edit.basis(first.block) if first.kind not in normed else None
        per_expert = b.view(len(b), rank, -1).permute(2, 0, 1)  # B's columns: the direction outside, the expert inside
        gram = (per_expert.mT @ per_expert - first.strength**2 * torch.eye(rank, dtype=b.dtype)).abs().max()
        outside = 0.0 if q is None else float((b - q @ (q.T @ b)).norm()) / b.shape[1]
        for part, proof in zip(a.chunk(len(group)), group, strict=True):
            before = float(part.norm())
            right = (
                abs(before - proof.before) <= _SLACK * before
                and abs((1 - proof.strength) * before - proof.after) <= _SLACK * before
                and proof.after <= proof.norm + _SLACK * before < math.inf
            )
            if not (float(gram) <= _SLACK and outside <= _SLACK and right and proof.holds):
                raise CheckpointError(
                    f"{folder}: {key} does not take {proof.strength} of the directions out of "
                    f"{proof.tensor}, which is certified; bake again"
                )


def _check_adds(folder: Path, cert: Certificate, edit: Edit, stored: Mapping[str, Tensor]) -> None:
    """Check that, outside the ablated directions, each bias changes by exactly what the edit adds."""
    shifts = edit.biases()
    for proof in cert.biases:
        assert proof.site is not None
        tensor = stored[proof.tensor].double()
        # For the biases of experts, the last row of A holds what all of them gain.
        rest = (tensor[-1] if tensor.ndim == 2 else tensor) - shifts[proof.site]
        if any(w.key == proof.tensor and w.bias for w in cert.writers) and tensor.ndim == 1:
            q = edit.basis(proof.site)
            rest = rest - q @ (q.T @ rest)
        slack = _SLACK * proof.norm
        if not (abs(float(tensor.norm()) - proof.norm) <= slack and float(rest.norm()) <= slack):
            raise CheckpointError(f"{folder / ADAPTER}: {proof.tensor} is not the bias certified; bake again")


def _check_adapter_source(
    folder: Path, cert: Certificate, edit: Edit, config: dict[str, Any], stored: Mapping[str, Tensor], source: Path
) -> str:
    """Compute the adapter from its source again and compare."""
    plan, proofs = AdapterPlan(source, edit), Proofs()
    _check_source_files(folder, cert, plan.files)
    again = dict(plan.tensors(plan.targets, proofs))
    same_set(folder, "tensor", set(stored), set(again))
    for target in plan.targets:
        differences = {target.names[0]: _distance(target.names, target.rank, stored, again)}
        if (name := f"{target.key}.lora_B.bias") in again:
            differences[name] = float((stored[name] - again[name]).norm()), float(again[name].norm())
        for name, (off, size) in differences.items():
            if not off <= _SLACK * size:
                raise CheckpointError(f"{folder / ADAPTER}: {name} is not what {source} gives; bake again")
    claims = {
        CONFIG: config != json.loads(json.dumps(plan.config(config["base_model_name_or_path"]))),
        "biases": {(b.tensor, b.site) for b in cert.biases} != {(b.tensor, b.site) for b in proofs.biases},
        "untie_to_merge": cert.untie_to_merge != plan.untie_to_merge,
    }
    _check_claims(folder, claims)
    _check_against_source(folder, cert, plan, proofs)
    return f"all {len(again)} tensors come out of {source} again, whose files are those certified"


def _check_against_source(folder: Path, cert: Certificate, plan: Plan, proofs: Proofs) -> None:
    """Check the entries that need the source. `proofs`: those computed from it again."""
    recomputed, certified = ({(p.tensor, p.key): p for p in proven} for proven in (proofs.writers, cert.writers))
    claims = {
        "architecture": cert.architecture != plan.anatomy.architecture,
        "structure": cert.structure != proved_structure(plan.anatomy),
        "writers_found": cert.writers_found != len(plan.all_writers),
        "writers": recomputed.keys() != certified.keys()
        or not all(_same_proof(recomputed[n], certified[n]) for n in recomputed),
        "unloaded": cert.unloaded != plan.passed_through,
    }
    _check_claims(folder, claims)


def _same_proof(a: WriterProof, b: WriterProof) -> bool:
    """Whether two proofs of a writer are equal, numbers up to the rounding of fp32."""
    near = all(abs(x - y) <= _SLACK * a.norm for x, y in ((a.before, b.before), (a.after, b.after), (a.norm, b.norm)))
    return near and a == replace(b, before=a.before, after=a.after, norm=a.norm)


def _distance(
    names: tuple[str, str], rank: int, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(`||B A - B' A'||`, `||B' A'||`) of the factors A and B of these names that were found and those that were
    expected, summed over all experts, without computing the products.

    Only the products are the same on every machine: the basis of a subspace depends on a machine's libraries.
    """

    def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = (tensors[name].double() for name in names)
        return a.reshape(-1, rank, a.shape[-1]), b.reshape(len(b), rank, -1).permute(2, 0, 1)

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        return float(((one[1].mT @ other[1]) * (one[0] @ other[0].mT)).sum())

    got, wanted = factors(found), factors(expected)
    size = inner(wanted, wanted)
    square = inner(got, got) - 2 * inner(got, wanted) + size
    return 0.0 if square < 0 else square**0.5, size**0.5

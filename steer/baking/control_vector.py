"""Bakes adds as a llama.cpp control vector: a GGUF file of architecture `controlvector`, with one fp32 tensor per
layer.

`direction.N` is added to the residual stream after llama.cpp's layer N, counted from 0, which is site N. llama.cpp
stores it as vector N - 1 of a buffer and reads the vector of layer N from there, so the two offsets cancel. Layer 0 has
no place in the buffer, and `direction.0` is an error. Files of repeng and of llama.cpp's own generator can be read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.baking.card import card_header
from steer.baking.certificate import Certificate
from steer.baking.forms import bakeable, check_bakeable
from steer.baking.outputs import finish, save_directions, source_name, versions
from steer.baking.proofs import BiasProof
from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.staging import hash_file, staged
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.errors import SteerError, UsageError

FILE = "control_vector.gguf"
_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")


def bake_control_vector(
    source: Path,
    out: Path,
    edit: Edit,
    *,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Write what `edit` adds to `source`, multiplied by the amounts, as a control vector in the directory `out`.

    llama.cpp should load it at scale 1. `out` is complete or absent. Only the headers of the source are read.

    Errors: as `steer.baking.bake.bake`; UnsupportedError for anything but adds, and for an add at site 0.
    """
    source, out = Path(source), Path(out)
    files = CheckpointFiles.open(source)
    anatomy = Anatomy.of(files.config, str(source))
    anatomy.check_edit(edit)
    check_bakeable(bakeable(edit.as_moves(), "gguf", anatomy), str(source))
    anatomy.find(files.config, files.tensors)  # refuses a checkpoint whose tensors do not fit its config
    edit = edit.with_adds_as_directions()
    vectors = {site: shift.float() for site, shift in sorted(edit.biases().items()) if shift.any()}
    if not vectors:
        raise UsageError(f"{out}: expected an add that moves something, found adds that cancel each other")
    header = card_header(source / "README.md")
    with staged(out) as work:
        write_control_vector(work / FILE, vectors, anatomy.layout.model_type)
        written = {FILE: hash_file(work / FILE)}
        cert = Certificate(
            source=source_name(source),
            architecture=anatomy.architecture,
            edit=edit.describe(),
            strength=edit.strength,
            neutral=None,
            writers_found=0,  # because no weights change
            writers=(),
            biases=tuple(BiasProof(f"direction.{s}", s, True, float(v.double().norm())) for s, v in vectors.items()),
            directions=save_directions(edit, work, written),
            config={},
            tensors={f"direction.{s}": [FILE, "F32", [len(v)]] for s, v in vectors.items()},
            source_files={"config.json": hash_file(source / "config.json")},
            files=written,
            left_out=(),
            versions=versions(),
            command=command,
            form="gguf",
        )
        if progress:
            progress(1, 1)
        return finish(cert, work, header, written)


def load_control_vector(path: str | Path) -> dict[int, Direction]:
    """Load a control vector as site -> direction. Each direction's gap is the vector's length, so that amount 1 adds
    what llama.cpp adds at scale 1. The norm of the residual stream is not known, so `share` is nan.

        directions = steer.load_control_vector("control_vector.gguf")
        with model.steered({direction: 1.0 for direction in directions.values()}):
            print(model.chat("Hello."))

    Errors: SteerError for a file that is missing, or is not a control vector.
    """
    path = Path(path)
    if not path.is_file():
        raise SteerError(f"{path}: expected a control vector in a GGUF file, found none; check the path")
    vectors, facts = read_control_vector(path)
    provenance = {"control_vector": path.name, "sha256": hash_file(path), **facts}
    return {
        site: Direction(
            path.stem if len(vectors) == 1 else f"{path.stem}-{site}", site, vector,
            with_mean=float(vector.double().norm()), without_mean=0.0, residual_norm=math.nan, provenance=provenance,
        )
        for site, vector in vectors.items()
    }  # fmt: skip


def write_control_vector(path: Path, vectors: Mapping[int, Float[Tensor, " d"]], model_type: str) -> None:
    """Write site -> vector as a new GGUF file. `model_type` is the hint of the model it is for."""
    import gguf

    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
    for site, vector in vectors.items():
        writer.add_tensor(f"direction.{site}", vector.to(torch.float32).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_control_vector(path: Path) -> tuple[dict[int, Float[Tensor, " d"]], dict[str, Any]]:
    """(site -> vector, the model hint if there is one) of a GGUF file. Tensors of only zeros are left out.

    Errors: SteerError for a file that is not a control vector.
    """
    import gguf

    def wrong(found: str) -> SteerError:
        return SteerError(f"{path}: expected a control vector in a GGUF file, found {found}; make it again")

    try:
        reader = gguf.GGUFReader(path)
        fields = {n: f.contents() for n in ("architecture", "model_hint") if (f := reader.get_field(_key(n)))}
        tensors = [(t.name, t.tensor_type, np.array(t.data)) for t in reader.tensors]
    except Exception as e:  # the reader raises whatever a broken file makes numpy and struct raise
        raise wrong(f"something unreadable ({type(e).__name__})") from e
    if fields.get("architecture") != _ARCHITECTURE:
        raise wrong(f"one of architecture {fields.get('architecture')}")
    out: dict[int, Tensor] = {}
    for name, kind, data in tensors:
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) < 1 or kind != gguf.GGMLQuantizationType.F32 or data.ndim != 1:
            raise wrong(f"tensor {name}, {kind.name} {list(data.shape)}, where direction.1 and on hold fp32 vectors")
        if not np.isfinite(data).all():
            raise wrong(f"numbers that are not finite in {name}")
        if data.any():
            out[int(match[1])] = torch.from_numpy(data)
    if len({len(v) for v in out.values()}) != 1:
        raise wrong("vectors of several widths" if out else "no direction in it")
    return dict(sorted(out.items())), {k: v for k, v in fields.items() if k == "model_hint"}


def _key(name: str) -> str:
    return f"general.{name}" if name == "architecture" else f"{_ARCHITECTURE}.{name}"

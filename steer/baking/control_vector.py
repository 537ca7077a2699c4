"""Control vectors of llama.cpp: a GGUF file of architecture `controlvector`, with one fp32 tensor per
layer.

`direction.N` is added to the residual stream after llama.cpp's layer N, counted from 0, which is site N. llama.cpp
stores it as vector N - 1 of a buffer and reads the vector of layer N from there, so the two offsets cancel. Layer 0 has
no place in the buffer, and `direction.0` is an error. Files of repeng and of llama.cpp's own generator can be read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.errors import SteerError

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"


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
    vectors, hint = read_control_vector(path)
    provenance = {"control_vector": path.name, "sha256": hash_file(path)}
    if hint is not None:
        provenance["model_hint"] = hint
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
    writer.add_string(_HINT, model_type)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
    write_tensors(writer, {f"direction.{site}": vector for site, vector in vectors.items()})


def write_tensors(writer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors in fp32 to a `gguf.GGUFWriter`, write its file and close it."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.to(torch.float32).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_control_vector(path: Path) -> tuple[dict[int, Float[Tensor, " d"]], str | None]:
    """(site -> vector, the model hint if there is one) of a GGUF file. Tensors of only zeros are left out.

    Errors: SteerError for a file that is not a control vector.
    """
    import gguf

    def wrong(found: str) -> SteerError:
        return SteerError(f"{path}: expected a control vector in a GGUF file, found {found}; make it again")

    try:
        reader = gguf.GGUFReader(path)
        fields = [reader.get_field(name) for name in ("general.architecture", _HINT)]
        architecture, hint = (field.contents() if field else None for field in fields)
        tensors = [(t.name, t.tensor_type, np.array(t.data)) for t in reader.tensors]
    except Exception as e:  # the reader raises whatever a broken file makes numpy and struct raise
        raise wrong(f"something unreadable ({type(e).__name__})") from e
    if architecture != _ARCHITECTURE:
        raise wrong(f"one of architecture {architecture}")
    out: dict[int, Tensor] = {}
    for name, kind, data in tensors:
        match = re.fullmatch(r"direction\.(\d+)", name)
        if match is None or int(match[1]) < 1 or kind != gguf.GGMLQuantizationType.F32 or data.ndim != 1:
            raise wrong(f"tensor {name}, {kind.name} {list(data.shape)}, where direction.1 and on hold fp32 vectors")
        if not np.isfinite(data).all():
            raise wrong(f"numbers that are not finite in {name}")
        if data.any():
            out[int(match[1])] = torch.from_numpy(data)
    if len({len(v) for v in out.values()}) != 1:
        raise wrong("vectors of several widths" if out else "no direction in it")
    return dict(sorted(out.items())), hint

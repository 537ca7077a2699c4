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

from jaxtyping import Float
from torch import Tensor

from steer.checkpoint.gguf_file import read_gguf, write_tensors
from steer.checkpoint.staging import hash_file
from steer.core.direction import Direction
from steer.errors import CheckpointError, SteerError

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"


def load_control_vector(path: str | Path) -> dict[int, Direction]:
    """Load the control vector in the file `path` as site -> direction. Each direction's gap is the vector's length, so
    that amount 1 adds what llama.cpp adds at scale 1. The norm of the residual stream is not known, so `share` is nan.

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


def read_control_vector(path: Path) -> tuple[dict[int, Float[Tensor, " d"]], str | None]:
    """(site -> vector, the model hint if there is one) of a GGUF file. Tensors of only zeros are left out.

    Errors: CheckpointError for a file that is not a control vector.
    """

    def wrong(found: str) -> CheckpointError:
        return CheckpointError(f"{path}: expected a control vector in a GGUF file, found {found}; make it again")

    fields, tensors = read_gguf(path, _ARCHITECTURE, 1, wrong)
    if odd := next((name for name in tensors if not re.fullmatch(r"direction\.[1-9]\d*", name)), None):
        raise wrong(f"tensor {odd}, where direction.1 and on are expected")
    vectors = {int(name.partition(".")[2]): vector for name, vector in tensors.items() if vector.any()}
    if len({len(v) for v in vectors.values()}) != 1:
        raise wrong("vectors of several widths" if vectors else "no direction in it")
    return dict(sorted(vectors.items())), fields.get(_HINT)

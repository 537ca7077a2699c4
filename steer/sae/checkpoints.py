"""The state of a training run on disk, in `OUT.training`.

The safetensors files are replaced atomically, so that after a kill the last complete state is left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer.errors import CheckpointError, MismatchError
from steer.files import parse_json, replacing
from steer.sae import parallel

STATE = "state.safetensors"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything that the next step depends on."""

    step: int
    """Number of steps done."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    """Adam's running means, `<weight>.exp_avg` and `<weight>.exp_avg_sq`."""
    buffers: dict[str, Tensor]
    """`Objective.buffers()`: state besides the weights, such as a threshold."""
    since_fired: Tensor
    """Per latent, training tokens since it last fired."""
    rng: Tensor
    """State of torch's global random generator."""
    data: dict[str, Any]
    """State of the batches, from their `state_dict`."""
    facts: dict[str, Any]
    """Options, inputs and figures so far, as JSON."""


def training_place(out: Path) -> Path:
    """The directory for the state of the run whose result will be `out`: `out.training`."""
    return out.with_name(out.name + ".training")


def save_state(place: Path, state: TrainingState) -> None:
    """Write the state; every process calls this and writes its own position in the data, the first one all the rest.

    The shared state is written last and names its step, so it is never combined with the data of another step.
    """
    place.mkdir(parents=True, exist_ok=True)
    data_file = _data_file(place, state.step)
    tensors = {k: v for k, v in state.data.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in state.data.items() if k not in tensors}
    _replace(data_file, tensors, {"plain": plain})
    parallel.barrier()
    if parallel.rank() == 0:
        groups = {"weight": state.weights, "moment": state.moments, "buffer": state.buffers}
        flat = {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}
        flat |= {"since_fired": state.since_fired, "rng": state.rng}
        _replace(place / STATE, flat, {"step": state.step, "facts": state.facts, "processes": parallel.world()})
    parallel.barrier()
    for old in place.glob(f"data-{parallel.rank()}-*.safetensors"):
        if old != data_file:
            old.unlink()


def load_state(place: Path) -> TrainingState:
    """Read the state of this process. Errors: CheckpointError for a file that cannot be read, MismatchError for another
    number of processes than the run had."""
    flat, header = _read(place / STATE)
    if header["processes"] != parallel.world():
        raise MismatchError(
            f"{place}: expected {header['processes']} processes, as the run was started with, found "
            f"{parallel.world()}; launch as many"
        )
    data, facts = _read(_data_file(place, header["step"]))
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "moment": {}, "buffer": {}}
    for name, tensor in flat.items():
        group, slash, rest = name.partition("/")
        if slash:
            groups[group][rest] = tensor
    return TrainingState(
        header["step"], groups["weight"], groups["moment"], groups["buffer"], flat["since_fired"], flat["rng"],
        data | facts["plain"], header["facts"],
    )  # fmt: skip


def _data_file(place: Path, step: int) -> Path:
    return place / f"data-{parallel.rank()}-{step}.safetensors"


def _replace(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(held, part, metadata={"json": json.dumps(facts)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, parse_json(f.metadata()["json"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
        raise CheckpointError(
            f"{path}: expected the state of a stopped training, found {reason}; remove {path.parent} and start again"
        ) from e

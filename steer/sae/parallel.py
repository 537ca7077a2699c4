"""Data-parallel training under `torchrun` or `accelerate launch`: every process has a slice of the joint batch.

Without a process group these functions do nothing or return their arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that the launcher's environment variables describe, and leave it at the end. Does nothing
    in a process that was not launched with others."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; only process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_device() -> torch.device:
    """The device of this process: a GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes: as losses are means, the gradient of the joint batch."""
    if world() == 1:
        return
    for weight in weights:
        if weight.grad is not None:
            dist.all_reduce(weight.grad)
            weight.grad /= world()


def means(*values: float) -> tuple[float, ...]:
    """The mean of each number over the processes."""
    return tuple((_reduced(torch.tensor(values, dtype=torch.float64)) / world()).tolist())


def total(count: int) -> int:
    """The sum of a count over the processes."""
    return int(_reduced(torch.tensor(count)))


def any_of(flags: Tensor) -> Tensor:
    """Elementwise "or" over the processes."""
    return flags if world() == 1 else _reduced(flags.int(), dist.ReduceOp.MAX).bool()


def least(value: float) -> float:
    """The smallest value over the processes."""
    return float(_reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MIN))


def joint_least(values: Tensor, count: int) -> float:
    """The `world * count`-th largest of the positive values of all processes together, or 0 if they have fewer."""
    wanted = world() * count
    if len(values) > wanted:
        values = values.topk(wanted, sorted=False).values
    longest = _reduced(torch.tensor(len(values)), dist.ReduceOp.MAX)
    padded = values.new_zeros(int(longest))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    joined = torch.cat(parts)
    return float(joined.topk(wanted, sorted=False).values.min()) if len(joined) >= wanted else 0.0


def stop_requested(asked: bool) -> bool:
    """Whether any process was asked to stop, so that all stop after the same step."""
    return bool(any_of(torch.tensor(asked)))


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        dist.barrier()


def launched_first() -> bool:
    """Whether this is the launcher's first process, or there is no launcher. Unlike `rank`, it works outside
    `process_group`."""
    return os.environ.get("RANK", "0") == "0"


def _reduced(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    if world() > 1:
        values = values.to(local_device() if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, op)
    return values

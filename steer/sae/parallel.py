"""Data-parallel training under `torchrun` or `accelerate launch`: every process has a slice of the joint batch.

Without a process group these functions do nothing or return their arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
    if world() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    return tuple((sums / world()).tolist())


def total(count: int) -> int:
    """The sum of a count over the processes."""
    return round(means(float(count))[0] * world())


def any_of(flags: Tensor) -> Tensor:
    """Elementwise "or" over the processes."""
    if world() == 1:
        return flags
    seen = flags.int()
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen.bool()


def least(value: Tensor | None) -> Tensor | None:
    """The smallest value over the processes, of which some may have None; None if all have None."""
    if world() == 1:
        return value
    found = torch.tensor(float("inf") if value is None else float(value), dtype=torch.float64, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return None if bool(found.isinf()) else found.cpu()


def joint_least(values: Tensor, count: int) -> float | None:
    """The `world * count`-th largest of the values of all processes together, or 0 if they have fewer values.

    None if there is only one process.
    """
    if world() == 1:
        return None
    wanted = world() * count
    if len(values) > wanted:
        values = values.topk(wanted, sorted=False).values
    sizes = torch.zeros(world(), dtype=torch.long, device=values.device)
    sizes[rank()] = len(values)
    dist.all_reduce(sizes)
    padded = values.new_full((int(sizes.max()),), -torch.inf)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    joined = torch.cat(parts)
    if int(sizes.sum()) < wanted:
        return 0.0
    return float(joined.topk(wanted, sorted=False).values.min())


def stop_requested(here: bool) -> bool:
    """Whether any process was asked to stop, so that all stop after the same step. `here` says whether this one was."""
    return bool(any_of(torch.tensor([here], device=_device())).item())


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        dist.barrier()


def _device() -> torch.device:
    return local_device() if dist.is_initialized() and dist.get_backend() == "nccl" else torch.device("cpu")


def launched_first() -> bool:
    """Whether this is the launcher's first process, or there is no launcher. Unlike `rank`, it works outside
    `process_group`."""
    return os.environ.get("RANK", "0") == "0"

"""The processes of one run. Everything is the identity in a single process.

Started by `accelerate launch` (or torchrun), which sets the environment that `start` reads.
"""

from __future__ import annotations

import gc
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def start() -> None:
    """Join the other processes, if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState()  # picks the backend (nccl, gloo) and the device for this machine


def device() -> torch.device:
    """Where this process keeps its model: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if active():
        dist.all_reduce(x)
    return x


def all_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if not active():
        return number
    x = torch.tensor(number, device=device())
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return int(x)


def gather(value: T) -> list[T]:
    """Every process's value, by rank, on all processes."""
    if not active():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's value on all processes."""
    if not active():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    if active():
        dist.barrier()


def stop() -> None:
    """Leave the other processes, all at once: one that is gone while another still talks to it makes that one abort."""
    if active():
        gc.collect()  # what holds on to a group (sharded models) would end it at a time of its own
        dist.barrier()
        dist.destroy_process_group()

"""The processes of one run. Everything is the identity in a single process.

Started by `accelerate launch` (or torchrun), which sets the environment that `start` reads.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_runs = 0  # that this process has entered, the same number on all: each notes its first error under a name of its own


class PeerError(RuntimeError):
    """Another process of the run stopped, died or did not answer. The message says which and why, where it is known."""


def start(patience: float = 600.0) -> None:
    """Join the other processes, if a launcher started several.

    patience: seconds that one waits for the others anywhere, before it stops with an error.
    """
    if several() and not dist.is_initialized():
        from accelerate import PartialState

        # picks the backend (nccl, gloo) and the device for this machine
        PartialState(timeout=timedelta(seconds=patience))


def several() -> bool:
    """Whether a launcher started others beside this process, met or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


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
        with one_for_all():
            _meet()
        dist.destroy_process_group()


def _meet() -> None:
    """A barrier without limit: the first process may be uploading the result."""
    store = _store()
    names = [f"prefopt/leaves/{_runs}/{number}" for number in range(world())]
    store.set(names[rank()], "")
    store.wait(names, timedelta(days=7))
    dist.barrier()  # the store goes with the first process


# ---------------------------------------------------------------- when one fails


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """Within it, what ends this process is told to the others, which end with it; all enter it equally often.

    PeerError where another process stopped, died, or did not answer in time.
    """
    global _runs
    _runs += 1
    try:
        yield
    except PeerError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if several() and is_lost(error):
            told = _told()
            raise (stopped_by(told) if told else PeerError(_lost(error))) from error
        if active():
            _tell(error)
        raise


def stopped_by(first: str) -> PeerError:
    """The error of a process that stops since another had. first: that one's number and error."""
    return PeerError(f"{_self()} stopped, since another had: {first}")


def _self() -> str:
    """This process, for a message; also while it has not met the others."""
    return f"process {os.environ.get('RANK', rank())} of {os.environ.get('WORLD_SIZE', world())}"


def _store() -> Any:
    """Where processes leave each other notes: it outlives the connections between them, though not its own host."""
    return dist.distributed_c10d._get_default_store()


def _tell(error: BaseException) -> None:
    """Leave a note of what ends this process, unless another's is there."""
    words = f"process {rank()}: {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # the store may be gone already
        _store().compare_set(f"prefopt/stopped/{_runs}", "", words)


def _told() -> str:
    """The note of the first process that failed; empty where there is none."""
    name = f"prefopt/stopped/{_runs}"
    with contextlib.suppress(Exception):
        return str(_store().get(name).decode()) if _store().check([name]) else ""
    return ""


def is_lost(error: BaseException | None) -> bool:
    """Whether it says that talking to the other processes failed. gloo raises a bare RuntimeError that names gloo."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost(error: BaseException) -> str:
    """What is known of why the other processes are not there."""
    own = Path(__file__)
    calls = [call for call in traceback.extract_tb(error.__traceback__) if own.parent in Path(call.filename).parents]
    places = [f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in calls if call.filename != __file__]
    who, where = _self(), f" in {places[-1]}" if places else ""
    # without its place in gloo's source, and gloo's advice
    said = re.sub(r"^\[\S*gloo\S*\] ", "", str(error).strip()).partition(". This is")[0].partition("\n")[0]
    if "timed out" in said.lower() or "timeout" in said.lower():
        return (
            f"{who} waited in vain for the others{where}: one of them hangs, or is busy for longer than "
            f"max_wait_minutes ({said})"
        )
    return (
        f"{who} lost another{where}: it was killed, or its error stands in its own output ({said}); the same command, "
        "without overwrite=true, goes on from the newest checkpoint, if there is one"
    )

"""AdamW on float32 masters: what the model's weights are kept in does not change what the optimiser sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt import ranks
from prefopt.records import InputError

BUCKET = 64 * 2**20  # bytes of gradient sent at once
PIECE = 2**22  # numbers of a gradient that are made wide at once


@dataclass(frozen=True)
class _Pair:
    """A trainable parameter and the float32 copy the optimiser updates (the parameter itself if it is wide enough)."""

    weight: nn.Parameter
    master: nn.Parameter


class Updater:
    """Collects gradients, sums them over processes, clips, and takes AdamW steps.

    Gradients of 16-bit weights are added up in float32 as they arrive, so many small forward passes lose nothing.
    Decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101) on matrices only.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.pairs = [_pair(p) for p in parameters if p.requires_grad]
        if not self.pairs:
            raise ValueError("no parameter is trainable")
        decayed = [pair.master for pair in self.pairs if pair.weight.ndim >= 2]
        other = [pair.master for pair in self.pairs if pair.weight.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, **_kernels(self.pairs)
        )

    def sum_over_processes(self) -> None:
        """Add up the gradients of all processes; a parameter without one counts as zero.

        Shards arrive averaged by FSDP2 (its one mode on every backend), so they are multiplied back.
        """
        if not ranks.active():
            return
        grads = []
        for pair in self.pairs:
            if pair.master.grad is None:
                pair.master.grad = torch.zeros_like(pair.master)
            if _is_sharded(pair.master):
                pair.master.grad.mul_(ranks.world())
            else:
                grads.append(pair.master.grad)
        for bucket in _buckets(grads):
            flat = ranks.all_sum(torch.cat([g.flatten() for g in bucket]))
            for grad, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(total.view_as(grad))

    def norm(self) -> Tensor:
        """Euclidean norm of the whole gradient, [] float32, the same on all processes."""
        whole, sharded = torch.zeros((), device=self.pairs[0].weight.device), None
        for pair in self.pairs:
            if pair.master.grad is None:
                continue
            square = _norm(pair.master.grad) ** 2
            if _is_sharded(pair.master):
                sharded = square if sharded is None else sharded + square
            else:
                whole = whole + square
        return (whole if sharded is None else whole + ranks.all_sum(sharded)).sqrt()

    def step(self, learning_rate: float, max_norm: float | None) -> float | None:
        """One update. Returns the gradient's norm before clipping; None, with nothing changed, if it is not finite."""
        norm = self.norm()
        if not torch.isfinite(norm):
            self.zero()
            return None
        if max_norm is not None and norm > max_norm:
            for pair in self.pairs:
                if pair.master.grad is not None:
                    pair.master.grad.mul_(max_norm / norm)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.zero()
        with torch.no_grad():
            for pair in self.pairs:
                if pair.master is not pair.weight:
                    pair.weight.copy_(pair.master)
        return float(norm)

    def zero(self) -> None:
        for pair in self.pairs:
            pair.weight.grad = pair.master.grad = None

    def is_finite(self) -> bool:
        """Whether every trained weight is a number that a model can work with, on this process."""
        return not broken((str(place), pair.master) for place, pair in enumerate(self.pairs))

    def _placed(self, master: Tensor, x: Tensor) -> Tensor:
        """A saved tensor of AdamW's where it belongs: moments like `master`, the count of steps where it is read."""
        if not x.ndim:
            return x.to(master.device if self.adam.defaults["fused"] else "cpu")
        like = torch.zeros_like(master)
        _local(like).copy_(x)
        return like

    @property
    def sharded(self) -> bool:
        """Whether processes hold different parts of the weights; otherwise they hold the same."""
        return any(_is_sharded(pair.master) for pair in self.pairs)

    def state_dict(self) -> dict[str, Any]:
        """Every master, and what AdamW knows of it (None before its first step); of shards this process's part."""
        return {
            "masters": [pair.master for pair in self.pairs],
            "adam": [dict(self.adam.state[pair.master]) or None for pair in self.pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. InputError unless it is of the same parameters."""
        shapes = [tuple(_local(pair.master).shape) for pair in self.pairs]
        if [tuple(master.shape) for master in state["masters"]] != shapes:
            raise InputError("the checkpoint holds other trained weights than this run has")
        self.adam.state.clear()
        with torch.no_grad():
            for pair, master, adam in zip(self.pairs, state["masters"], state["adam"], strict=True):
                _local(pair.master).copy_(master)
                if pair.master is not pair.weight:
                    pair.weight.copy_(pair.master)
                if adam is not None:
                    self.adam.state[pair.master] = {name: self._placed(pair.master, x) for name, x in adam.items()}
        self.zero()


def _pair(weight: nn.Parameter) -> _Pair:
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return _Pair(weight, weight)
    master = nn.Parameter(weight.detach().float())

    def collect(_: Tensor) -> None:
        grad = weight.grad
        weight.grad = None
        if grad is not None:
            master.grad = grad.float() if master.grad is None else _added(master.grad, grad)

    weight.register_post_accumulate_grad_hook(collect)
    return _Pair(weight, master)


def _added(total: Tensor, part: Tensor) -> Tensor:
    """`total` with a narrower tensor of the same shape added in place: torch makes it as wide first, so in pieces."""
    if _is_sharded(total) or not (total.is_contiguous() and part.is_contiguous()):
        return total.add_(part)
    for long, short in zip(total.view(-1).split(PIECE), part.view(-1).split(PIECE), strict=True):
        long.add_(short)
    return total


def broken(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those that hold what is no number, or numbers whose squares add up to none: no layer works with them.

    Of shards, as far as they are on this process; integers, as quantised weights are, are left out.
    """
    return [name for name, x in weights if x.is_floating_point() and not torch.isfinite(_norm(x))]


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm, in float32 at least; of a shard its own."""
    return torch.linalg.vector_norm(_local(x).detach(), dtype=torch.promote_types(x.dtype, torch.float32))


def _is_sharded(x: Tensor) -> bool:
    return hasattr(x, "placements")


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _kernels(pairs: list[_Pair]) -> dict[str, bool]:
    """One fused kernel where it exists; a parameter at a time where shards and whole tensors mix."""
    return {"fused": True} if _can_fuse(pairs) else {"foreach": False}


def _can_fuse(pairs: list[_Pair]) -> bool:
    return all(p.master.device.type in ("cpu", "cuda") and not _is_sharded(p.master) for p in pairs)


def _buckets(grads: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket

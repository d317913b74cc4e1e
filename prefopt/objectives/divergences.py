"""The reward that a log-ratio stands for when the distance from the reference is another f-divergence: f'(ratio).

x = log p - log p_reference of a completion, nats. Constants, which cancel in a pair, are such that f'(1) = 0: the
reward starts at 0. Its slope in x is 1 there, but for js, where it is 1/2. order: which alpha-divergence; the others do
not read it.
Wang et al. 2023, arXiv:2309.16240.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

STEEPEST = 30.0  # e^30: a norm over gradients of this size is still finite in float32


def exp(x: Tensor) -> Tensor:
    """e^x, continued by its tangent above `STEEPEST`: finite, and with a gradient that still points the right way."""
    # relu, not x - near: two gradients of size e^30 that cancel would leave nothing of a gradient of size 1
    return x.clamp(max=STEEPEST).exp() + math.exp(STEEPEST) * F.relu(x - STEEPEST)


def reverse_kl(x: Tensor, order: float) -> Tensor:
    """x."""
    return x


def forward_kl(x: Tensor, order: float) -> Tensor:
    """1 - e^-x."""
    return 1 - exp(-x)


def js(x: Tensor, order: float) -> Tensor:
    """log(2 e^x / (1 + e^x)): at most log 2 however likely a completion becomes."""
    return math.log(2) + F.logsigmoid(x)


def alpha(x: Tensor, order: float) -> Tensor:
    """(1 - e^(-order x)) / order: towards reverse KL as the order falls to 0, forward KL at order 1."""
    return (1 - exp(-order * x)) / order


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha,
}

"""What each token of a completion was worth: advantages and returns from rewards and a critic's values.

A completion is an episode whose steps are the tokens that the policy wrote, in their order. Tokens it did not write
(tool output) are no steps: their rewards and values are never read, gamma and lambda do not count them, and what comes
after them reaches back to the step before them.

Letters: K completion tokens laid end to end, N completions, S trained tokens of all completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.batch import Batch, check


class Estimate(NamedTuple):
    """advantage [K]; returns [K], what the critic should have said. Reward units; 0 on tokens that are no steps."""

    advantage: Tensor
    returns: Tensor


def gae(batch: Batch, reward: Tensor, value: Tensor, gamma: float, gae_lambda: float) -> Estimate:
    """Generalised advantage estimation.

        delta_t   = R_t + gamma V_t+1 - V_t           V beyond the last step is 0
        A_t       = delta_t + gamma lambda A_t+1
        returns_t = A_t + V_t

    reward [K] of each token, reward units; value [K] of the state before each token; gae_lambda: lambda; 1 gives
    A_t = (discounted rewards to come) - V_t, 0 gives delta_t. ValueError unless both are [K].
    Schulman et al. 2015, arXiv:1506.02438.
    """
    reward, value = check(reward, len(batch.trained), "gae"), check(value, len(batch.trained), "gae")
    step = batch.trained.nonzero()[:, 0]  # [S]
    own = batch.owner[step]  # [S]
    now = value[step]  # [S]
    delta = reward[step] + gamma * _next(now, own) - now
    advantage = _to_come(delta, own, gamma * gae_lambda)
    empty = torch.zeros_like(value)
    return Estimate(empty.index_copy(0, step, advantage), empty.index_copy(0, step, advantage + now))


def to_come(batch: Batch, reward: Tensor, gamma: float) -> Tensor:
    """Rewards of a step and of those after it, discounted: [K] -> [K], 0 on tokens that are no steps."""
    step = batch.trained.nonzero()[:, 0]  # [S]
    found = _to_come(check(reward, len(batch.trained), "to_come")[step], batch.owner[step], gamma)
    return torch.zeros_like(reward).index_copy(0, step, found)


def last_steps(batch: Batch) -> Tensor:
    """The last trained token of each completion that has one, [K] bool."""
    step = batch.trained.nonzero()[:, 0]  # [S]
    own = batch.owner[step]  # [S]
    is_last = torch.ones_like(own, dtype=torch.bool)
    is_last[:-1] = own[1:] != own[:-1]
    return torch.zeros_like(batch.trained).index_fill(0, step[is_last], True)


def _next(x: Tensor, own: Tensor) -> Tensor:
    """The value of the next step of the same completion, 0 after its last: [S] -> [S]."""
    after = torch.zeros_like(x)
    after[:-1] = torch.where(own[1:] == own[:-1], x[1:], 0)
    return after


def _to_come(x: Tensor, own: Tensor, rate: float) -> Tensor:
    """sum over l of rate^l x_t+l within a completion: [S] -> [S].

    After j rounds each step holds the sum of 2^j terms, so the longest completion takes log2 of its length.
    """
    reach = 1
    while reach < len(x) and (within := own[reach:] == own[:-reach]).any():
        beyond = torch.zeros_like(x)
        beyond[:-reach] = torch.where(within, rate**reach * x[reach:], 0)
        x, reach = x + beyond, 2 * reach
    return x

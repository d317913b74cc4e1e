"""How much better a completion is than was to be expected: the baselines and scales that group methods differ in.

Every function takes the rewards of a batch's completions, [N], NaN where one could not be scored, and returns their
advantages, [N]: a completion without a score leaves the means and spreads of the others alone and has advantage 0.

Letters: G prompts, N completions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, check

Advantage = Callable[[Batch, Tensor], Tensor]

GROUP_EPS = 1e-4  # added to a group's standard deviation


def scored(reward: Tensor) -> Tensor:
    """Which completions have a reward, [N] bool."""
    return ~reward.isnan()


def group_sum(batch: Batch, x: Tensor) -> Tensor:
    """Sum over each prompt's completions: [N] -> [G]. NaN counts as 0."""
    x = check(x, batch.num_completions, "group_sum")
    return x.new_zeros(batch.num_prompts).index_add(0, batch.group, x.nan_to_num(0.0))


def group_size(batch: Batch, reward: Tensor) -> Tensor:
    """Scored completions of each prompt, [G]."""
    return group_sum(batch, scored(reward).to(reward.dtype))


def group_mean(batch: Batch, reward: Tensor) -> Tensor:
    """Mean reward of each prompt's scored completions, given to each of its completions: [N] -> [N]."""
    return (group_sum(batch, reward) / group_size(batch, reward).clamp(min=1))[batch.group]


def group_std(batch: Batch, reward: Tensor) -> Tensor:
    """Standard deviation of each prompt's rewards with Bessel's correction, given to each of its completions: [N].

    0 for a prompt with one scored completion.
    """
    squares = group_sum(batch, (reward - group_mean(batch, reward)).square())
    return (squares / (group_size(batch, reward) - 1).clamp(min=1)).sqrt()[batch.group]


def centred(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group: [N] -> [N]. Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO)."""
    return (reward - group_mean(batch, reward)).nan_to_num(0.0)


def normalised(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group, in its standard deviations: [N] -> [N].

    Shao et al. 2024, arXiv:2402.03300 (GRPO). Groups of nearly equal rewards get the largest steps for a difference.
    """
    return centred(batch, reward) / (group_std(batch, reward) + GROUP_EPS)


def leave_one_out(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean reward of the others that answer the same prompt: [N] -> [N].

    0 for a completion without a scored companion. Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """
    size = group_size(batch, reward)[batch.group]
    return centred(batch, reward) * torch.where(size > 1, size / (size - 1).clamp(min=1), 0.0)


def batch_moments(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (Bessel) of x [N] over all scored completions of the update, on all processes."""
    shares = ranks.gather(x.new_empty(0).cpu() if batch.filler else x[scored(x)].detach().cpu())
    everyone = torch.cat(shares).to(x.device)
    if not len(everyone):
        return x.new_zeros(()), x.new_zeros(())
    return everyone.mean(), everyone.std() if len(everyone) > 1 else x.new_zeros(())

"""How much better a completion is than was to be expected: the baselines and scales that group methods differ in.

Every advantage takes the rewards of a rollout's completions, [N], NaN where one could not be scored, and returns their
advantages, [N]: a completion without a score leaves the means and spreads of the others alone and has advantage 0.

Means and spreads are taken in float64, where a sum of equal float32 rewards is exact: a prompt whose completions all
have the same reward gives exactly 0, not a rounding error that a small spread would blow up.

Letters: G prompts, N completions, n numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, check
from prefopt.records import InputError

Advantage = Callable[[Batch, Tensor], Tensor]

SPREAD_EPS = 1e-4  # added to a standard deviation, in units of the reward
SMALLEST_SPREAD = 1e-6  # of rewards, in their units: what is below is rounding, and counts as none
LARGEST_PULL = 10.0  # of the reference on a group, as a multiple of what the spread of the whole rollout would give it
LARGEST_SCALE = 1e6  # of a reward under the Beta normalisation
LARGEST_PARAMETER = 1e6  # of a Beta density: above it the logarithms of its factorials no longer cancel exactly


def scored(reward: Tensor) -> Tensor:
    """Which completions have a reward, [N] bool."""
    return ~reward.isnan()


# ---------------------------------------------------------------- of a prompt


def group_sum(batch: Batch, x: Tensor) -> Tensor:
    """Sum over each prompt's completions: [N] -> [G] float64. NaN counts as 0."""
    x = check(x, batch.num_completions, "group_sum").double()
    return x.new_zeros(batch.num_prompts).index_add(0, batch.group, x.nan_to_num(0.0))


def group_size(batch: Batch, reward: Tensor) -> Tensor:
    """Scored completions of each prompt, [G]."""
    return group_sum(batch, scored(reward))


def group_means(batch: Batch, reward: Tensor) -> Tensor:
    """Mean reward of each prompt's scored completions: [N] -> [G] float64; 0 where none is scored."""
    return group_sum(batch, reward) / group_size(batch, reward).clamp(min=1)


def group_mean(batch: Batch, reward: Tensor) -> Tensor:
    """Mean reward of each prompt's scored completions, given to each of its completions: [N] -> [N] float64."""
    return group_means(batch, reward)[batch.group]


def group_std(batch: Batch, reward: Tensor) -> Tensor:
    """Standard deviation of each prompt's rewards with Bessel's correction, given to each completion: [N] float64.

    0 for a prompt with one scored completion.
    """
    squares = group_sum(batch, (reward - group_mean(batch, reward)).square())
    return (squares / (group_size(batch, reward) - 1).clamp(min=1)).sqrt()[batch.group]


def centred(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group: [N] -> [N]. Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO)."""
    return (reward - group_mean(batch, reward)).nan_to_num(0.0).to(reward.dtype)


def normalised(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group, in its standard deviations: [N] -> [N].

    Shao et al. 2024, arXiv:2402.03300 (GRPO). Groups of nearly equal rewards get the largest steps for a difference.
    """
    return (centred(batch, reward) / (group_std(batch, reward) + SPREAD_EPS)).to(reward.dtype)


def leave_one_out(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean reward of the others that answer the same prompt: [N] -> [N].

    0 for a completion without a scored companion. Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """
    size = group_size(batch, reward)[batch.group]
    others = torch.where(size > 1, size / (size - 1).clamp(min=1), 0.0)
    return (centred(batch, reward) * others).to(reward.dtype)


def over_mean(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group, in units of that mean: [N] -> [N]; 0 where the mean is 0.

    Of rewards 0 and 1 it is an unbiased gradient of the log of the chance of success, up to order G in the chance of
    failure. InputError, with the reward, if one is below 0. Tajwar et al. 2026, arXiv:2602.02710 (MaxRL).
    """
    refuse(reward[reward < 0], "is below 0: maxrl divides by the mean reward; give rewards of 0 and more")
    mean = group_mean(batch, reward)
    return torch.where(mean > 0, centred(batch, reward) / mean, 0.0).to(reward.dtype)


# ---------------------------------------------------------------- what the reference takes off a reward

# A penalty [N] on the scale that an advantage gives the rewards of its group, so that beta is the price of a nat under
# every one of them and the optimum is the reference tilted by reward / beta. The scale is that of the rewards alone:
# where they are equal there is none, and the penalty stays as it is, rather than being blown up to full size. Equal are
# rewards whose spread is rounding (SMALLEST_SPREAD). A group that differs by little beside the others of its rollout is
# pulled LARGEST_PULL times as much as they are and no more: there the reference holds the policy a little less.


def in_group_spreads(batch: Batch, penalty: Tensor) -> Tensor:
    """Penalty less its group's mean, in standard deviations of the group's rewards (`normalised`): [N] -> [N].

    Of a group with a smaller one than 1 / LARGEST_PULL of that of all rewards of the rollout, in that share of it.
    """
    own, floor = group_std(batch, batch.score), batch_moments(batch, batch.score)[1] / LARGEST_PULL
    return _over(centred(batch, penalty), torch.where(own < SMALLEST_SPREAD, 0.0, own.clamp(min=floor)), SPREAD_EPS)


def in_group_means(batch: Batch, penalty: Tensor) -> Tensor:
    """Penalty less its group's mean, in units of the group's mean reward (`over_mean`): [N] -> [N]."""
    return _over(centred(batch, penalty), group_mean(batch, batch.score))


def in_batch_spreads(batch: Batch, penalty: Tensor) -> Tensor:
    """Penalty less its group's mean, in standard deviations of all rewards of the rollout (`batch_scaled`)."""
    return _over(centred(batch, penalty), batch_moments(batch, batch.score)[1], SPREAD_EPS)


def _over(x: Tensor, scale: Tensor, eps: float = 0.0) -> Tensor:
    """x / (scale + eps), and x itself where the scale is below SMALLEST_SPREAD."""
    return (x / torch.where(scale < SMALLEST_SPREAD, 1.0, scale + eps)).to(x.dtype)


# ---------------------------------------------------------------- of the whole rollout


def batch_moments(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (Bessel) of numbers x [n] over all processes: [], [] float64. NaN is left out.

    0 and 0 of nothing. A process without a prompt of its own, which holds a copy, adds nothing.
    """
    own = x.new_empty(0) if batch.filler else x[~x.isnan()]
    everyone = torch.cat(ranks.gather(own.detach().double().cpu())).to(x.device)
    mean = everyone.sum() / max(len(everyone), 1)
    return mean, ((everyone - mean).square().sum() / max(len(everyone) - 1, 1)).sqrt()


def batch_scaled(batch: Batch, reward: Tensor) -> Tensor:
    """Reward less the mean of the group, in standard deviations of all rewards of the rollout: [N] -> [N].

    Liu et al. 2025, arXiv:2508.08221 (Lite PPO).
    """
    return (centred(batch, reward) / (batch_moments(batch, reward)[1] + SPREAD_EPS)).to(reward.dtype)


def beta_normalised(lowest: float, highest: float) -> Advantage:
    """Reward, as a share of the way from lowest to highest, less the mean of the group, over a Beta density at it.

    Each group's mean p is taken as a draw from Beta(a, b), a and b by the mean and variance of p over the rollout; the
    density divided by is Beta(1 + a/3, 1 + b/3), neither parameter below 1. Beta(1, 1) leaves the rewards as they are,
    Beta(3/2, 3/2) is pi/8 of GRPO's. InputError, with the reward, if one is outside the two.
    Xiao et al. 2025, arXiv:2506.02864, and its code, github.com/changyi7231/BNPO.
    """

    def advantage(batch: Batch, reward: Tensor) -> Tensor:
        outside = reward[(reward < lowest) | (reward > highest)]
        refuse(outside, f"is not within {lowest:g} to {highest:g}; set lowest and highest to the reward's range")
        away = centred(batch, (reward.double() - lowest) / (highest - lowest))
        scale = _beta_scale(batch, reward, lowest, highest)
        return torch.where(away == 0, 0.0, away * scale).to(reward.dtype)  # a solved or failed group has density 0

    return advantage


def in_beta_densities(lowest: float, highest: float) -> Advantage:
    """Penalty less its group's mean, on the scale of `beta_normalised`; unscaled in a group of equal rewards."""

    def penalise(batch: Batch, penalty: Tensor) -> Tensor:
        scale = _beta_scale(batch, batch.score, lowest, highest) / (highest - lowest)
        equal = group_std(batch, batch.score) < SMALLEST_SPREAD
        return (centred(batch, penalty) * torch.where(equal, 1.0, scale)).to(penalty.dtype)

    return penalise


def _beta_scale(batch: Batch, reward: Tensor, lowest: float, highest: float) -> Tensor:
    """One over the Beta density of each group's mean, given to each of its completions: [N] float64."""
    share = (reward.double() - lowest) / (highest - lowest)
    p = group_means(batch, share).masked_fill(group_size(batch, share) == 0, torch.nan)  # [G]
    density = beta_density(p, *beta_parameters(*batch_moments(batch, p)))[batch.group]  # [N]
    return (1 / density).clamp(max=LARGEST_SCALE)


def beta_parameters(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Of the density that rewards are divided by, by the moments of the groups' means; 1 and 1 where all are equal."""
    spread = torch.where(std > 0, mean * (1 - mean) / std.square() - 1, 0.0)
    alpha, beta = 1 + spread * mean / 3, 1 + spread * (1 - mean) / 3
    return alpha.clamp(1, LARGEST_PARAMETER), beta.clamp(1, LARGEST_PARAMETER)


def beta_density(p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """p^(alpha - 1) (1 - p)^(beta - 1) / B(alpha, beta), element by element."""
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p) - log_beta).exp()


def refuse(wrong: Tensor, why: str) -> None:
    """InputError on every process if any has a reward among `wrong`."""
    found = [reward for share in ranks.gather(wrong.tolist()) for reward in share]
    if found:
        raise InputError(f"a reward of {found[0]:g} {why}")

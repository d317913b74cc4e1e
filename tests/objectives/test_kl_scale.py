"""By hand: what the reference takes off a reward, on the scale that a method gives the rewards themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import batch_of

from prefopt.batch import Batch, Ragged
from prefopt.objectives.advantages import (
    batch_scaled,
    beta_normalised,
    in_batch_spreads,
    in_beta_densities,
    in_group_means,
    in_group_spreads,
    normalised,
    over_mean,
)

PAIRS = [
    (normalised, in_group_spreads),
    (over_mean, in_group_means),
    (batch_scaled, in_batch_spreads),
    (beta_normalised(0.0, 2.0), in_beta_densities(0.0, 2.0)),
]
# two prompts of three completions: one that teaches, one whose rewards are equal
REWARD = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)


def batch(reward: torch.Tensor) -> Batch:
    made = batch_of("prompts", num=2)
    tokens = Ragged(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    return replace(made, completions=tokens, group=group, trained=torch.ones(6, dtype=torch.bool), score=reward)


@pytest.mark.parametrize(("advantage", "penalised"), PAIRS, ids=[p[1].__name__ for p in PAIRS])
def test_a_penalty_equal_to_the_reward_takes_the_whole_advantage_away(advantage, penalised):
    own = batch(REWARD)
    assert advantage(own, REWARD)[:3].abs().max() > 0.1
    assert torch.allclose(penalised(own, REWARD)[:3], advantage(own, REWARD)[:3], rtol=1e-12)


@pytest.mark.parametrize(
    "penalised", [p[1] for p in PAIRS if p[1] is not in_batch_spreads and p[1] is not in_group_means]
)
def test_where_rewards_are_equal_a_penalty_is_not_blown_up(penalised):
    """Its own mean is taken off and nothing divides it: a tiny beta stays a tiny pull."""
    penalty = torch.tensor([0.0, 0.0, 0.0, 1e-3, 2e-3, 3e-3], dtype=torch.float64)
    expected = torch.tensor([-1e-3, 0.0, 1e-3], dtype=torch.float64)
    assert torch.allclose(penalised(batch(REWARD), penalty)[3:], expected, rtol=1e-12, atol=1e-15)


def test_without_a_reward_anywhere_that_differs_no_method_scales_the_penalty():
    flat, penalty = batch(torch.zeros(6, dtype=torch.float64)), torch.arange(6.0, dtype=torch.float64)
    for _, penalised in PAIRS:
        assert torch.allclose(penalised(flat, penalty), torch.tensor([-1.0, 0, 1, -1, 0, 1], dtype=torch.float64))


def test_group_spreads_by_hand():
    """Rewards 0, 1, 2 have the standard deviation 1; the penalty 0, 0, 3 less its mean is -1, -1, 2."""
    penalty = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = in_group_spreads(batch(REWARD), penalty)
    assert torch.allclose(found[:3], torch.tensor([-1.0, -1.0, 2.0]).double() / 1.0001, rtol=1e-12)

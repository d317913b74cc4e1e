"""Rewards that hardly differ: the pull of the reference on their group stays of the size that it has elsewhere."""

from __future__ import annotations

import pytest
import torch

from prefopt.batch import Batch
from prefopt.objectives.advantages import (
    LARGEST_PULL,
    SPREAD_EPS,
    in_batch_spreads,
    in_beta_densities,
    in_group_means,
    in_group_spreads,
)
from prefopt.records import Example

PENALTY = torch.tensor([0.0, 0.04, -0.04, 0.08], dtype=torch.float64)  # a few nats at a beta of 0.04
CENTRED = PENALTY - 0.02


def batch(*groups: list[float]) -> Batch:
    """Prompts whose completions, of a token each, have these rewards."""
    return Batch.of([Example([1], [[1]] * len(rewards), rewards, [[True]] * len(rewards)) for rewards in groups])


@pytest.mark.parametrize("step", [3e-8, 1e-6])
@pytest.mark.parametrize("penalised", [in_group_spreads, in_batch_spreads, in_beta_densities(0.0, 1.0)])
def test_a_spread_of_rounding_leaves_the_penalty_as_it_is(penalised, step):
    own = batch([0.5, 0.5, 0.5, 0.5 + step])
    assert own.score[3] > own.score[0]  # they do differ, in float32 too
    assert torch.allclose(penalised(own, PENALTY), CENTRED, rtol=1e-12)


def test_a_mean_of_rounding_leaves_the_penalty_as_it_is():
    own = batch([0.0, 0.0, 0.0, 3e-8])
    assert torch.allclose(in_group_means(own, PENALTY), CENTRED, rtol=1e-12)


@pytest.mark.parametrize("step", [3e-6, 1e-3])
def test_a_group_of_nearly_equal_rewards_gets_ten_times_the_pull_at_most(step):
    """Beside rewards 0, 0, 1, 1: their spread within the rollout sets the largest scale."""
    both = batch([0.5, 0.5, 0.5, 0.5 + step], [0.0, 0.0, 1.0, 1.0])
    found = in_group_spreads(both, PENALTY.repeat(2))
    spread = both.score.double().std()
    assert torch.allclose(found[:4], CENTRED / (spread / LARGEST_PULL + SPREAD_EPS), rtol=1e-9)
    assert torch.allclose(found[4:], CENTRED / (both.score[4:].double().std() + SPREAD_EPS), rtol=1e-9)


def test_alone_a_small_difference_is_the_scale_of_the_penalty():
    """The optimum of one prompt with rewards 1e-3 apart is the reference tilted by them: 1e-3 / 2 is their spread."""
    found = in_group_spreads(batch([0.5, 0.5, 0.5, 0.501]), PENALTY)
    assert torch.allclose(found, CENTRED / (0.5e-3 + SPREAD_EPS), rtol=1e-4)

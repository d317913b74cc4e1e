"""Identities of the curve of best policies, which hold for every reward and reference (dR is the change of reward)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from prefopt import bench
from prefopt.bench.measures import expected, kl

BETAS = [0.05, 0.2, 0.5, 1.0, 3.0, 10.0]
every_beta = pytest.mark.parametrize("beta", BETAS)


def around(world: bench.World, beta: float) -> tuple[bench.Point, bench.Point]:
    return bench.frontier(world, beta * (1 - 1e-4)), bench.frontier(world, beta * (1 + 1e-4))


def variance(world: bench.World, logp: torch.Tensor) -> float:
    """Of the gold within a prompt under a policy, mean over prompts."""
    mean = (logp.exp() * world.gold).sum(1, keepdim=True)
    return expected(logp, (world.gold - mean).square())


@every_beta
def test_a_nat_more_buys_beta_more_reward(small: bench.World, beta: float) -> None:
    near, far = around(small, beta)
    assert (far.gold - near.gold) / (far.kl - near.kl) == pytest.approx(beta, rel=1e-5)


@every_beta
def test_reward_rises_with_one_over_beta_by_its_variance(small: bench.World, beta: float) -> None:
    near, far = around(small, beta)
    slope = (far.gold - near.gold) / (1 / (beta * (1 + 1e-4)) - 1 / (beta * (1 - 1e-4)))
    assert slope == pytest.approx(variance(small, bench.tilted(small.reference, small.gold, beta)), rel=1e-5)


def test_the_frontier_is_concave(small: bench.World) -> None:
    points = [bench.frontier(small, beta) for beta in torch.logspace(1.5, -1.5, 40).tolist()]
    slopes = [(b.gold - a.gold) / (b.kl - a.kl) for a, b in pairwise(points)]
    assert all(b.kl > a.kl and b.gold > a.gold for a, b in pairwise(points))
    assert all(later < earlier for earlier, later in pairwise(slopes))


@pytest.mark.parametrize("beta", [100.0, 1000.0])
def test_a_large_beta_gains_the_variance_over_beta(small: bench.World, beta: float) -> None:
    here, spread = bench.frontier(small, beta), variance(small, small.reference)
    assert here.gold == pytest.approx(spread / beta, rel=2 / beta)
    assert here.kl == pytest.approx(spread / (2 * beta**2), rel=2 / beta)


@every_beta
def test_a_tilted_policy_is_on_the_frontier(small: bench.World, beta: float) -> None:
    found = bench.measure(small, bench.tilted(small.reference, small.gold, beta))
    assert found.efficiency == pytest.approx(1.0, abs=1e-9)
    assert found.gap == pytest.approx(0.0, abs=1e-9)
    assert bench.best_at(small, bench.frontier(small, beta).kl) == pytest.approx(found.gold, abs=1e-9)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_best_of_n_is_below_the_frontier_and_its_distance_below_the_bound(small: bench.World, n: int) -> None:
    policy = bench.best_of(small.reference, small.gold, n)
    assert torch.allclose(policy.exp().sum(1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
    found = bench.measure(small, policy)
    assert 0.01 < found.gap and found.kl <= math.log(n) - (n - 1) / n


def test_best_of_n_by_hand() -> None:
    """Rewards 0, 1, 1 with chances 0.5, 0.3, 0.2; best of 2: 0.25 for the first, the rest 0.75 as 3 : 2."""
    policy = bench.best_of(torch.tensor([[0.5, 0.3, 0.2]]).double().log(), torch.tensor([[0.0, 1.0, 1.0]]).double(), 2)
    assert policy.exp()[0].tolist() == pytest.approx([0.25, 0.45, 0.30], abs=1e-7)


def random_policies(world: bench.World, num: int = 20) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    noise = [torch.randn(world.gold.shape, generator=random, dtype=torch.float64) for _ in range(num)]
    return [(world.reference + 0.2 * i * x).log_softmax(1) for i, x in enumerate(noise)]


def test_no_policy_is_above_the_frontier(small: bench.World) -> None:
    for policy in random_policies(small):
        found = bench.measure(small, policy)
        assert found.gap >= -1e-9 and found.best == found.gold + found.gap
        assert found.efficiency is None or found.efficiency <= 1 + 1e-9


@every_beta
def test_regret_is_what_is_missing_of_the_best_objective(small: bench.World, beta: float) -> None:
    """J(best) - J = beta KL(policy || best); J = E[gold] - beta KL(policy || reference), J(best) = beta log Z."""
    log_z = torch.logsumexp(small.reference + small.gold / beta, 1).mean()
    for policy in random_policies(small, 5):
        here = bench.point(small, policy)
        missing = float(beta * log_z) - (here.gold - beta * here.kl)
        assert bench.regret(small, policy, beta) == pytest.approx(missing, abs=1e-11)


def test_the_reference_is_at_the_origin(small: bench.World) -> None:
    found = bench.measure(small, small.reference)
    assert found.efficiency is None  # nothing to compare with
    assert [found.kl, found.forward_kl, found.gap] == [0.0, 0.0, 0.0]
    assert found.gold == pytest.approx(0.0, abs=1e-12)


def test_beyond_the_best_completion_no_distance_buys_more(small: bench.World) -> None:
    policy = torch.full_like(small.gold, -math.inf)
    policy[torch.arange(len(policy)), small.gold.argmax(1)] = 0.0
    found = bench.measure(small, policy)
    assert found.gold == pytest.approx(small.gold.amax(1).mean().item(), abs=1e-12)
    assert found.efficiency == pytest.approx(1.0, abs=1e-12) and found.entropy == 0
    assert bench.best_at(small, found.kl + 5) == pytest.approx(found.gold, abs=1e-9)
    assert math.isinf(found.forward_kl)


def test_measures_of_a_policy_by_hand(ended: bench.World) -> None:
    """All mass on the completion of no content token: its length is 1, its entropy 0, its distance -log p."""
    policy = torch.full_like(ended.gold, -math.inf)
    policy[:, 0] = 0.0
    found = bench.measure(ended, policy)
    assert ended.space.completion(0) == [3]
    assert (found.length, found.entropy) == (1.0, 0.0)
    assert found.kl == pytest.approx(-ended.reference[:, 0].mean().item(), abs=1e-12)
    assert kl(ended.reference, ended.reference) == 0.0

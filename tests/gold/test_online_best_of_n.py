"""The best of n draws as a policy, against every group of n that can be drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tabular import draws, kl
from torch import Tensor

from prefopt import bench

REFERENCE = draws(2, 5, seed=1).log_softmax(-1)
REWARD = torch.tensor([[0.3, -1.0, 2.0, 0.3, 0.7], [1.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)  # with ties


def by_groups(logp: Tensor, reward: Tensor, n: int) -> Tensor:
    """Chance [R] of each response to be the first best of n draws, summed over all R^n groups."""
    kept = torch.zeros_like(logp)
    for group in itertools.product(range(len(logp)), repeat=n):
        best = max(group, key=lambda y: float(reward[y]))  # the first of equals: each is first as often as it is drawn
        kept[best] += logp[list(group)].sum().exp()
    return kept


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_what_enumerating_every_group_gives(n: int) -> None:
    found = bench.best_of(REFERENCE, REWARD, n).exp()
    for prompt in range(2):
        assert (found[prompt] - by_groups(REFERENCE[prompt], REWARD[prompt], n)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 16, 300])
def test_without_ties_the_chance_is_a_difference_of_cumulative_powers(n: int) -> None:
    logp, reward = draws(1, 200, seed=4).log_softmax(-1), draws(1, 200, seed=5)
    order = reward[0].argsort()
    upto = logp[0, order].exp().cumsum(0)
    below = torch.cat([upto.new_zeros(1), upto[:-1]])
    assert (bench.best_of(logp, reward, n)[0, order].exp() - (upto**n - below**n)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_its_distance_is_at_most_the_bound_and_near_it_where_no_response_is_likely(n: int) -> None:
    """KL <= log n - (n - 1) / n, reached by a reward without atoms. Beirami et al. 2024, arXiv:2401.01879."""
    bound = math.log(n) - (n - 1) / n
    few = kl(bench.best_of(REFERENCE, REWARD, n), REFERENCE)
    assert few <= bound + 1e-12
    even = torch.full((1, 200), -math.log(200), dtype=torch.float64)
    many = kl(bench.best_of(even, draws(1, 200, seed=5), n), even)
    assert 0.8 * bound < many <= bound
    if n == 16:
        assert many > 0.975 * bound


def test_best_of_n_lies_below_the_frontier_of_tilted_policies() -> None:
    for n in (2, 4, 16):
        policy = bench.best_of(REFERENCE, REWARD, n)
        distance = kl(policy, REFERENCE)
        best = bench.tilted(REFERENCE, REWARD, bench.price(REFERENCE, REWARD, distance))
        assert kl(best, REFERENCE) == pytest.approx(distance, abs=1e-9)
        assert expected(best) > expected(policy) + 1e-3


def expected(logp: Tensor) -> float:
    return float((logp.exp() * REWARD).sum(1).mean())

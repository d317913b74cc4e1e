"""Rewards of 0 and 1: what a group of G teaches on average, as a weight on the gradient of the chance p of success.

GRPO          E[sqrt(k (G - k))] / (G p (1 - p)), k of G right     nears 1 / sqrt(p (1 - p)), and with Bessel's
                                                                   correction, as here, sqrt((G - 1) / G) of it
mean only     (G - 1) / G                                          the same for every p
leave one out 1
MaxRL         (1 - (1 - p)^(G - 1)) / p                            nears 1 / p, the gradient of log p
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from enumerated import Expected, Language
from tabular import logit
from torch import Tensor

from prefopt.batch import Batch
from prefopt.objectives import GRPO, RLOO, DrGRPO, MaxRL
from prefopt.rollout.groups import GroupFacts, Kinds, Range, group_metrics

BOTH = Language(2)  # a wrong text and a right one
HUGE = 1e6  # for a right text: what GRPO adds to a spread is then nothing beside it
CHANCES = [0.01, 0.1, 0.5]


def binomial(p: float, members: int) -> Tensor:
    """The chance of k of the members being right, [members + 1]."""
    return torch.tensor(
        [math.comb(members, k) * p**k * (1 - p) ** (members - k) for k in range(members + 1)], dtype=torch.float64
    )


def every_count(members: int, solved: float) -> Batch:
    """A group with each number of right texts, from none to all."""
    right = torch.arange(members) < torch.arange(members + 1)[:, None]  # [members + 1, members]
    return BOTH.batch(right.long().flatten(), members, torch.tensor([0.0, solved]))


def policy(p: float) -> Tensor:
    return torch.tensor([[0.0, logit(p)]], dtype=torch.float64)


def weight(objective: Any, p: float, members: int, solved: float = 1.0) -> float:
    """Of the gradient of p in the expected update of a group of so many, each member's share of it."""
    expected = Expected(objective, BOTH, every_count(members, solved), policy(p), share=binomial(p, members))
    return -float(expected.gradient(policy(p))[0, 1]) / members / (p * (1 - p))  # dp = p (1 - p) dlogit


def grpo(p: float, members: int) -> float:
    spread = sum(float(c) * math.sqrt(k * (members - k)) for k, c in enumerate(binomial(p, members)))
    return spread / (members * p * (1 - p))


def maxrl(p: float, members: int) -> float:
    return (1 - (1 - p) ** (members - 1)) / p


@pytest.mark.parametrize("members", [2, 4, 8, 16])
@pytest.mark.parametrize("p", CHANCES)
def test_expected_weights_are_those_of_the_binomial_sums(p: float, members: int) -> None:
    bessel = math.sqrt((members - 1) / members)
    assert weight(GRPO(), p, members, solved=HUGE) == pytest.approx(bessel * grpo(p, members), rel=1e-5)
    exact = sum(  # with the 1e-4 that is added to the spread
        float(c) * k * (members - k) / (math.sqrt(k * (members - k) / members / (members - 1)) + 1e-4)
        for k, c in enumerate(binomial(p, members))
    ) / (members**2 * p * (1 - p))
    assert weight(GRPO(), p, members) == pytest.approx(exact, abs=1e-10)
    assert weight(DrGRPO(length=1.0), p, members) == pytest.approx((members - 1) / members, abs=1e-10)
    assert weight(RLOO(beta=0.0), p, members) == pytest.approx(1.0, abs=1e-10)
    assert weight(MaxRL(), p, members) == pytest.approx(maxrl(p, members), abs=1e-10)


@pytest.mark.parametrize(
    ("p", "divided", "mean_only", "over_mean"),
    [(0.01, 2.61, 0.875, 6.79), (0.1, 2.33, 0.875, 5.22), (0.5, 1.86, 0.875, 1.98)],
)
def test_weights_of_groups_of_eight(p: float, divided: float, mean_only: float, over_mean: float) -> None:
    assert weight(GRPO(), p, 8, solved=HUGE) / math.sqrt(7 / 8) == pytest.approx(divided, abs=0.005)
    assert weight(DrGRPO(length=1.0), p, 8) == pytest.approx(mean_only, abs=1e-10)
    assert weight(MaxRL(), p, 8) == pytest.approx(over_mean, abs=0.005)


def test_large_groups_near_the_limits() -> None:
    assert weight(GRPO(), 0.5, 400) == pytest.approx(2.0, rel=5e-3)
    assert weight(MaxRL(), 0.1, 200) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("objective", [GRPO(), DrGRPO(length=1.0), RLOO(beta=0.0), MaxRL()], ids=lambda o: o.facts.name)
def test_the_mean_of_drawn_groups_is_within_four_standard_errors(objective: Any, p: float) -> None:
    groups, members = 4000, 8
    draw = torch.Generator().manual_seed(11)
    texts = (torch.rand(groups * members, generator=draw, dtype=torch.float64) < p).long()
    batch = BOTH.batch(texts, members, torch.tensor([0.0, 1.0]))
    expected = Expected(objective, BOTH, batch, policy(p), share=torch.ones(groups, dtype=torch.float64))
    credit, _ = expected.credit(policy(p))
    uphill = -credit * (texts - p) / members  # d log p(text) / d logit is 1 - p for a right one, -p for a wrong one
    each = uphill.view(groups, members).sum(1) / (p * (1 - p))
    error = float(each.std()) / math.sqrt(groups)
    assert 0 < error < 0.1
    assert abs(float(each.mean()) - weight(objective, p, members)) < 4 * error


# ---------------------------------------------------------------- groups that teach nothing


@pytest.mark.parametrize(("p", "share"), [(0.01, 0.923), (0.1, 0.430), (0.5, 0.008)])
def test_the_share_of_groups_of_eight_that_teach_nothing(p: float, share: float) -> None:
    """p^8 + (1 - p)^8: all right or all wrong."""
    for objective in (GRPO(), DrGRPO(length=1.0), RLOO(beta=0.0), MaxRL()):
        batch = every_count(8, 1.0)
        credit, _ = Expected(objective, BOTH, batch, policy(p), share=binomial(p, 8)).credit(policy(p))
        silent = ~credit.view(9, 8).ne(0).any(1)
        found = float(binomial(p, 8)[silent].sum())
        assert found == pytest.approx(p**8 + (1 - p) ** 8, abs=1e-12)
        assert found == pytest.approx(share, abs=5e-4)


def drawn(right: int, members: int) -> GroupFacts:
    """A group with so many right texts, as a rollout sees it."""
    rewards = [1.0] * right + [0.0] * (members - right)
    return GroupFacts(
        number=0,
        easier=False,
        task=list(rewards),
        values=list(rewards),
        rewards=rewards,
        parts=[{} for _ in rewards],
        lengths=[1] * members,
        finished=[True] * members,
        repeated=[0.0] * members,
        why="",
    )


@pytest.mark.parametrize("p", CHANCES)
@pytest.mark.parametrize("members", [2, 8])
def test_rollouts_count_them_apart_as_solved_and_failed(members: int, p: float) -> None:
    seen = Range()
    seen.see([0.0, 1.0])
    found = dict.fromkeys(("zero_variance/solved", "zero_variance/failed"), 0.0)
    for right, chance in enumerate(binomial(p, members)):
        metrics = group_metrics(Kinds.of([drawn(right, members)], seen), trained=0)
        found = {name: value + float(chance) * metrics[name] for name, value in found.items()}
    assert found["zero_variance/solved"] == pytest.approx(p**members, abs=1e-12)
    assert found["zero_variance/failed"] == pytest.approx((1 - p) ** members, abs=1e-12)

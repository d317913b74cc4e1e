"""Where methods on groups end, against the closed forms: what each of them optimises, and what it does not.

Responses are of one token, so that a token's KL is the response's. Rewards are float64. KL is in nats.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from enumerated import Expected, Language, ascend
from tabular import draws, kl, logit, sigmoid, tilted
from torch import Tensor

from prefopt.objectives import BNPO, CISPO, DAPO, GRPO, GSPO, RLOO, SAPO, DrGRPO, LitePPO, MaxRL

RESPONSES = 4
WORDS = Language(RESPONSES)
REFERENCE, REWARD = draws(1, RESPONSES, seed=1), draws(RESPONSES, seed=2)


def mean_only(beta: float, kl: Any) -> DrGRPO:
    """Rewards less the mean of the group, not divided by their spread."""
    return DrGRPO(beta=beta, kl=kl, length=1.0)


# ---------------------------------------------------------------- KL in the reward


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("method", ["rloo", "dr_grpo"])
def test_with_kl_in_the_reward_the_optimum_is_the_tilted_reference(method: str, beta: float, size: int) -> None:
    objective = RLOO(beta=beta) if method == "rloo" else mean_only(beta, "reward")
    expected = Expected(objective, WORDS, WORDS.groups(size, REWARD), REFERENCE)
    found = ascend(expected, rate=0.5 / (beta * size), steps=60)
    assert kl(found, tilted(REFERENCE, REWARD[None], beta)) < 1e-10
    assert expected.gradient(found).abs().max() < 1e-8
    assert kl(found, REFERENCE) > 1e-2


@pytest.mark.parametrize("kind", ["reward", "k2"])
def test_kl_as_half_the_square_in_the_loss_has_the_same_optimum_up_to_the_share_of_the_baseline(kind: str) -> None:
    """A completion is part of its own baseline: a group of G gives (G - 1) / G of the reward's gradient, and all of the
    loss term's, so that k2 pulls as G / (G - 1) beta does.
    """
    size, beta = 3, 0.5
    expected = Expected(mean_only(beta, kind), WORDS, WORDS.groups(size, REWARD), REFERENCE)
    found = ascend(expected, rate=0.5 / (beta * size), steps=80)
    price = beta if kind == "reward" else beta * size / (size - 1)
    assert kl(found, tilted(REFERENCE, REWARD[None], price)) < 1e-10


# ---------------------------------------------------------------- k3 in the loss is another objective


def hyperbolic(advantage: Tensor, beta: float) -> Tensor:
    """reference / (1 - A / beta) as a multiple of the reference, [R]."""
    assert advantage.max() < beta, "no optimum: the advantage exceeds beta"
    return 1 / (1 - advantage / beta)


@pytest.mark.parametrize("beta", [1.5, 3.0])
def test_with_k3_in_the_loss_the_optimum_is_the_reference_over_one_minus_the_advantage(beta: float) -> None:
    size = 3
    expected = Expected(mean_only(beta, "k3"), WORDS, WORDS.groups(size, REWARD), REFERENCE)
    found = ascend(expected, rate=0.5 / (beta * size), steps=300)
    probability = found.softmax(-1)[0]
    advantage = (REWARD - probability @ REWARD) * (size - 1) / size
    assert (probability - REFERENCE.softmax(-1)[0] * hyperbolic(advantage, beta)).abs().max() < 1e-8
    tilt = tilted(REFERENCE, REWARD[None], beta * size / (size - 1)).softmax(-1)
    assert (probability - tilt).abs().max() > 1e-3


COUNTS = [400, 150, 250, 200]  # an endless group, in which each response is as frequent as it is likely


def spread(reward: Tensor, share: Tensor, size: int) -> Tensor:
    """What GRPO divides by: the standard deviation with Bessel's correction, and a little, []."""
    return (share @ (reward - share @ reward) ** 2 * size / (size - 1)).sqrt() + 1e-4


@pytest.mark.parametrize("beta", [0.3, 3.0])
@pytest.mark.parametrize(
    "method", [GRPO, DAPO, GSPO, CISPO, SAPO, LitePPO, MaxRL, BNPO], ids=lambda method: method.facts.name
)
def test_whatever_divides_the_reward_with_kl_in_it_the_optimum_is_the_tilted_reference(
    method: Any, beta: float
) -> None:
    """In an endless group; rewards within 0 and 1, as two of the methods ask for."""
    share = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    reward = REWARD.sigmoid()
    optimum = tilted(share.log()[None], -reward[None], beta)  # the reference that, tilted by the reward, is `share`
    slopes = []
    for reference in (optimum, tilted(share.log()[None], -reward[None], 2 * beta)):
        batch = WORDS.repeated(COUNTS, reward)
        expected = Expected(method(beta=beta), WORDS, batch, reference, share=torch.ones(1).double())
        slopes.append(float(expected.gradient(share.log()[None]).abs().max()) / sum(COUNTS))
    assert slopes[0] < 1e-9 and slopes[1] > 1e-4


@pytest.mark.parametrize("divided", [False, True])
def test_grpos_fixed_point_in_an_endless_group_is_the_hyperbolic_one_and_not_the_tilted_one(divided: bool) -> None:
    beta, size = 3.0, sum(COUNTS)
    share = torch.tensor(COUNTS, dtype=torch.float64) / size
    advantage = REWARD - share @ REWARD
    if divided:
        advantage = advantage / spread(REWARD, share, size)
    references = {
        "hyperbolic": (share / hyperbolic(advantage, beta)).log()[None],
        "tilted": tilted(share.log()[None], -advantage[None], beta),
    }
    objective = GRPO(beta=beta, kl="k3") if divided else mean_only(beta, "k3")
    slopes = {}
    for name, reference in references.items():
        expected = Expected(objective, WORDS, WORDS.repeated(COUNTS, REWARD), reference, share=torch.ones(1).double())
        slopes[name] = float(expected.gradient(share.log()[None]).abs().max()) / size
    assert slopes["hyperbolic"] < 1e-12 and slopes["tilted"] > 1e-3


# ---------------------------------------------------------------- 0/1 rewards

BOTH = Language(2)  # a wrong response and a right one
SIZE = 200_000  # of a group that stands for an endless one


def pull(objective: Any, right: int, start: float, solved: float) -> float:
    """Towards the right response, at the policy that gives as many of SIZE; `start` is the reference's share."""
    share = torch.tensor([[SIZE - right, right]], dtype=torch.float64) / SIZE
    reference = torch.tensor([[0.0, logit(start)]], dtype=torch.float64)
    batch = BOTH.repeated([SIZE - right, right], torch.tensor([0.0, solved]))
    expected = Expected(objective, BOTH, batch, reference, share=torch.ones(1).double())
    return -float(expected.gradient(share.log())[0, 1])


def fixed_point(objective: Any, start: float, solved: float = 1.0) -> float:
    """The share of right responses at which the pull is none, and down beyond it, by the secant method."""
    last, here = SIZE // 10, SIZE // 4
    before = pull(objective, last, start, solved)
    for _ in range(20):
        now = pull(objective, here, start, solved)
        slope = (now - before) / (here - last)
        ahead = here - now / slope
        if abs(ahead - here) < 1:
            assert slope < 0
            return ahead / SIZE
        last, before, here = here, now, round(ahead)
    raise AssertionError(f"no fixed point near {here / SIZE}")


def test_grpo_with_a_true_kl_in_the_loss_amplifies_success_to_mrouehs_fixed_point() -> None:
    """p = sigmoid(logit(start) + 1 / (beta sqrt(p (1 - p)))), from 0.1 with beta 2: 0.258290; undivided 0.154828.

    Rewards of 0 and 1000 leave the divided advantage alone and make what GRPO adds to the spread negligible.
    Mroueh 2025, arXiv:2503.06639.
    """
    found = fixed_point(GRPO(beta=2.0, kl="k2"), 0.1, solved=1000.0)
    assert found == pytest.approx(0.258290, abs=1e-6)
    assert found == pytest.approx(sigmoid(logit(0.1) + 1 / (2 * math.sqrt(found * (1 - found)))), abs=1e-6)
    undivided = fixed_point(mean_only(2.0, "k2"), 0.1)
    assert undivided == pytest.approx(0.154828, abs=1e-6)
    assert undivided == pytest.approx(sigmoid(logit(0.1) + 1 / 2), abs=1e-8)


def test_grpo_with_kl_in_the_reward_ends_where_the_undivided_method_does() -> None:
    """p = sigmoid(logit(start) + 1 / beta): the spread divides reward and penalty alike, so it moves nothing."""
    found = fixed_point(GRPO(beta=2.0), 0.1)
    assert found == pytest.approx(0.154828, abs=1e-6)
    assert found == pytest.approx(sigmoid(logit(0.1) + 1 / 2), abs=1e-8)


def test_k3_leads_to_another_share_of_right_responses() -> None:
    """p (1 - A / beta) = start with A = sqrt((1 - p) / p)."""
    found = fixed_point(GRPO(beta=2.0, kl="k3"), 0.1, solved=1000.0)
    assert found * (1 - math.sqrt((1 - found) / found) / 2) == pytest.approx(0.1, abs=1e-6)
    assert abs(found - 0.258290) > 0.02


# ---------------------------------------------------------------- the spread that cancels itself


def spreads(objective: Any, reference: Tensor, reward: Tensor, steps: int, size: int = 10_000) -> list[float]:
    """The standard deviation of the reward under the policy, step by step; groups of `size` hold each response as often
    as it is likely, but for rounding.
    """
    language, logits, found = Language(len(reward)), reference, []
    for _ in range(steps):
        share = logits.softmax(-1)[0]
        found.append(float((share @ (reward - share @ reward) ** 2).sqrt()))
        batch = language.repeated((share * size).round().long().tolist(), reward)
        expected = Expected(objective, language, batch, reference, share=torch.ones(1).double())
        slope = expected.gradient(logits)[0] / batch.num_completions / share
        logits = logits - 0.5 * slope[None]
    return found


def test_divided_by_its_spread_the_reward_outgrows_a_true_kl_until_nothing_is_left_to_choose() -> None:
    """The optimum is the reference tilted by reward / (beta x spread), and the spread is that of the optimum: the
    smaller it gets, the harder the pull. Undivided, the policy stays where the same beta puts it.
    """
    beta, reference, reward = 0.5, draws(1, 4, seed=3), torch.tensor([0.9, 0.5, 0.3, 0.0]).double()
    divided = spreads(GRPO(beta=beta, kl="k2"), reference, reward, 30)
    undivided = spreads(mean_only(beta, "k2"), reference, reward, 30)
    tilt = tilted(reference, reward[None], beta).softmax(-1)[0]
    assert divided[-1] < 0.01 < 0.1 < undivided[-1]
    assert undivided[-1] == pytest.approx(float((tilt @ (reward - tilt @ reward) ** 2).sqrt()), abs=1e-4)

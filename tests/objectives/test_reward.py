"""The reward model by hand, against its analytic gradient, and against the rewards that made the preferences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives import Nothing, RewardModel
from prefopt.records import Example


def example(labels: list[float], lengths: list[int] | None = None) -> Example:
    completions = [list(range(1, length + 1)) for length in lengths or [1] * len(labels)]
    return Example([7], completions, labels, [[True] * len(c) for c in completions])


def loss_of(objective: RewardModel, batch: Batch, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return objective.loss(batch, Outputs(value.new_empty(0), value=value), Nothing())


# L(x) = ln(1 + e^-x). A score is read at the last token; what stands before it (9.0) is not.
# prompt 0: labels 0, 1       scores 0.5 (two tokens), 1.5    gap 1.0: L = 0.313262
# prompt 1: labels 2, 0, 2    scores 0.2, 0.4, -0.3           the two of label 2 are not compared;
#                                                             gaps -0.2, -0.7: L = 0.798139, 1.103186; mean 0.950663
# prompt 2: labels 3, 2, 1    scores 0.1, 0.0, 0.7            gaps 0.1, -0.6, -0.7: L = 0.644397, 1.037488, 1.103186;
#                                                             mean 0.928357
BATCH = Batch.of([example([0.0, 1.0], [2, 1]), example([2.0, 0.0, 2.0]), example([3.0, 2.0, 1.0])])
VALUE = [9.0, 0.5, 1.5, 0.2, 0.4, -0.3, 0.1, 0.0, 0.7]

BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "pairs": ({}, 2.192282),
    # ln(1 + e^-0.1 + e^0.6) = 1.315592 for the best of prompt 2, then L(-0.7); 0.313262 + 1.901325 + 2.418778
    "listwise": ({"comparison": "listwise"}, 4.633365),
    # gaps less half the labels' differences: 0.5 | -1.2, -1.7 | -0.4, -1.6, -1.2; means 0.474077, 1.665534, 1.386733
    "margin": ({"margin": 0.5}, 3.526344),
    # ln(1 + e^(0.5 - 0.1) + e^(1 + 0.6)) = 2.007523, then L(-1.2); 0.474077 + 3.331068 + 3.470806
    "listwise margin": ({"comparison": "listwise", "margin": 0.5}, 7.275951),
    # squares of sums: 4.0 | 0.36, 0.01 | 0.01, 0.64, 0.49; means 4, 0.185, 0.38: 2.192282 + 0.1 x 4.565
    "centering": ({"centering": 0.1}, 2.648782),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name):
    options, expected = BY_HAND[name]
    loss, _ = loss_of(RewardModel(**options), BATCH, torch.tensor(VALUE))
    assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_metrics_by_hand_and_the_count_is_prompts():
    _, seen = loss_of(RewardModel(), BATCH, torch.tensor(VALUE))
    assert {name: [round(v, 6) for v in x.tolist()] for name, x in seen.items()} == {
        "accuracy": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "margin": [1.0, -0.2, -0.7, 0.1, -0.6, -0.7],
        "chosen_reward": [1.5, 0.2, -0.3, 0.1, 0.1, 0.0],
        "rejected_reward": [0.5, 0.4, 0.4, 0.0, 0.7, 0.7],
        "mean_reward": [0.5, 1.5, 0.2, 0.4, -0.3, 0.1, 0.0, 0.7],
    }
    assert int(RewardModel().count(BATCH)) == 3


def test_a_completion_without_a_score_is_compared_with_none():
    with_gap = Batch.of([example([1.0, math.nan, 0.0])])
    _, seen = loss_of(RewardModel(), with_gap, torch.tensor([0.3, 5.0, 0.1]))
    assert seen["margin"].tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [math.nan, 1.0], [1.0]])
def test_a_prompt_without_a_comparison_is_refused(scores):
    batch = Batch.of([example([1.0, 0.0]), example(scores)])
    with pytest.raises(ValueError, match="prompt 1 has no two completions with different scores"):
        loss_of(RewardModel(), batch, torch.zeros(len(batch.trained)))


@pytest.mark.parametrize("shape", [(2, 1), (1,), (4,)])
def test_values_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2\]"):
        loss_of(RewardModel(), Batch.of([example([1.0, 0.0])]), torch.zeros(shape))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no score head"):
        RewardModel().loss(BATCH, Outputs(torch.zeros(9)), Nothing())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1.0}, "margin must not be negative"),
        ({"centering": math.nan}, "centering must not be negative"),
        ({"comparison": "all"}, "comparison must be pairs or listwise"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(**options)


@pytest.mark.parametrize("gap", [-2000.0, 2000.0])
@pytest.mark.parametrize("comparison", ["pairs", "listwise"])
def test_far_scores_stay_finite(gap, comparison):
    value = torch.tensor([gap, 0.0], requires_grad=True)
    loss, _ = loss_of(RewardModel(comparison=comparison), Batch.of([example([1.0, 0.0])]), value)
    loss.backward()
    assert loss.item() == pytest.approx(max(-gap, 0.0))
    assert value.grad.tolist() == ([-1.0, 1.0] if gap < 0 else [0.0, 0.0])


# ---------------------------------------------------------------- gradient and invariance


def analytic(labels: list[float], r: list[float], comparison: str, margin: float, centering: float) -> list[float]:
    """dL/dr of one prompt, from the formula, a completion at a time."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if labels[i] > labels[j]]
    grad = [0.0] * len(r)
    for i, j in pairs:
        short = margin * (labels[i] - labels[j]) - (r[i] - r[j])
        if comparison == "pairs":
            pull = 1 / (1 + math.exp(-short)) / len(pairs)
        else:  # the share of j in the choice of i among itself and all below it
            rivals = [math.exp(margin * (labels[i] - labels[k]) + r[k] - r[i]) for n, k in pairs if n == i]
            pull = math.exp(short) / (1 + sum(rivals))
        grad[i] -= pull
        grad[j] += pull
        for n in (i, j):
            grad[n] += 2 * centering * (r[i] + r[j]) / len(pairs)
    return grad


@pytest.mark.parametrize("comparison", ["pairs", "listwise"])
@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.4, 0.0), (0.4, 0.2)])
def test_gradient_is_the_analytic_one(comparison, margin, centering):
    labels, torch_seed = [2.0, -1.0, 2.0, 0.5, 3.0], torch.Generator().manual_seed(0)
    value = torch.randn(5, generator=torch_seed, dtype=torch.float64).requires_grad_()
    loss_of(RewardModel(comparison, margin, centering), Batch.of([example(labels)]), value)[0].backward()
    # labels and their differences are float32, exact here; margin times them is not
    assert value.grad.tolist() == pytest.approx(
        analytic(labels, value.tolist(), comparison, margin, centering), rel=1e-6
    )


@pytest.mark.parametrize("comparison", ["pairs", "listwise"])
def test_adding_a_number_to_all_scores_of_a_prompt_changes_nothing_unless_scores_are_centred(comparison):
    value = torch.tensor(VALUE, dtype=torch.float64)
    shifted = value + BATCH.spread(torch.tensor([3.0, -2.0, 10.0], dtype=torch.float64)[BATCH.group])
    free, held = RewardModel(comparison), RewardModel(comparison, centering=0.01)
    assert loss_of(free, BATCH, shifted)[0].item() == pytest.approx(loss_of(free, BATCH, value)[0].item(), rel=1e-12)
    assert loss_of(held, BATCH, shifted)[0] > loss_of(held, BATCH, value)[0] + 1


# ---------------------------------------------------------------- what is recovered

ITEMS = torch.tensor([0.8, -0.5, 0.1, -1.2, 0.4], dtype=torch.float64)  # rewards of five answers to one prompt


def ranking_probability(order: tuple[int, ...]) -> float:
    """Plackett-Luce: the best of what is left is chosen in proportion to e^reward."""
    left = [math.exp(ITEMS[n]) for n in order]
    return math.prod(left[k] / sum(left[k:]) for k in range(len(left)))


def weighted_slope(objective: RewardModel, batch: Batch, weight: Tensor, reward: Tensor) -> Tensor:
    """Derivative by reward [N] of the loss with weight [G] on each prompt, [N], which can be differentiated again."""
    (slope,) = torch.autograd.grad(loss_of(objective, batch, reward)[0], reward, create_graph=True)
    return slope * weight[batch.group]


@pytest.mark.parametrize("comparison", ["pairs", "listwise"])
def test_the_population_loss_is_least_at_the_rewards_that_made_the_rankings(comparison):
    """Up to a constant. Two of a ranking are in Bradley-Terry's order under the same rewards, so both find them."""
    rankings = torch.tensor(list(itertools.permutations(range(5))))  # [120, 5]
    weight = torch.tensor([ranking_probability(order) for order in rankings.tolist()], dtype=torch.float64)
    assert weight.sum().item() == pytest.approx(1.0)
    batch = Batch.of([example([4.0, 3.0, 2.0, 1.0, 0.0])] * len(rankings))

    def slope(reward: Tensor) -> Tensor:
        found = weighted_slope(RewardModel(comparison), batch, weight, reward[rankings.flatten()])
        return torch.zeros_like(reward).index_add(0, rankings.flatten(), found)

    reward = torch.zeros(5, dtype=torch.float64)
    for _ in range(8):  # Newton's steps
        curvature = torch.autograd.functional.jacobian(slope, reward)
        reward = reward - torch.linalg.pinv(curvature) @ slope(reward.requires_grad_()).detach()
        reward = reward.detach()
    assert (reward - (ITEMS - ITEMS.mean())).abs().max() < 1e-6


def test_the_error_of_a_fitted_reward_model_falls_as_fisher_information_says():
    """n x squared error -> trace of the inverse information, for n = 100,000 comparisons, over 20 draws."""
    num, draws, random = 100_000, 20, torch.Generator().manual_seed(3)
    truth = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)  # centred
    better, worse = torch.tensor(list(itertools.permutations(range(8), 2))).T  # [56] each
    share = torch.sigmoid(truth[better] - truth[worse]) / 28  # pairs are equally likely, and one order of each happens
    drawn = [torch.multinomial(share, num, True, generator=random).bincount(minlength=56) for _ in range(draws)]
    counts = torch.stack(drawn).double()  # [20, 56]
    difference = torch.eye(8, dtype=torch.float64)[better] - torch.eye(8, dtype=torch.float64)[worse]  # [56, 8]
    batch = Batch.of([example([1.0, 0.0])] * (draws * 56))

    def information(r: Tensor, weight: Tensor) -> Tensor:
        p = torch.sigmoid(difference @ r)
        return difference.T @ ((weight * p * (1 - p))[:, None] * difference)

    found = torch.zeros(draws, 8, dtype=torch.float64)
    for _ in range(8):  # Newton's steps on the objective's own gradient
        reward = torch.stack([found[:, better], found[:, worse]], 2).flatten().requires_grad_()  # [20 x 56 x 2]
        of_better = weighted_slope(RewardModel(), batch, counts.flatten(), reward).detach().view(draws, 56, 2)[:, :, 0]
        slope = of_better @ difference  # [20, 8]
        steps = [torch.linalg.pinv(information(r, c)) @ s for r, c, s in zip(found, counts, slope, strict=True)]
        found = found - torch.stack(steps)
    assert slope.abs().max() < 1e-6
    error = num * (found - truth).square().sum(1).mean()
    expected = torch.linalg.pinv(information(truth, share)).trace()
    assert error.item() == pytest.approx(expected.item(), rel=0.25)

"""IPO by hand, in both of its meanings."""

from __future__ import annotations

import pytest
import torch

from prefopt.batch import Batch, Outputs
from prefopt.loop import Models
from prefopt.objectives import IPO
from prefopt.records import Example

# Pair 0: chosen of two tokens, rejected of one; pair 1, worse first: rejected of three, the last not trained, chosen of
# one. Log-ratios of tokens: 0.5 0.5 and -1.0; 0.2 0.2 (-4.0) and -1.0.
EXAMPLES = [
    Example([7], [[1, 2], [3]], [1.0, 0.0], [[True, True], [True]]),
    Example([7], [[4, 5, 6], [1]], [0.0, 1.0], [[True, True, False], [True]]),
]
LOGP = [-1.0, -0.5, -2.0, -0.1, -0.2, -9.0, -3.0]
REFERENCE = [-1.5, -1.0, -1.0, -0.3, -0.4, -5.0, -2.0]


def by_hand(objective: IPO) -> tuple[float, dict[str, list[float]], list[float]]:
    batch, logp = Batch.of(EXAMPLES), torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    targets = objective.targets(batch, Models(lambda part: None, lambda part: reference))
    loss, seen = objective.loss(batch, Outputs(logp), targets)
    loss.backward()
    return loss.item(), {name: x.tolist() for name, x in seen.items()}, logp.grad.tolist()


def test_sums_as_in_the_paper_by_hand():
    # beta 0.5, so a margin of 1. D = 1 - (-1) = 2 and -1 - 0.4 = -1.4: (2 - 1)^2 + (-1.4 - 1)^2 = 1 + 5.76
    loss, seen, gradient = by_hand(IPO(beta=0.5))
    assert loss == pytest.approx(6.76)
    assert seen["rewards/margins"] == pytest.approx([1.0, -0.7])
    assert seen["logps/chosen"] == pytest.approx([-1.5, -3.0])
    # 2 (D - 1) on the chosen tokens, minus that on the rejected ones: past the margin a pair is pulled back
    assert gradient == pytest.approx([2.0, 2.0, -2.0, 4.8, 4.8, 0.0, -4.8])


def test_means_by_hand():
    # per token 0.5 - (-1) = 1.5 and -1 - 0.2 = -1.2: 0.5^2 + 2.2^2 = 0.25 + 4.84; a token has 1 / length of the slope
    loss, seen, gradient = by_hand(IPO(beta=0.5, log_ratio="mean"))
    assert loss == pytest.approx(5.09)
    assert seen["rewards/margins"] == pytest.approx([0.75, -0.6])
    assert seen["logps/chosen"] == pytest.approx([-1.5, -3.0])
    assert gradient == pytest.approx([0.5, 0.5, -1.0, 2.2, 2.2, 0.0, -4.4])


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_loss_is_least_at_a_difference_of_one_over_two_beta_nats(beta):
    batch = Batch.of([Example([7], [[1], [2]], [1.0, 0.0], [[True], [True]])])
    logp = torch.tensor([-1.0 + 1 / (2 * beta), -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    targets = IPO(beta).targets(batch, Models(lambda part: None, lambda part: reference))
    loss, _ = IPO(beta).loss(batch, Outputs(logp), targets)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert logp.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_loss_at_the_start_is_the_square_of_half_the_inverse_beta():
    # (1 / 0.2)^2
    assert IPO().at_start()["loss"] == pytest.approx(25.0)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        IPO(beta=beta)

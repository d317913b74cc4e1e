"""The optimum of losses without a reference on two responses, the first preferred with probability p."""

from __future__ import annotations

import math

import pytest
import torch
from tabular import duel, optimum, sigmoid

from prefopt.objectives import CPO, ORPO, SimPO

START = torch.tensor([[0.3, -0.4]], dtype=torch.float64)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_simpo_with_a_margin_is_more_confident_than_the_labels(share, margin):
    """u = beta (difference of the mean log-probs) solves p s(gamma - u) = (1 - p) s(gamma + u), a quadratic in e^u:
    e^u = [(2p - 1) + sqrt((1 - 2p)^2 + 4 p (1 - p) e^(-2 gamma))] / (2 (1 - p) e^(-gamma)).

    p = 0.6, gamma = 1: u = 0.732, where the labels' log-odds are 0.405.
    """
    lengths = [1, 3]
    found = optimum(SimPO(beta=2.0, gamma_beta_ratio=margin / 2.0), duel(share, lengths), START).log_softmax(-1)
    u = 2.0 * float(found[0, 0] / lengths[0] - found[0, 1] / lengths[1])
    shrunk = math.exp(-margin)
    root = math.sqrt((1 - 2 * share) ** 2 + 4 * share * (1 - share) * shrunk**2)
    expected = math.log(((2 * share - 1) + root) / (2 * (1 - share) * shrunk))
    assert u == pytest.approx(expected, abs=1e-8)
    if (share, margin) == (0.6, 1.0):
        assert u == pytest.approx(0.732, abs=5e-4)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_orpo_with_heavier_odds_is_less_confident_than_the_labels(share):
    """x the policy's log-odds, w the weight: s(x) - p + 2 w (s(2x) - p) = 0, for the log of the odds ratio is 2x."""
    confident = []
    for weight in (0.1, 1.0, 10.0):
        found = optimum(ORPO(odds_weight=weight), duel(share), START)
        x = float(found[0, 0] - found[0, 1])
        assert abs(sigmoid(x) - share + 2 * weight * (sigmoid(2 * x) - share)) < 1e-8
        confident.append(sigmoid(x))
    assert share > confident[0] > confident[1] > confident[2] > 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.6, 0.8])
def test_cpo_lies_between_the_likelihood_and_a_uniform_reference(share, smoothing):
    """x the policy's log-odds, w the weight: beta (s(beta x) - q) + w (s(x) - p) = 0, q = (1 - e) p + e (1 - p)."""
    found = optimum(CPO(beta=0.5, sft_weight=0.7, label_smoothing=smoothing), duel(share), START)
    x = float(found[0, 0] - found[0, 1])
    smoothed = (1 - smoothing) * share + smoothing * (1 - share)
    assert abs(0.5 * (sigmoid(0.5 * x) - smoothed) + 0.7 * (sigmoid(x) - share)) < 1e-8

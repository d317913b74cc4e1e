"""f-divergences: rewards of a log-ratio by hand, their limits, and how they behave far out."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.objectives.divergences import DIVERGENCES

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse_kl", [1.0, -1.0]),
        # 1 - e^-1, 1 - e
        ("forward_kl", [0.632121, -1.718282]),
        # ln 2 - ln(1 + e^-1), ln 2 - ln(1 + e)
        ("js", [0.379885, -0.620115]),
        # 2 (1 - e^-0.5), 2 (1 - e^0.5)
        ("alpha", [0.786939, -1.297443]),
    ],
)
def test_values_by_hand(name, expected):
    found = DIVERGENCES[name](torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5)
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


@every_divergence
def test_a_reward_starts_at_zero_and_rises_with_the_log_ratio(name):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64).requires_grad_()
    reward = DIVERGENCES[name](x, 0.5)
    reward.sum().backward()
    assert abs(reward[50].item()) < 1e-15
    assert (x.grad > 0).all()
    assert x.grad[50].item() == pytest.approx(0.5 if name == "js" else 1.0)


def test_alpha_leads_from_reverse_to_forward_kl():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    assert torch.allclose(DIVERGENCES["alpha"](x, 1e-7), DIVERGENCES["reverse_kl"](x, 0.5), atol=1e-5)
    assert torch.allclose(DIVERGENCES["alpha"](x, 1.0), DIVERGENCES["forward_kl"](x, 0.5), rtol=1e-15)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_log_ratios_stay_finite_and_one_that_is_too_low_is_pushed_up(name, dtype):
    x = torch.tensor([-1e3, -40.0, 1e3], dtype=dtype, requires_grad=True)
    reward = DIVERGENCES[name](x, 0.5)
    reward.sum().backward()
    assert torch.isfinite(reward).all()
    assert torch.isfinite(x.grad.square()).all()
    assert (x.grad[:2] > 0).all()


def test_the_exponential_is_exact_up_to_where_it_is_continued():
    x = torch.tensor([-29.9, -5.0, 0.0, 29.9])
    assert torch.equal(1 - DIVERGENCES["forward_kl"](x, 0.5), 1 - (1 - (-x).exp()))


@pytest.mark.parametrize("name", ["forward_kl", "alpha"])
def test_the_gradient_is_not_lost_in_float32(name):
    """e^-x and e^(-x / 2). A tangent of slope e^30 that is added and taken off again would leave nothing of them."""
    x = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    DIVERGENCES[name](x, 0.5).sum().backward()
    assert x.grad.tolist() == pytest.approx([math.exp(-v if name == "forward_kl" else -v / 2) for v in (-3, 0, 2)])

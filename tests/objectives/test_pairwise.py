"""The losses of two rewards: by hand, against their derivatives, at their symmetries, and far out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives import pairwise
from prefopt.objectives.pairwise import LOSSES, Settings
from prefopt.records import Example

SETTINGS = Settings(beta=0.5, label_smoothing=0.1, drift=torch.tensor(0.1, dtype=torch.float64))
every_loss = pytest.mark.parametrize("name", LOSSES)


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Rewards (0.5, -0.5), so D = 1, and (-0.5, 0.2), so D = -0.7. With L(x) = -log s(x) = ln(1 + e^-x):
# L(1) = 0.313262, L(-1) = 1.313262, L(0.7) = 0.403186, L(-0.7) = 1.103186, L(0.5) = 0.474077, L(-0.5) = 0.974077,
# L(-0.2) = 0.798139; s(1) = 0.731059, s(0.7) = 0.668188, s(0.5) = 0.622459, s(0.2) = 0.549834. e = 0.1, beta = 0.5.
BY_HAND = {
    # 0.9 x 0.313262 + 0.1 x 1.313262;  0.9 x 1.103186 + 0.1 x 0.403186
    "sigmoid": (0.413262, 1.033186),
    # (0.9 x 0.313262 - 0.1 x 1.313262) / 0.8;  (0.9 x 1.103186 - 0.1 x 0.403186) / 0.8
    "robust": (0.188262, 1.190686),
    "hinge": (0.0, 1.7),
    # s(D) (-L(D) - ln 0.9) + s(-D) (-L(-D) - ln 0.1):
    # 0.731059 (-0.313262 + 0.105361) + 0.268941 (-1.313262 + 2.302585)
    # 0.331812 (-1.103186 + 0.105361) + 0.668188 (-0.403186 + 2.302585)
    "exo": (0.114081, 0.938066),
    # 0.474077 + (0.974077 + 0.474077) / 2;  0.974077 + (0.474077 + 0.798139) / 2
    "nca": (1.198154, 1.610185),
    # s(-0.5) + s(-0.5);  s(0.5) + s(0.2)
    "apo_zero": (0.755081, 1.172293),
    # s(0.5) + s(-1);  s(-0.5) + s(0.7)
    "apo_down": (0.891400, 1.045728),
    # (0 + 0) / 0.25;  (1 + 0.49) / 0.25
    "sppo": (0.0, 5.96),
    # drift 0.1: L(0.4) + L(0.6);  L(-0.6) + L(-0.1)
    "bco": (0.950503, 1.781885),
    # s(20) = 1: e^-1;  s(-14) = 8e-7: L(-0.7)
    "discopop": (0.367879, 1.103187),
}


@every_loss
def test_values_by_hand(name):
    found = LOSSES[name].function(wide(0.5, -0.5), wide(-0.5, 0.2), SETTINGS)
    assert found.tolist() == pytest.approx(BY_HAND[name], abs=2e-6)


def test_discopop_between_its_two_regimes_by_hand():
    # D = 0.01: m = s(0.2) = 0.549834, L(0.01) = 0.688160, e^-0.01 = 0.990050:
    # 0.450166 x 0.688160 + 0.549834 x 0.990050
    assert pairwise.discopop(wide(0.01), wide(0.0), SETTINGS).item() == pytest.approx(0.854149, abs=2e-6)


def test_exo_without_label_smoothing_has_a_share_of_one_in_a_thousand():
    plain, told = (pairwise.exo(wide(0.5), wide(-0.5), Settings(label_smoothing=share)) for share in (0.0, 0.001))
    assert plain.item() == told.item()


# ---------------------------------------------------------------- derivatives


def s(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def bell(x: Tensor) -> Tensor:
    return s(x) * s(-x)


def of_margin(slope: Tensor) -> tuple[Tensor, Tensor]:
    return slope, -slope


def derivatives(name: str, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Of each loss with respect to the chosen and the rejected reward, worked out on paper."""
    d, e, drift = w - r, SETTINGS.label_smoothing, SETTINGS.drift
    m, tau = s(d / 0.05), 0.05
    return {
        "sigmoid": of_margin(-((1 - e) * s(-d) - e * s(d))),
        "robust": of_margin(-((1 - e) * s(-d) + e * s(d)) / (1 - 2 * e)),
        "hinge": of_margin(-(d < 1).double()),
        "exo": of_margin(bell(d) * (d - math.log((1 - e) / e))),
        "nca": (-s(-w) + 0.5 * s(w), 0.5 * s(r)),
        "apo_zero": (-bell(w), bell(r)),
        "apo_down": (bell(w) - bell(d), bell(d)),
        "sppo": (2 * (w - 0.5) / 0.25, 2 * (r + 0.5) / 0.25),
        "bco": (-s(drift - w), s(r - drift)),
        "discopop": of_margin(-(1 - m) * s(-d) - m * (-d).exp() + bell(d / tau) / tau * ((-d).exp() + s(d).log())),
    }[name]


@every_loss
def test_gradient_is_the_derivative_worked_out_on_paper(name):
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    LOSSES[name].function(chosen, rejected, SETTINGS).sum().backward()
    for found, expected in zip((chosen.grad, rejected.grad), derivatives(name, chosen, rejected), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.4])
@pytest.mark.parametrize("name", ["sigmoid", "exo"])
def test_smoothed_losses_are_least_where_the_policy_is_as_sure_as_the_labels(name, share):
    chosen = wide(math.log((1 - share) / share)).requires_grad_()
    LOSSES[name].function(chosen, wide(0.0), Settings(label_smoothing=share)).backward()
    assert abs(chosen.grad.item()) < 1e-12


@pytest.mark.parametrize("share", [0.05, 0.3, 0.45])
def test_the_robust_loss_is_unbiased_under_flipped_labels(share):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 100, dtype=torch.float64) * 3
    settings = Settings(label_smoothing=share)
    kept, flipped = pairwise.robust(chosen, rejected, settings), pairwise.robust(rejected, chosen, settings)
    clean = pairwise.sigmoid(chosen, rejected, Settings())
    assert torch.allclose((1 - share) * kept + share * flipped, clean, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("nca", "apo_down", "bco")])
def test_negating_and_swapping_the_rewards_changes_nothing(name):
    """What is asked of the chosen reward is asked of the negative rejected one; nca and apo_down treat them unlike."""
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64)
    function = LOSSES[name].function
    assert torch.allclose(function(chosen, rejected, SETTINGS), function(-rejected, -chosen, SETTINGS), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.of_margin])
def test_losses_of_the_margin_read_nothing_else(name):
    function = LOSSES[name].function
    here, shifted = function(wide(0.7), wide(-0.2), SETTINGS), function(wide(3.7), wide(2.8), SETTINGS)
    assert here.item() == pytest.approx(shifted.item(), rel=1e-12)


def test_swapping_a_pair_is_trusting_its_label_the_other_way_round():
    left = pairwise.sigmoid(wide(0.7), wide(-0.2), Settings(label_smoothing=0.3))
    right = pairwise.sigmoid(wide(-0.2), wide(0.7), Settings(label_smoothing=0.7))
    assert left.item() == pytest.approx(right.item(), rel=1e-12)


# ---------------------------------------------------------------- far out


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(500.0, -500.0), (-500.0, 500.0), (1e3, 0.0), (0.0, 1e3)])
def test_far_rewards_have_a_finite_loss_and_gradient(name, dtype, chosen, rejected):
    better, worse = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected))
    loss = LOSSES[name].function(better, worse, SETTINGS._replace(drift=torch.zeros((), dtype=dtype)))
    loss.backward()
    assert loss.dtype == dtype
    assert torch.isfinite(torch.stack([loss, better.grad, worse.grad])).all()


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "discopop"])
def test_a_hopeless_pair_keeps_its_gradient(name):
    chosen = torch.tensor([-1e3], requires_grad=True)
    LOSSES[name].function(chosen, torch.zeros(1), SETTINGS).backward()
    assert chosen.grad.item() < -0.79  # cDPO: -(1 - e) + e x 0; the others -1 or more


# ---------------------------------------------------------------- lengths and likelihood


def batch_of(*completions: tuple[list[int], list[bool]]) -> Batch:
    """One prompt, better completion first."""
    return Batch.of([Example([1], [c for c, _ in completions], [1.0, 0.0], [flags for _, flags in completions])])


def test_the_tail_is_counted_in_trained_tokens():
    batch = batch_of(([5, 6, 7, 8], [True, False, True, True]), ([5, 6], [True, True]))
    assert pairwise.lengths(batch).tolist() == [3, 2]
    # trained tokens 1, 2, 3 of the first; only the third is past the second completion's two
    assert pairwise.beyond_shorter(batch).tolist() == [False, False, False, True, False, False]


def test_likelihood_by_hand():
    batch = batch_of(([5, 6], [True, True]), ([5, 6], [True, False]))
    out = Outputs(wide(-1.0, -0.5, -2.0, -9.0).requires_grad_(), collision=wide(-0.9, -0.3, -1.5, 0.0))
    # means of log p - collision: (-0.1 - 0.2) / 2 = -0.15, and -0.5: e^-0.65 = 0.522046
    found = pairwise.likelihood(batch, out)
    assert found.tolist() == pytest.approx([0.522046], abs=2e-6)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="collision=True"):
        pairwise.likelihood(batch, out._replace(collision=None))

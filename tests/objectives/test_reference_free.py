"""SimPO, CPO and ORPO by hand, with the gradients worked out on paper, far from and near to certainty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from prefopt.batch import Batch, Outputs
from prefopt.objectives import CPO, ORPO, Nothing, SimPO
from prefopt.objectives.orpo import log1mexp, log_odds
from prefopt.records import Example


def pair(first: list[int], second: list[int], scores: tuple[float, float], trained: Any = None) -> Example:
    flags = trained or [[True] * len(first), [True] * len(second)]
    return Example([7], [first, second], list(scores), flags)


# Two pairs.                      logp of tokens       sum    mean
# pair 0: chosen   [1, 2]         -1.0 -0.5           -1.5   -0.75
#         rejected [3]            -2.0                -2.0   -2.0
# pair 1: rejected [4, 5, 6]      -0.1 -0.2 (-9.0)    -0.3   -0.15     (-9.0): not trained
#         chosen   [1]            -3.0                -3.0   -3.0
BY_HAND = [
    pair([1, 2], [3], (1.0, 0.0)),
    pair([4, 5, 6], [1], (0.0, 1.0), [[True, True, False], [True]]),
]
LOGP = [-1.0, -0.5, -2.0, -0.1, -0.2, -9.0, -3.0]
LENGTHS = [2, 2, 1, 2, 2, math.inf, 1]  # trained tokens of each token's completion
CHOSEN, TRAINED = [1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0, 1]
MEAN = [(-0.75, -2.0), (-3.0, -0.15)]


def both(objective: Any, logp: list[float] = LOGP) -> tuple[float, list[float], dict[str, list[float]]]:
    """Loss, its gradient by token, and metrics, on the rows above."""
    x = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss, seen = objective.loss(Batch.of(BY_HAND), Outputs(x), Nothing())
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad.tolist(), {name: [round(v, 6) for v in value.tolist()] for name, value in seen.items()}


def s(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def by_token(pairs: list[tuple[float, float]]) -> list[float]:
    """A coefficient of the chosen and of the rejected completion of each pair, given to their trained tokens."""
    (chosen, rejected), (other_chosen, other_rejected) = pairs
    return [chosen, chosen, rejected, other_rejected, other_rejected, 0.0, other_chosen]


# SimPO, beta 2, ratio 0.5: 2 (-0.75 + 2 - 0.5) = 1.5 and 2 (-3 + 0.15 - 0.5) = -6.7
# -log s = ln(1 + e^-1.5) = 0.201413 and ln(1 + e^6.7) = 6.701230; with sft_weight 0.1: + 0.1 (0.75 + 3) = 0.375
# CPO, beta 0.5: margins 0.25 and -1.35, -log s = 0.575939 and 1.580509; nll 0.75 + 3
# smoothed by 0.2: + 0.2 (0.25 - 1.35) = -0.22, since -log s(-x) = -log s(x) + x
# ORPO: log-odds of m = m - ln(1 - e^m): -0.75 -> -0.110647, -2 -> -1.854587, -3 -> -2.948931, -0.15 -> 1.821183
# odds 1.743940 and -4.770113; -log s 0.161124 and 4.778557; nll 3.75 + 0.5 of their sum 4.939681
CASES = {
    "simpo": (SimPO(beta=2.0, gamma_beta_ratio=0.5), 6.902643),
    "simpo with likelihood": (SimPO(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1), 7.277643),
    "cpo": (CPO(beta=0.5, sft_weight=1.0), 5.906448),
    "cpo, smoothed": (CPO(beta=0.5, sft_weight=0.0, label_smoothing=0.2), 1.936448),
    "orpo": (ORPO(odds_weight=0.5), 6.219840),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_by_hand(name):
    objective, expected = CASES[name]
    assert both(objective)[0] == pytest.approx(expected, abs=2e-6)
    assert int(objective.count(Batch.of(BY_HAND))) == 2


def paper_simpo(objective: SimPO) -> list[float]:
    credit = []
    for chosen, rejected in MEAN:
        push = objective.beta * s(-objective.beta * (chosen - rejected - objective.gamma_beta_ratio))
        credit.append((-push - objective.sft_weight, push))
    return [x / length for x, length in zip(by_token(credit), LENGTHS, strict=True)]


def paper_cpo(objective: CPO) -> list[float]:
    credit = []
    for chosen, rejected in [(-1.5, -2.0), (-3.0, -0.3)]:
        margin, flipped = objective.beta * (chosen - rejected), objective.label_smoothing
        push = objective.beta * ((1 - flipped) * s(-margin) - flipped * s(margin))
        credit.append((-push, push))
    likelihood = [objective.sft_weight * mine / length for mine, length in zip(CHOSEN, LENGTHS, strict=True)]
    return [x - y for x, y in zip(by_token(credit), likelihood, strict=True)]


def paper_orpo(objective: ORPO) -> list[float]:
    def odds(mean: float) -> float:
        return mean - math.log(1 - math.exp(mean))

    credit = []
    for chosen, rejected in MEAN:
        push = objective.odds_weight * s(odds(rejected) - odds(chosen))
        credit.append((-1 - push / (1 - math.exp(chosen)), push / (1 - math.exp(rejected))))
    return [x / length for x, length in zip(by_token(credit), LENGTHS, strict=True)]


PAPER: dict[type, Any] = {SimPO: paper_simpo, CPO: paper_cpo, ORPO: paper_orpo}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_coefficient_on_paper(name):
    objective = CASES[name][0]
    assert both(objective)[1] == pytest.approx(PAPER[type(objective)](objective), rel=1e-6)


def test_metrics_by_hand():
    shared = {"rewards/accuracies": [1.0, 0.0], "logps/chosen": [-1.5, -3.0], "logps/rejected": [-2.0, -0.3]}
    simpo, cpo, orpo = (both(CASES[name][0])[2] for name in ("simpo", "cpo", "orpo"))
    for found in (simpo, cpo, orpo):
        assert {name: found[name] for name in shared} == shared
        assert found["nll"] == [0.75, 3.0]
    assert (simpo["rewards/chosen"], simpo["rewards/rejected"]) == ([-1.5, -6.0], [-4.0, -0.3])
    assert (cpo["rewards/chosen"], cpo["rewards/margins"]) == ([-0.75, -1.5], [0.25, -1.35])
    assert (orpo["rewards/chosen"], orpo["rewards/rejected"]) == ([-0.375, -1.5], [-1.0, -0.075])
    assert orpo["log_odds_chosen"] == pytest.approx([1.743940, -4.770113], abs=2e-6)


@pytest.mark.parametrize("objective", [SimPO(gamma_beta_ratio=0.0), CPO(sft_weight=0.0)])
def test_losses_of_a_pair_and_of_the_pair_swapped_differ_by_their_margin(objective):
    """-log s(x) - -log s(-x) = -x: what is pushed up on one side is pushed down on the other."""
    logp = torch.tensor(LOGP, dtype=torch.float64)
    swapped = [Example(e.prompt, e.completions, e.scores[::-1], e.trained) for e in BY_HAND]
    loss, seen = objective.loss(Batch.of(BY_HAND), Outputs(logp), Nothing())
    other, _ = objective.loss(Batch.of(swapped), Outputs(logp), Nothing())
    assert float(loss - other) == pytest.approx(-float(seen["rewards/margins"].sum()), rel=1e-12)


def test_conservative_cpo_stops_at_the_log_odds_of_its_trust():
    """beta (L_w - L_l) = logit(1 - 0.2) = ln 4: no credit on either side."""
    gap = math.log(4) / 0.5
    x = torch.tensor([-1.0, -1.0 - gap], dtype=torch.float64, requires_grad=True)
    objective = CPO(beta=0.5, sft_weight=0.0, label_smoothing=0.2)
    objective.loss(Batch.of([pair([1], [2], (1.0, 0.0))]), Outputs(x), Nothing())[0].backward()
    assert x.grad is not None and x.grad.abs().max() < 1e-15


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("objective", [SimPO(), CPO(), ORPO()])
@pytest.mark.parametrize("logp", [(-1e3, -1e-3), (-1e-3, -1e3), (-1e-8, -1e-8), (0.0, -5.0), (-5.0, 0.0), (0.0, 0.0)])
def test_loss_and_gradient_are_finite_however_sure_the_policy_is(objective, logp):
    x = torch.tensor(logp, requires_grad=True)
    loss, _ = objective.loss(Batch.of([pair([1], [2], (1.0, 0.0))]), Outputs(x), Nothing())
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


# mean log-probs from near certainty to what is beyond float32's smallest probability
NEAR_HALF = [-math.log(2) * (1 + d) for d in (-1e-3, 0.0, 1e-3)]
GRID = [*(-(10.0**e) for e in range(-8, 2)), *NEAR_HALF, -50.0, -88.0, -110.0]


@pytest.mark.parametrize("mean", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact(mean, dtype):
    """Against 50 digits; with log1p(-exp(m)) in float32 the log-odds of m = -1e-8 would be infinite, not 18.42."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    m = Decimal(float(torch.tensor(mean, dtype=dtype)))
    exact = float(m - (1 - m.exp()).ln())
    x = torch.tensor(mean, dtype=dtype, requires_grad=True)
    found = log_odds(x)
    found.backward()
    # 1 - exp(m) is near 1 / 2 where the log-odds cross 0: there the error is absolute
    assert found.item() == pytest.approx(exact, rel=1e-5, abs=1e-6 if abs(exact) < 0.1 else 0)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(float(1 / (1 - m.exp())), rel=1e-5)


def test_log1mexp_by_hand():
    # 1 - 1/2, 1 - 1/4 and 1 - 3/4
    x = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64).log()
    assert log1mexp(x).exp().tolist() == pytest.approx([0.5, 0.75, 0.25], rel=1e-14)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SimPO, {"beta": 0.0}, "beta must be above 0, got 0.0"),
        (SimPO, {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio must not be negative, got -0.1"),
        (SimPO, {"sft_weight": math.nan}, "sft_weight must not be negative, got nan"),
        (CPO, {"beta": -1.0}, "beta must be above 0, got -1.0"),
        (CPO, {"sft_weight": -1.0}, "sft_weight must not be negative, got -1.0"),
        (CPO, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        (ORPO, {"odds_weight": -0.1}, "odds_weight must not be negative, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("objective", [SimPO(), CPO(), ORPO()])
def test_log_probs_of_the_wrong_shape_and_ties_are_refused(objective):
    batch = Batch.of([pair([1], [2], (1.0, 0.0))])
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2\]"):
        objective.loss(batch, Outputs(torch.zeros(2, 1)), Nothing())
    with pytest.raises(ValueError, match="prompt 0 has tied or missing scores"):
        objective.loss(Batch.of([pair([1], [2], (0.5, 0.5))]), Outputs(torch.zeros(2)), Nothing())

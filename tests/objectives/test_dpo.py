"""DPO by hand: its losses, options and targets, on numbers that a reader can check."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from prefopt.batch import Batch, Outputs, parts
from prefopt.loop import Models
from prefopt.objectives import DPO
from prefopt.objectives.facts import extras
from prefopt.objectives.pairwise import LOSSES, Reference
from prefopt.records import Example


def pair(first: list[int], second: list[int], scores: tuple[float, float], trained: Any = None) -> Example:
    flags = trained or [[True] * len(first), [True] * len(second)]
    return Example([7], [first, second], list(scores), flags)


# Two pairs, beta 0.5.            logp of tokens      sum    reference   log-ratio   reward
# pair 0: chosen   [1, 2]         -1.0 -0.5          -1.5      -2.5         1.0        0.5
#         rejected [3]            -2.0               -2.0      -1.0        -1.0       -0.5
# pair 1: rejected [4, 5, 6]      -0.1 -0.2 (-9.0)   -0.3      -0.7         0.4        0.2     (-9.0): not trained
#         chosen   [1]            -3.0               -3.0      -2.0        -1.0       -0.5
# margins 1.0 and -0.7; losses ln(1 + e^-1) = 0.313262 and ln(1 + e^0.7) = 1.103186; sum 1.416448
BY_HAND = [
    pair([1, 2], [3], (1.0, 0.0)),
    pair([4, 5, 6], [1], (0.0, 1.0), [[True, True, False], [True]]),
]
LOGP = [-1.0, -0.5, -2.0, -0.1, -0.2, -9.0, -3.0]
REFERENCE = [-2.5, -1.0, -0.7, -2.0]


def test_loss_and_metrics_by_hand():
    batch, logp = Batch.of(BY_HAND), torch.tensor(LOGP, requires_grad=True)
    loss, seen = DPO(beta=0.5).loss(batch, Outputs(logp), Reference(torch.tensor(REFERENCE)))
    assert loss.item() == pytest.approx(1.416448, abs=2e-6)
    found = {name: [round(v, 6) for v in x.tolist()] for name, x in seen.items()}
    assert found == {
        "rewards/chosen": [0.5, -0.5],
        "rewards/rejected": [-0.5, 0.2],
        "rewards/margins": [1.0, -0.7],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-1.5, -3.0],
        "logps/rejected": [-2.0, -0.3],
    }
    loss.backward()
    # -beta * sigmoid(-margin) on every trained token of the chosen, plus the same on the rejected
    first, second = 0.5 / (1 + math.e), 0.5 / (1 + math.exp(-0.7))
    assert logp.grad.tolist() == pytest.approx([-first, -first, first, second, second, 0.0, -second])


def test_targets_are_sums_over_trained_tokens_and_the_count_is_pairs():
    batch = Batch.of(BY_HAND)
    models = Models(lambda part: None, lambda part: torch.tensor(LOGP))
    assert DPO().targets(batch, models).logp.tolist() == pytest.approx([-1.5, -2.0, -0.3, -3.0])
    assert int(DPO().count(batch)) == 2


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_far_margins_stay_finite(margin):
    logp = torch.tensor([margin, 0.0], requires_grad=True)
    batch = Batch.of([pair([1], [2], (1.0, 0.0))])
    loss, _ = DPO(beta=1.0).loss(batch, Outputs(logp), Reference(torch.zeros(2)))
    loss.backward()
    assert loss.item() == pytest.approx(max(-margin, 0.0))
    assert logp.grad[0].item() == (-1.0 if margin < 0 else 0.0)


@pytest.mark.parametrize("shape", [(2, 1), (1,), (4,)])
def test_log_probs_of_the_wrong_shape_are_refused(shape):
    batch = Batch.of([pair([1], [2], (1.0, 0.0))])
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2\]"):
        DPO().loss(batch, Outputs(torch.zeros(shape)), Reference(torch.zeros(2)))


@pytest.mark.parametrize("scores", [(0.5, 0.5), (float("nan"), 1.0)])
def test_ties_and_unscored_completions_are_refused(scores):
    batch = Batch.of([pair([1], [2], (1.0, 0.0)), pair([1], [2], scores)])
    with pytest.raises(ValueError, match="prompt 1 has tied or missing scores"):
        DPO().loss(batch, Outputs(torch.zeros(4)), Reference(torch.zeros(4)))


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        DPO(beta=beta)


# ---------------------------------------------------------------- options

# The reference's log-probs of the tokens of BY_HAND; their sums are REFERENCE. Log-ratios of tokens, with (-4.0) not
# trained: chosen 0.5 0.5, rejected -1.0; rejected 0.2 0.2 (-4.0), chosen -1.0.
REFERENCE_TOKENS = [-1.5, -1.0, -1.0, -0.3, -0.4, -5.0, -2.0]
# log p - collision: chosen -0.1 -0.2, rejected -0.5; rejected -0.1 -0.2 (-9.0), chosen -1.0
COLLISION = [-0.9, -0.3, -1.5, 0.0, 0.0, 0.0, -2.0]

# With L(x) = ln(1 + e^-x) and beta 0.5 as above; rewards (0.5, -0.5) and (-0.5, 0.2), L(1) + L(-0.7) = 1.416448.
OPTIONS = {
    # 0.9 (L(1) + L(-0.7)) + 0.1 (L(-1) + L(0.7))
    "conservative": ({"label_smoothing": 0.1}, 1.446448),
    # log-ratios per token 0.5, -1 and -1, 0.2: L(0.75) + L(-0.6)
    "mean": ({"log_ratio": "mean"}, 1.424359),
    # 1 - e^-x of log-ratios 1, -1 and -1, 0.4: 0.632121, -1.718282 and -1.718282, 0.329680: L(1.175201) + L(-1.023981)
    "forward_kl": ({"f_divergence": "forward_kl"}, 1.599927),
    # ln 2 - L(x): 0.379885, -0.620115 and -0.620115, 0.180132: L(0.5) + L(-0.400123)
    "js": ({"f_divergence": "js"}, 1.387166),
    # 2 (1 - e^(-x/2)): 0.786939, -1.297443 and -1.297443, 0.362538: L(1.042191) + L(-0.829990)
    "alpha": ({"f_divergence": "alpha"}, 1.493977),
    # lengths 2, 1 and 1, 2: L(1 + 0.1) + L(-0.7 - 0.1)
    "length": ({"length_penalty": 0.1}, 1.458436),
    # the second token of the longer one counts half: log-ratios 0.75, -1 and -1, 0.3: L(0.875) + L(-0.65)
    "tail": ({"tail_weight": 0.5}, 1.418500),
    # only the second pair's chosen completion fell, by a reward of 0.5: L(1) + L(-0.7 - 2 x 0.5)
    "drop": ({"drop_penalty": 2.0}, 2.181048),
    # weights e^(-0.15 - 0.5) and e^(-1 - 0.15): 0.522046 x L(1) + 0.316637 x L(-0.7)
    "wpo": ({"weighting": "wpo"}, 0.512846),
    # chosen NLL per token 0.75 and 3: 1.416448 + 2 x 3.75
    "sft": ({"sft_weight": 2.0}, 8.916448),
    # drift: (0.5 - 0.5 - 0.5 + 0.2) / 4 = -0.075; bco: L(0.575) + L(0.425) + L(-0.425) + L(-0.275) = 2.717604
    "weighted": ({"loss_type": {"sigmoid": 0.8, "bco": 0.2}}, 1.676679),
}


def by_hand(objective: DPO) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, metrics and the gradient with respect to the log-probs of BY_HAND, by the objective's own targets."""
    batch, logp = Batch.of(BY_HAND), torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    wide = torch.tensor([LOGP, REFERENCE_TOKENS, COLLISION], dtype=torch.float64)
    models = Models(lambda part: Outputs(wide[0]), lambda part: wide[1])
    loss, seen = objective.loss(batch, Outputs(logp, collision=wide[2]), objective.targets(batch, models))
    loss.backward()
    return loss.detach(), seen, logp.grad


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_by_hand(name):
    options, expected = OPTIONS[name]
    loss, seen, _ = by_hand(DPO(beta=0.5, **options))
    assert loss.item() == pytest.approx(expected, abs=2e-6)
    assert seen["logps/chosen"].tolist() == pytest.approx([-1.5, -3.0])


def test_penalties_change_the_loss_and_not_the_rewards_that_are_logged():
    plain, penalised = (by_hand(DPO(0.5, **more))[1] for more in ({}, {"drop_penalty": 2.0, "length_penalty": 0.1}))
    assert plain.keys() == penalised.keys()
    assert all(torch.equal(plain[name], penalised[name]) for name in plain)


def test_the_weights_of_pairs_carry_no_gradient():
    plain, weighted = by_hand(DPO(0.5))[2], by_hand(DPO(0.5, weighting="wpo"))[2]
    assert (weighted / plain)[[0, 1, 2]].tolist() == pytest.approx([math.exp(-0.65)] * 3)
    assert (weighted / plain)[[3, 4, 6]].tolist() == pytest.approx([math.exp(-1.15)] * 3)


def test_the_drift_is_of_the_whole_update_whatever_part_is_scored():
    batch, policy, reference = Batch.of(BY_HAND), torch.tensor(LOGP), torch.tensor(REFERENCE_TOKENS)
    objective = DPO(beta=0.5, loss_type="bco")
    targets = objective.targets(batch, Models(lambda part: Outputs(policy), lambda part: reference))
    assert [float(goal.drift) for _, goal in parts(batch, targets, 1)] == pytest.approx([-0.075, -0.075])
    assert objective.targets(batch, Models(lambda part: Outputs(reference), lambda part: reference)).drift == 0


def test_tokens_beyond_the_shorter_completion_may_be_left_out():
    assert by_hand(DPO(0.5, tail_weight=0.0))[2][[1, 4]].tolist() == [0.0, 0.0]


def test_length_is_credited_such_that_a_larger_penalty_asks_less_of_longer_chosen_completions():
    """beta log-ratio + penalty x length is what the data prefer by: a longer chosen completion needs less log-ratio."""
    plain, penalised = by_hand(DPO(0.5))[2], by_hand(DPO(0.5, length_penalty=0.5))[2]
    assert abs(penalised[0]) < abs(plain[0])  # chosen is longer
    assert abs(penalised[6]) > abs(plain[6])  # chosen is shorter


@pytest.mark.parametrize("loss_type", LOSSES)
def test_credit_of_a_token_is_beta_times_the_derivative_of_the_loss(loss_type):
    """beta dL/dr(w) on every trained token of the chosen completion and beta dL/dr(l) on the rejected one's."""
    smoothing = 0.1 if LOSSES[loss_type].smoothed else 0.0
    objective = DPO(beta=0.5, loss_type=loss_type, label_smoothing=smoothing)
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ((0.5, -0.5), (-0.5, 0.2)))
    objective.compare(chosen, rejected, torch.tensor(-0.075, dtype=torch.float64)).sum().backward()
    (w0, w1), (l0, l1) = 0.5 * chosen.grad, 0.5 * rejected.grad
    expected = torch.stack([w0, w0, l0, l1, l1, torch.zeros_like(l1), w1])
    assert torch.allclose(by_hand(objective)[2], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"loss_type": "hinge"}, {"log_ratio": "mean"}, {"label_smoothing": 0.2}])
def test_swapping_the_scores_of_a_pair_turns_the_first_step_round(options):
    batch = Batch.of([pair([1, 2], [3], (1.0, 0.0))])
    found = []
    for scores in (batch.score, 1 - batch.score):
        logp = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
        one = dataclasses.replace(batch, score=scores)
        targets = DPO(**options).targets(one, Models(lambda part: None, lambda part, now=logp: now.detach()))
        DPO(**options).loss(one, Outputs(logp), targets)[0].backward()
        found.append(logp.grad)
    assert torch.equal(found[0], -found[1])
    assert (found[0] != 0).all()


# exo: KL of (1/2, 1/2) from (0.999, 0.001): -ln 2 - ln(0.999 x 0.001) / 2
AT_START = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "exo": -math.log(2) - 0.5 * math.log(0.000999),
    "nca": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo": 2 * 5.0**2,
    "bco": 2 * math.log(2),
    "discopop": 0.5 * math.log(2) + 0.5,
}


@pytest.mark.parametrize("loss_type", AT_START)
def test_loss_at_the_start_by_hand(loss_type):
    assert DPO(loss_type=loss_type).at_start()["loss"] == pytest.approx(AT_START[loss_type], rel=1e-12)


def test_losses_at_the_start_that_label_smoothing_or_a_sum_change():
    ln2 = math.log(2)
    assert DPO(loss_type="robust", label_smoothing=0.1).at_start()["loss"] == pytest.approx(ln2)
    assert DPO(label_smoothing=0.1).at_start()["loss"] == pytest.approx(ln2)
    assert DPO(loss_type={"sigmoid": 0.8, "bco": 0.2}).at_start()["loss"] == pytest.approx(1.2 * ln2)


@pytest.mark.parametrize("options", [{"length_penalty": 0.1}, {"sft_weight": 1.0}, {"weighting": "wpo"}])
def test_a_loss_that_depends_on_rows_or_model_declares_only_its_rewards(options):
    assert set(DPO(**options).at_start()) == {"rewards/chosen", "rewards/rejected", "rewards/margins"}


@pytest.mark.parametrize("f_divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("ratio", [-1e3, 1e3])
def test_far_log_ratios_stay_finite_under_every_divergence(f_divergence, ratio):
    logp = torch.tensor([ratio, 0.0], requires_grad=True)
    objective, batch = DPO(f_divergence=f_divergence), Batch.of([pair([1], [2], (1.0, 0.0))])
    loss, _ = objective.loss(batch, Outputs(logp), Reference(torch.zeros(2)))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad.square()).all()
    assert ratio > 0 or logp.grad[0] < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing is read by sigmoid, robust, exo only"),
        ({"loss_type": "robust"}, "robust needs label_smoothing"),
        ({"loss_type": "ipo"}, "loss_type: 'ipo' is not one of sigmoid"),
        ({"loss_type": {}}, "loss_type names no loss"),
        ({"loss_type": {"sigmoid": 0.0}}, "the weight of sigmoid must be above 0"),
        ({"loss_type": {"sigmoid": float("nan")}}, "the weight of sigmoid must be above 0"),
        ({"loss_type": "nca", "f_divergence": "js"}, "f_divergence is defined for a difference of rewards"),
        ({"loss_type": {"sigmoid": 1, "bco": 1}, "length_penalty": 0.1}, "length_penalty is defined for a difference"),
        ({"loss_type": "sppo", "drop_penalty": 1.0}, "drop_penalty is defined for a difference"),
        ({"f_alpha": 0.3}, "f_alpha is read with f_divergence: alpha only"),
        ({"f_divergence": "alpha", "f_alpha": 0.0}, "f_alpha must be above 0"),
        ({"f_divergence": "alpha", "log_ratio": "mean"}, "f_divergence needs log-ratios of whole completions"),
        ({"f_divergence": "js", "tail_weight": 0.5}, "f_divergence needs log-ratios of whole completions"),
        ({"log_ratio": "mean", "tail_weight": 0.5}, "both correct for length"),
        ({"tail_weight": 1.5}, "tail_weight must be between 0 and 1"),
        ({"length_penalty": -0.1}, "length_penalty must not be negative"),
        ({"drop_penalty": float("nan")}, "drop_penalty must not be negative"),
        ({"sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPO(**options)


def test_only_the_weighting_by_likelihood_asks_the_model_for_more():
    assert extras(DPO()) == ()
    assert extras(DPO(weighting="wpo")) == ("collision",)

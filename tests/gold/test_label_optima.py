"""Where KTO and BCO end on completions that are drawn from m and called good with probability q."""

from __future__ import annotations

import pytest
import torch
from tabular import Population, Task, descend_in_probability, draws, duel, kl, labels, minimum, optimum
from torch import Tensor

from prefopt.objectives import BCO, DPO, KTO
from prefopt.objectives.kto import Zero
from prefopt.objectives.pairwise import Reference

GOOD = torch.tensor([0.9, 0.7, 0.55, 0.45, 0.3, 0.1], dtype=torch.float64)  # q
DRAWN = draws(6, seed=1).softmax(-1)  # m
REFERENCE = draws(1, 6, seed=2)


def end_of_kto(objective: KTO, population: Population, reference: Tensor) -> tuple[Tensor, float]:
    """Probabilities [R] where KTO ends and the drift there, which is the exact KL(policy || reference) all along."""
    logp = population.batch.sum_tokens(population.outputs(reference).logp)

    def constants(logits: Tensor) -> Zero:
        return Zero(logp, torch.tensor(kl(logits, reference), dtype=torch.float64))

    gradient = Task(objective, population, reference, constants).gradient
    found = descend_in_probability(gradient, reference, rate=5 / objective.beta, steps=150)
    return found.softmax(-1)[0], kl(found, reference)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0), (1.5, 1.0)])
def test_kto_keeps_what_is_good_more_often_than_bad_and_drops_the_rest(weights, beta):
    """net = w_good q - w_bad (1 - q). Where it is negative nothing is left; the others share in proportion to
    m net s'(beta (log-ratio - drift)), which is the credit that a response gets.
    """
    population = Population(labels(DRAWN, GOOD))
    objective = KTO(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    found, drift = end_of_kto(objective, population, REFERENCE)
    net = weights[0] * GOOD - weights[1] * (1 - GOOD)
    assert found[net < 0].sum() < 1e-6
    value = torch.sigmoid(beta * (found.log() - REFERENCE[0].log_softmax(-1) - drift))
    share = (DRAWN * net * value * (1 - value)).clamp(min=0)
    assert (found - share / share.sum()).abs().max() < 1e-8
    assert (found[net > 0] > 1e-3).all()


def test_kto_with_a_small_beta_forgets_its_reference():
    """beta towards 0: in proportion to m (w_good q - w_bad (1 - q)), whatever the reference."""
    population = Population(labels(DRAWN, GOOD))
    share = (DRAWN * (2 * GOOD - 1)).clamp(min=0)
    for seed in (2, 3):
        objective = KTO(beta=1e-3, desirable_weight=1.0, undesirable_weight=1.0)
        found, _ = end_of_kto(objective, population, draws(1, 6, seed=seed))
        assert (found - share / share.sum()).abs().max() < 1e-5


def test_contradictory_preferences_give_dpo_the_minority_and_kto_the_majority():
    """The first response wins 0.6 of all comparisons and is rare under the reference: 0.001 against 0.999.

    DPO, beta 0.1: odds of 0.001 / 0.999 x (0.6 / 0.4)^10 = 0.0577, so it ends at 0.055 against 0.945. KTO, which is
    told of the winner as good and of the loser as bad, ends at 1 against 0. Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    reference = torch.tensor([[0.001, 0.999]], dtype=torch.float64).log()
    of_dpo = optimum(DPO(beta=0.1), duel(0.6), reference).softmax(-1)[0]
    odds = 0.001 / 0.999 * 1.5**10
    assert of_dpo.tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)], abs=1e-6)
    told = labels(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4]))
    objective = KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    of_kto, _ = end_of_kto(objective, Population(told), reference)
    assert of_kto.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_bco_optimum_is_the_reference_times_the_odds_of_good(beta):
    """reference x (q / (1 - q))^(1 / beta) / Z, whatever m: with a drift of -beta log Z each response's reward less the
    drift is its log-odds, which no classifier can better. So with q = s(r) it is reference x exp(r / beta) / Z.
    """
    reference = REFERENCE.log_softmax(-1)
    unnormalised = reference + torch.logit(GOOD) / beta
    drift = -beta * unnormalised.logsumexp(-1)[0]
    population = Population(labels(DRAWN, GOOD))
    logp = population.batch.sum_tokens(population.outputs(reference).logp)
    task = Task(BCO(beta=beta), population, reference, lambda logits: Reference(logp, drift))
    assert kl(minimum(task.gradient, reference), unnormalised) < 1e-10
    assert kl(unnormalised, reference) > 1e-3

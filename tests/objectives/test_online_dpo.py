"""Online DPO by hand: which two completions make the pair, ties, and completions without a reward."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import batch_of, far, gpt_neox, logp_by_hand, rows

from prefopt.batch import Batch, Outputs
from prefopt.objectives import DPO, IPO, OnlineDPO
from prefopt.objectives.online_dpo import Picked, picked
from prefopt.records import Example

NAN = math.nan


def wide(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scored(*prompts: list[float]) -> Batch:
    """A prompt for each list of scores, its completions of one token each."""
    return Batch.of([Example([1], [[2]] * len(s), s, [[True]] * len(s)) for s in prompts])


@pytest.mark.parametrize(
    ("scores", "sign"),
    [
        ([0.0, 3.0, -1.0, 2.0], [0, 1, -1, 0]),
        ([1.0, 0.0], [1, -1]),
        # of equal ones the first
        ([2.0, 0.0, 2.0, 0.0], [1, -1, 0, 0]),
        # nothing to tell apart
        ([1.0, 1.0, 1.0], [0, 0, 0]),
        # a completion without a reward is neither
        ([NAN, 1.0, 0.0], [0, 1, -1]),
        ([-1.0, NAN, -2.0, NAN], [1, 0, -1, 0]),
        ([1.0, NAN], [0, 0]),
        ([NAN, NAN], [0, 0]),
    ],
)
def test_best_and_worst_are_picked_by_score(scores, sign):
    assert picked(scored(scores)).tolist() == sign
    # also beside prompts with other scores
    assert picked(scored([9.0, 8.0], scores, [-7.0, NAN, 7.0])).tolist() == [1, -1, *sign, -1, 0, 1]


# two prompts: three completions and two
BATCH = scored([0.5, 2.0, -1.0], [0.0, 3.0])
SIGN, REFERENCE = torch.tensor([0.0, 1.0, -1.0, -1.0, 1.0]), wide(-1.0, -2.0, -3.0, -1.0, -1.0)


def test_the_loss_by_hand_and_no_gradient_for_the_others():
    # log-ratios of best and worst: 0.5 and -0.5, then -1 and 0; rewards at beta 0.5: 0.25, -0.25, -0.5, 0
    logp = wide(-9.0, -1.5, -3.5, -1.0, -2.0).requires_grad_()
    loss, seen = OnlineDPO(beta=0.5).loss(BATCH, Outputs(logp), Picked(SIGN, REFERENCE))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.5)))
    first, second = 0.5 / (1 + math.exp(0.5)), 0.5 / (1 + math.exp(-0.5))  # beta s(-margin)
    assert logp.grad.tolist() == pytest.approx([0.0, -first, first, second, -second])
    assert seen["rewards/margins"].tolist() == pytest.approx([0.5, -0.5])
    assert seen["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert seen["logps/chosen"].tolist() == [-1.5, -2.0]
    # of all completions, also of those that are in no pair
    assert seen["kl_reference"].tolist() == [-8.0, 0.5, -0.5, 0.0, -1.0]


def test_ipo_by_hand():
    # log-ratios differ by 1 and -1; 1 / (2 beta) = 2
    logp = wide(-9.0, -1.5, -3.5, -1.0, -2.0).requires_grad_()
    loss, _ = OnlineDPO(beta=0.25, loss_type="ipo").loss(BATCH, Outputs(logp), Picked(SIGN, REFERENCE))
    loss.backward()
    assert loss.item() == pytest.approx(1.0 + 9.0)
    assert logp.grad.tolist() == pytest.approx([0.0, -2.0, 2.0, 6.0, -6.0])


def test_ties_add_nothing_and_are_counted():
    batch = scored([1.0, 1.0], [0.0, 1.0], [NAN, NAN], [2.0, NAN])
    logp = wide(*[-1.0] * 8).requires_grad_()
    objective = OnlineDPO()
    targets = Picked(picked(batch), wide(*[-2.0] * 8))
    loss, seen = objective.loss(batch, Outputs(logp), targets)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logp.grad.nonzero()[:, 0].tolist() == [2, 3]
    # a prompt without any reward is not looked at
    assert seen["ties"].tolist() == [1.0, 0.0, 1.0]
    assert int(objective.count(batch)) == 3


def test_an_update_of_ties_alone_has_no_gradient_and_no_nan():
    batch = scored([1.0, 1.0])
    logp = wide(-1.0, -2.0).requires_grad_()
    loss, seen = OnlineDPO().loss(batch, Outputs(logp), Picked(picked(batch), wide(-1.0, -1.0)))
    (loss / OnlineDPO().count(batch)).backward()
    assert loss.item() == 0.0 and (logp.grad == 0).all()
    assert len(seen["rewards/margins"]) == 0 and seen["ties"].tolist() == [1.0]


@pytest.mark.parametrize(("online", "offline"), [(OnlineDPO(), DPO()), (OnlineDPO(loss_type="ipo"), IPO())])
def test_on_pairs_it_is_the_offline_objective(online, offline):
    """Rows of two completions with the models of production: the same loss and the same gradient."""
    batch, models = batch_of("pairs"), far(offline)
    policy: Any = models.policy
    grads = []
    for objective in (online, offline):
        with torch.no_grad():
            targets = objective.targets(batch, models)
        loss = objective.loss(batch, policy(batch), targets)[0]
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True)])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_reference_is_summed_over_trained_tokens():
    examples = rows("prompts", num=2)
    batch, models = Batch.of(examples), far(OnlineDPO())
    with torch.no_grad():
        found = OnlineDPO().targets(batch, SimpleNamespace(reference=lambda batch: models.policy(batch).logp)).logp
        tokens = [x for each in examples for x in logp_by_hand(gpt_neox(0), each)]
    flags = [torch.tensor(own) for each in examples for own in each.trained]
    wanted = torch.stack([x[own].sum() for x, own in zip(tokens, flags, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_beta_of_zero_is_refused():
    with pytest.raises(ValueError, match="beta must be above 0"):
        OnlineDPO(beta=0.0)

"""AOT by hand, against a plain sort of the whole update, and on several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import apart, one_update, rows
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs, parts
from prefopt.loop import Models
from prefopt.objectives import AOT, DPO
from prefopt.objectives.aot import partners
from prefopt.records import Example

both = pytest.mark.parametrize("pairing", ["unpaired", "paired"])


def pairs(num: int) -> Batch:
    """One-token completions, the worse first every other time: the log-prob of a completion is that of its token."""
    flags = [[True], [True]]
    return Batch.of([Example([7], [[1], [2]], [1.0, 0.0] if n % 2 == 0 else [0.0, 1.0], flags) for n in range(num)])


# Three pairs; log p and the reference's of completions in the order of the rows, worse first in the second.
LOGP = [-3.0, -4.0, -5.0, -1.0, -2.0, -3.0]
REFERENCE = [-3.0, -5.0, -3.0, -3.0, -1.0, -3.0]
# log-ratios: chosen 0, 2, -1; rejected 1, -2, 0


def by_hand(objective: AOT, tokens: int = 10**6) -> tuple[float, list[float], dict[str, Tensor]]:
    batch, logp = pairs(3), torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    targets = objective.targets(batch, Models(lambda part: Outputs(logp), lambda part: reference))
    losses, start = [], 0
    for part, goal in parts(batch, targets, tokens):
        stop = start + len(part.trained)
        loss, seen = objective.loss(part, Outputs(logp[start:stop]), goal)
        losses.append(loss)
        start = stop
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), logp.grad.tolist(), seen


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_unpaired_by_hand_in_one_forward_pass_or_three(tokens):
    # sorted: chosen -1, 0, 2 against rejected -2, 0, 1: differences 1, 0, 1: ln(1 + e^-1) = 0.313262, twice, and ln 2
    loss, gradient, _ = by_hand(AOT(beta=1.0), tokens)
    assert loss == pytest.approx(1.319671, abs=2e-6)
    # s(-1) = 0.268941 and s(0) = 0.5, by rank: chosen 0 (second), 2 (third), -1 (first); rejected 1, -2, 0
    chosen, rejected = (-0.5, -0.268941, -0.268941), (0.268941, 0.268941, 0.5)
    expected = [chosen[0], rejected[0], rejected[1], chosen[1], chosen[2], rejected[2]]
    assert gradient == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_paired_by_hand_in_one_forward_pass_or_three(tokens):
    # log p of chosen less rejected: 1, 4, 1; the reference's: 2, 0, 2. Sorted 1, 1, 4 against 0, 2, 2: 1, -1, 2
    # ln(1 + e^-1) = 0.313262, ln(1 + e) = 1.313262, ln(1 + e^-2) = 0.126928
    loss, gradient, _ = by_hand(AOT(beta=1.0, pairing="paired"), tokens)
    assert loss == pytest.approx(1.753451, abs=2e-6)
    # s(-1) = 0.268941 for the first of the two that tie, s(1) = 0.731059 for the other, s(-2) = 0.119203
    assert gradient == pytest.approx([-0.268941, 0.268941, 0.119203, -0.119203, -0.731059, 0.731059], abs=2e-6)


def test_metrics_are_those_of_the_pairs_themselves():
    _, _, seen = by_hand(AOT(beta=0.5))
    assert seen["rewards/chosen"].tolist() == pytest.approx([0.0, 1.0, -0.5])
    assert seen["rewards/rejected"].tolist() == pytest.approx([0.5, -1.0, 0.0])


def test_partners_have_the_same_rank():
    assert partners(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])).tolist() == [30.0, 10.0, 20.0]


def by_plain_sort(objective: AOT, batch: Batch, models: Models) -> Tensor:
    """The loss of a whole update, sorted in one piece with gradient through both sides."""
    logp, reference = (batch.sum_tokens(x) for x in (models.policy(batch).logp, models.reference(batch)))
    (chosen, rejected), (before_chosen, before_rejected) = batch.pairs(logp), batch.pairs(reference)
    if objective.pairing == "unpaired":
        upper, lower = chosen - before_chosen, rejected - before_rejected
    else:
        upper, lower = chosen - rejected, before_chosen - before_rejected
    return -F.logsigmoid(objective.beta * (upper.sort().values - lower.sort().values)).mean()


@both
@pytest.mark.parametrize("tokens", [1, 60])
def test_loss_and_gradient_are_those_of_one_plain_sort(pairing, tokens):
    batch, models, objective = Batch.of(rows("pairs", num=7)), apart(), AOT(pairing=pairing)
    policy: Any = models.policy
    expected = by_plain_sort(objective, batch, models)
    gradients = torch.autograd.grad(expected, list(policy.model.parameters()), allow_unused=True)
    whole = torch.cat([g.flatten() for g in gradients if g is not None])
    found = one_update(objective, batch, models, tokens)
    assert found.metrics["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(found.gradient[found.gradient != 0], whole[whole != 0], rtol=1e-9, atol=1e-12)
    assert found.metrics["loss"] != pytest.approx(one_update(DPO(), batch, models).metrics["loss"], rel=1e-3)


@both
def test_two_processes_sort_together(pairing, monkeypatch):
    examples, models, objective = rows("pairs", num=7), apart(), AOT(pairing=pairing)
    whole = objective.targets(Batch.of(examples), models)
    halves, sent = [Batch.of(examples[:4]), Batch.of(examples[4:])], []

    def send(value: Any) -> Any:
        sent.append(value)
        return [value]

    monkeypatch.setattr(ranks, "gather", send)
    for half in halves:
        objective.targets(half, models)
    monkeypatch.setattr(ranks, "gather", lambda value: list(sent))
    found = []
    for number, half in enumerate(halves):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        found.append(objective.targets(half, models))
    for name in ("logp", "below", "above"):
        both_halves = torch.cat([getattr(one, name) for one in found])
        assert torch.allclose(both_halves, getattr(whole, name), rtol=0, atol=1e-12), name


@both
def test_one_pair_is_dpo(pairing):
    batch, models = Batch.of(rows("pairs", num=1)), apart()
    found, expected = one_update(AOT(pairing=pairing), batch, models), one_update(DPO(), batch, models)
    assert torch.allclose(found.gradient, expected.gradient, rtol=1e-9, atol=1e-15)
    assert found.metrics == pytest.approx(expected.metrics)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        AOT(beta=beta)

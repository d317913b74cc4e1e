"""What may be added to the rows, the rewards or the reference without changing what is learnt.

That forward passes may be cut anywhere is in test_laws.py and test_loop.py, that a cached reference equals a computed
one, and an adapter switched off a frozen copy, in models/test_reference.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from laws import apart, batch_from, batch_of, far, one_update, rows
from tabular import draws
from torch import Tensor
from variants import ALL, ROLLOUT_WIDE

from prefopt.batch import Batch, Outputs
from prefopt.objectives import DPO, IPO, RewardModel
from prefopt.objectives.facts import Nothing


def reads_the_whole_update(objective: Any) -> bool:
    """Whether what one row teaches depends on the other rows: by ranks, a drift, mismatched answers or a spread."""
    if objective.facts.data == "prompts":
        return isinstance(objective, ROLLOUT_WIDE)
    return bool(objective.facts.forwards or objective.facts.live or "bco" in getattr(objective, "terms", ()))


ALONE = {name: objective for name, objective in ALL.items() if not reads_the_whole_update(objective)}


def total(objective: Any, examples: list[Any]) -> Tensor:
    """Gradient of the loss's sum over the rows, not of its mean, [parameters]."""
    batch = batch_from(objective.facts.data, examples)
    return one_update(objective, batch, far(objective)).gradient * float(objective.count(batch))


# Bessel's correction makes the spread of a sample smaller when every number of it comes twice
BESSEL = {name for name, objective in ALL.items() if isinstance(objective, ROLLOUT_WIDE)}
DOUBLED = {name: objective for name, objective in ALL.items() if name not in BESSEL}


@pytest.mark.parametrize("objective", list(DOUBLED.values()), ids=list(DOUBLED))
def test_every_row_twice_is_the_same_update(objective):
    examples = rows(objective.facts.data)
    once = total(objective, examples)
    assert torch.allclose(total(objective, examples * 2), 2 * once, rtol=1e-9, atol=1e-11)
    assert once.abs().max() > 1e-3


@pytest.mark.parametrize("objective", list(ALONE.values()), ids=list(ALONE))
def test_a_row_twice_counts_as_two(objective):
    examples = rows(objective.facts.data)
    twice = total(objective, [*examples, examples[1]])
    assert torch.allclose(twice, total(objective, examples) + total(objective, examples[1:2]), rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- a constant of the prompt


def scored(objective: RewardModel, batch: Batch, value: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [] and its gradient with respect to the scores [K]."""
    value = value.clone().requires_grad_()
    loss = objective.loss(batch, Outputs(torch.empty(0), value=value), Nothing())[0]
    return loss.detach(), torch.autograd.grad(loss, value)[0]


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("comparison", ["pairs", "listwise"])
def test_a_reward_model_may_add_anything_to_all_rewards_of_a_prompt(comparison, margin):
    batch = batch_of("ratings")
    value, shift = draws(len(batch.trained)), batch.spread(5 * draws(batch.num_prompts, seed=1)[batch.group])
    objective = RewardModel(comparison=comparison, margin=margin)
    for here, there in zip(scored(objective, batch, value), scored(objective, batch, value + shift), strict=True):
        assert torch.allclose(here, there, rtol=1e-12, atol=1e-12)
    centred = dataclasses.replace(objective, centering=0.1)
    assert abs(scored(centred, batch, value)[0] - scored(centred, batch, value + shift)[0]) > 0.1


def against(objective: Any, batch: Batch, shift: Any) -> tuple[float, Tensor]:
    """Loss and gradient of an update in which `shift` [K] nats is added to the reference's log-probs."""
    models = apart()
    moved = dataclasses.replace(models, reference=lambda part: models.reference(part) + shift)
    seen = one_update(objective, batch, moved)
    return seen.metrics["loss"], seen.gradient


@pytest.mark.parametrize(
    "objective", [DPO(), DPO(loss_type="hinge"), DPO(loss_type="exo"), IPO()], ids=["dpo", "hinge", "exo", "ipo"]
)
def test_a_reference_may_be_off_by_any_factor_of_the_prompt(objective):
    """The normaliser Z(x) of the optimum, which nobody can compute, cancels in a pair."""
    batch = batch_of("pairs", untrained=False)
    first = batch.completions.lengths.cumsum(0) - batch.completions.lengths  # [N]
    shift = torch.zeros(len(batch.trained), dtype=torch.float64)
    shift[first] = 5 * draws(batch.num_prompts, seed=1)[batch.group]
    loss, gradient = against(objective, batch, shift)
    expected_loss, expected = against(objective, batch, 0.0)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    absolute = DPO(loss_type="nca")
    assert abs(against(absolute, batch, shift)[0] - against(absolute, batch, 0.0)[0]) > 1e-3

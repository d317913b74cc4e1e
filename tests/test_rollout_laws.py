"""What must hold for every method on groups when a rollout serves several updates, and when rewards are missing.

As in test_laws.py all is in float64, on rows of unequal length with untrained tokens; the policy has moved away from
the one that drew the completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import batch_from, far, nudged, one_update, rows, shuffled
from test_laws import same_update
from variants import ALL

from prefopt.batch import Batch, Outputs
from prefopt.objectives.policy_gradient import PolicyGradient
from prefopt.records import Example

ONLINE = {name: each for name, each in ALL.items() if isinstance(each, PolicyGradient)}
every_policy_gradient = pytest.mark.parametrize("objective", list(ONLINE.values()), ids=list(ONLINE))


def drawn(objective: Any, examples: Sequence[Example]) -> Batch:
    """A rollout for several updates, with its constants: those of the policy that drew it."""
    models = far(objective)
    batch = batch_from(objective.facts.data, examples)
    with torch.no_grad():
        return replace(batch, targets=objective.targets(batch, replace(models, several=True)))


@every_policy_gradient
def test_away_from_the_policy_that_drew_budget_layout_and_order_do_not_change_the_update(objective):
    examples = rows(objective.facts.data)
    batch, models = drawn(objective, examples), nudged(far(objective))
    expected = one_update(objective, batch, models)
    assert abs(expected.metrics["ratio"] - 1) > 1e-6
    same_update(one_update(objective, batch, models, tokens=25), expected)
    same_update(one_update(objective, batch, nudged(far(objective, layout="padded"))), expected)
    same_update(one_update(objective, drawn(objective, shuffled(examples)), models), expected)


@every_policy_gradient
def test_away_from_the_policy_that_drew_only_clipped_tokens_get_no_credit(objective):
    batch, models = drawn(objective, rows(objective.facts.data)), nudged(far(objective))
    x = models.policy(batch).logp.detach().requires_grad_()
    loss, seen = objective.loss(batch, Outputs(x), batch.targets)
    loss.backward()
    none = x.grad == 0
    assert none[~batch.trained].all()
    stopped = sum(float(seen.get(f"clip_fraction/{side}", torch.zeros(1)).sum()) for side in ("low", "high"))
    if objective.facts.name == "cispo" or objective.kl != "reward":  # cut weights, and a pull that is not clipped
        stopped = 0
    assert int(none[batch.trained].sum()) == stopped


@every_policy_gradient
def test_a_completion_without_a_reward_might_as_well_not_be_there(objective):
    """One of three of the first prompt, and all of the second."""
    missing = {(0, 1), (1, 0), (1, 1)}
    examples = rows(objective.facts.data)
    marked, without = [], []
    for number, each in enumerate(examples):
        kept = [i for i in range(len(each.scores)) if (number, i) not in missing]
        scores = [score if i in kept else math.nan for i, score in enumerate(each.scores)]
        marked.append(replace(each, scores=scores))
        if kept:
            parts_of = {part: [getattr(each, part)[i] for i in kept] for part in ("completions", "scores", "trained")}
            without.append(replace(each, **parts_of))
    models = nudged(far(objective))
    left, right = (one_update(objective, drawn(objective, order), models) for order in (marked, without))
    assert torch.allclose(left.gradient, right.gradient, rtol=1e-9, atol=1e-12)
    assert left.metrics["ratio"] == pytest.approx(right.metrics["ratio"])

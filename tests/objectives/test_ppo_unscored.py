"""A completion without a score says nothing to PPO, however far the policy has moved from what it was there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefopt.batch import Batch, Outputs
from prefopt.objectives import PPO
from prefopt.objectives.ppo import Experience
from prefopt.records import Example


@pytest.mark.parametrize("options", [{}, {"dual_clip": 3.0}, {"correction": "token"}], ids=str)
def test_a_move_too_far_for_an_exponential_leaves_the_gradient_finite(options):
    example = Example([1], [[1, 1], [1, 1]], [1.0, math.nan], [[True, True]] * 2)
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    value = torch.zeros(4, requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -100.0, -100.0])  # 99 nats: e^99 is no float32
    batch = replace(Batch.of([example]), rollout_logp=old)
    advantage = torch.tensor([0.5, 0.5, 0.0, 0.0])
    targets = Experience(advantage, torch.ones(4), torch.zeros(4), None, old, None)
    loss, seen = PPO(beta=0.0, **options).loss(batch, Outputs(logp, value=value), targets)
    loss.backward()
    assert logp.grad.tolist() == [-0.5, -0.5, 0.0, 0.0]
    assert value.grad[2:].tolist() == [0.0, 0.0] and value.grad[:2].abs().min() > 0
    assert torch.isfinite(loss) and all(torch.isfinite(x).all() for x in seen.values())

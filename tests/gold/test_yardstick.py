"""What the other tests are measured with: the best trade of reward against KL, found here without its formula."""

from __future__ import annotations

import pytest
import torch
from tabular import draws, kl, tilted

REFERENCE, REWARD = draws(2, 5, seed=1), draws(2, 5, seed=2)


def regularised(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Expected reward - beta KL(policy || reference), summed over prompts."""
    logp, reference = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    return (logp.exp() * (REWARD - beta * (logp - reference))).sum()


@pytest.mark.parametrize("beta", [0.3, 0.5, 2.0])
def test_the_tilted_reference_maximises_reward_minus_kl(beta):
    found = REFERENCE.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [found], max_iter=500, tolerance_grad=1e-15, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = -regularised(found, beta)
        loss.backward()
        return loss

    solver.step(closure)
    assert kl(found.detach(), tilted(REFERENCE, REWARD, beta)) < 1e-10
    assert kl(found.detach(), REFERENCE) > 1e-3

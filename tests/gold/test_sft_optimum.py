"""Where supervised fine-tuning ends: at the likelihood's maximum, or, weighted by probability, at the mode."""

from __future__ import annotations

import torch
from tabular import Population, Row, Task, descend_in_probability, draws, kl, optimum

from prefopt.objectives import SFT

PROMPTS, RESPONSES = 2, 5
START = draws(PROMPTS, RESPONSES, seed=1)
SHARES = draws(PROMPTS, RESPONSES, seed=2).softmax(-1)


def demonstrations() -> Population:
    return Population([Row(float(SHARES[p, y]), [y], [1], p) for p in range(PROMPTS) for y in range(RESPONSES)])


def test_optimum_is_how_often_each_response_is_shown():
    found = optimum(SFT(), demonstrations(), START)
    assert kl(found, SHARES.log()) < 1e-10
    assert kl(found, START) > 1e-3


def test_weighted_by_probability_the_most_frequent_response_takes_all():
    """The gradient is that of the expected probability of a demonstration, sum over y of share(y) p(y), which is
    largest where p is all on the most frequent one: p (share - sum of share p) in the logits.
    """
    gradient = Task(SFT(weighting="probability"), demonstrations(), START).gradient
    p = START.softmax(-1)
    expected = -p * (SHARES - (SHARES * p).sum(-1, keepdim=True))
    assert torch.allclose(gradient(START.clone().requires_grad_()), expected, rtol=0, atol=1e-15)
    found = descend_in_probability(gradient, START, rate=5.0, steps=400).softmax(-1)
    most = SHARES.argmax(-1)
    assert (found[range(PROMPTS), most] > 1 - 1e-6).all()
    assert (START.argmax(-1) != most).any()

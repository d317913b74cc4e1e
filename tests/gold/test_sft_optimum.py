"""The optimum of supervised fine-tuning: maximum likelihood."""

from __future__ import annotations

from tabular import Population, Row, draws, kl, optimum

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

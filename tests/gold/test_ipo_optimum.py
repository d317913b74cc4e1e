"""The optimum of IPO's population loss, against its closed form; D is a difference of log-ratios, nats."""

from __future__ import annotations

import pytest
import torch
from tabular import Population, draws, duel, kl, margin, matches, optimum
from torch import Tensor

from prefopt.objectives import IPO

PROMPTS, RESPONSES = 2, 5
REFERENCE = draws(PROMPTS, RESPONSES, seed=1)
LENGTHS = [1, 4, 2, 7, 3]


def population(lengths: list[int] | None = None) -> tuple[Population, Tensor]:
    """Two responses drawn from m, each by itself, and how often each response beats another draw, [P, R].

    The preferences are drawn too: no reward explains them.
    """
    rows, wins = [], []
    for prompt in range(PROMPTS):
        share = (2 * draws(RESPONSES, seed=3 + prompt)).softmax(-1)
        beats = torch.sigmoid(draws(RESPONSES, RESPONSES, seed=5 + prompt))
        beats = beats.triu(1) + (1 - beats.T).tril(-1) + 0.5 * torch.eye(RESPONSES, dtype=torch.float64)
        rows += matches(beats, share, prompt)
        wins.append(beats @ share)
    return Population(rows, lengths), torch.stack(wins)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_optimum_is_the_reference_times_exp_of_the_win_rate(beta):
    """reference x exp(P(y beats a draw from m) / beta) / Z, whatever m is. Azar et al. 2023, arXiv:2310.12036."""
    asked, wins = population(LENGTHS)
    found = optimum(IPO(beta=beta), asked, REFERENCE)
    assert kl(found, REFERENCE.log_softmax(-1) + wins / beta) < 1e-10
    assert kl(found, REFERENCE) > 1e-3


def test_averaged_log_ratios_are_the_win_rate_per_token():
    """log-ratio(y) / |y| = P(y beats a draw from m) / beta + a constant of the prompt: another optimum."""
    asked, wins = population(LENGTHS)
    found = optimum(IPO(beta=0.3, log_ratio="mean"), asked, REFERENCE)
    per_token = (found.log_softmax(-1) - REFERENCE.log_softmax(-1)) / torch.tensor(LENGTHS)
    left = per_token - wins / 0.3  # [P, R]
    assert (left - left.mean(-1, keepdim=True)).abs().max() < 1e-8


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_pair_that_is_always_labelled_the_same_stops_at_its_margin(beta):
    """D = 1 / (2 beta): 50, 5 and 0.5 nats, where DPO never stops."""
    reference = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    found = optimum(IPO(beta=beta), duel(1.0), reference)
    assert margin(found, reference) == pytest.approx(1 / (2 * beta), abs=1e-8)

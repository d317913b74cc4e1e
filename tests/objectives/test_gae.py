"""Advantages and returns on ragged completions: by hand, against a loop, and exact where the values are."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from prefopt.batch import Batch
from prefopt.objectives.gae import gae, last_steps, to_come
from prefopt.records import Example


def batch_of(*trained: list[bool]) -> Batch:
    """One prompt with a completion for each row of flags."""
    completions = [[1] * len(flags) for flags in trained]
    return Batch.of([Example([1], completions, [0.0] * len(trained), list(trained))])


def wide(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# two completions, of three tokens and of two
BATCH = batch_of([True] * 3, [True] * 2)
REWARD, VALUE = wide(0.0, 1.0, 2.0, -1.0, 4.0), wide(0.5, 1.0, 2.0, 3.0, 1.0)


def test_by_hand():
    # gamma 1/2, lambda 1/2, so each delta counts 1/4 of that one step later
    # first: deltas 0 + 1/2 - 0.5 = 0, 1 + 1 - 1 = 1, 2 + 0 - 2 = 0; A = 0.25, 1, 0
    # second: deltas -1 + 0.5 - 3 = -3.5, 4 + 0 - 1 = 3; A = -3.5 + 0.75 = -2.75, 3
    found = gae(BATCH, REWARD, VALUE, 0.5, 0.5)
    assert found.advantage.tolist() == [0.25, 1.0, 0.0, -2.75, 3.0]
    assert found.returns.tolist() == [0.75, 2.0, 2.0, 0.25, 4.0]


def test_lambda_one_is_what_came_less_what_was_expected():
    # without discount there comes 3, 3, 2 in the first and 3, 4 in the second
    found = gae(BATCH, REWARD, VALUE, 1.0, 1.0)
    assert found.advantage.tolist() == [2.5, 2.0, 0.0, 0.0, 3.0]
    assert found.returns.tolist() == to_come(BATCH, REWARD, 1.0).tolist() == [3.0, 3.0, 2.0, 3.0, 4.0]


def test_lambda_zero_looks_one_step_ahead():
    # 0 + 1 - 0.5, 1 + 2 - 1, 2 + 0 - 2, -1 + 1 - 3, 4 + 0 - 1
    assert gae(BATCH, REWARD, VALUE, 1.0, 0.0).advantage.tolist() == [0.5, 2.0, 0.0, -3.0, 3.0]


def test_tokens_that_the_policy_did_not_write_are_no_steps():
    """As if they were not there, whatever stands at them, in the middle, at the start and at the end."""
    batch = batch_of([True, False, True, False, False, True], [False, True, True, False])
    at = batch.trained
    reward, value = (torch.full((10,), 1e6, dtype=torch.float64) for _ in range(2))
    reward[at], value[at] = REWARD, VALUE
    found, plain = gae(batch, reward, value, 0.5, 0.5), gae(BATCH, REWARD, VALUE, 0.5, 0.5)
    for mine, wanted in zip(found, plain, strict=True):
        assert torch.equal(mine[at], wanted)
        assert (mine[~at] == 0).all()
    assert last_steps(batch).nonzero()[:, 0].tolist() == [5, 8]


def test_a_completion_without_a_step_of_its_own_passes_nothing_on():
    batch = batch_of([True, True], [False], [True])
    ones = torch.ones(4, dtype=torch.float64)
    assert gae(batch, ones, 0 * ones, 1.0, 1.0).advantage.tolist() == [2.0, 1.0, 0.0, 1.0]
    assert last_steps(batch).tolist() == [False, True, False, True]


def test_a_number_that_is_none_stays_in_its_completion():
    reward = REWARD.clone()
    reward[4] = math.nan
    found = gae(BATCH, reward, VALUE, 1.0, 0.95)
    assert torch.equal(found.advantage[:3], gae(BATCH, REWARD, VALUE, 1.0, 0.95).advantage[:3])


def test_equals_the_recursion_on_many_lengths():
    """Lengths on both sides of the powers of two at which the sum doubles."""
    draw = random.Random(0)
    flags = [[draw.random() < 0.8 for _ in range(length)] for length in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)]
    batch, gamma, trace = batch_of(*flags), 0.9, 0.7
    size = len(batch.trained)
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted, place = torch.zeros(size, dtype=torch.float64), 0
    for own in flags:
        later, coming = 0.0, 0.0
        for k in reversed([place + n for n, flag in enumerate(own) if flag]):
            later = float(reward[k] + gamma * coming - value[k]) + gamma * trace * later
            wanted[k], coming = later, float(value[k])
        place += len(own)
    found = gae(batch, reward, value, gamma, trace)
    torch.testing.assert_close(found.advantage, wanted, rtol=1e-12, atol=1e-12)
    at = batch.trained
    torch.testing.assert_close(found.returns[at], (wanted + value)[at], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trace", [0.0, 0.5, 0.95, 1.0])
def test_values_that_are_exact_give_advantages_whose_mean_is_exact_at_every_lambda(trace):
    """All completions of three tokens of two: the mean over those that begin alike is Q(begin, token) - V(begin)."""
    tokens = list(itertools.product((0, 1), repeat=3))
    chance = {0: 0.3, 1: 0.7}
    score = dict(zip(tokens, (1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0), strict=True))

    def expected(begin: tuple[int, ...]) -> float:
        if len(begin) == 3:
            return score[begin]
        return sum(chance[token] * expected((*begin, token)) for token in (0, 1))

    batch = batch_of(*[[True] * 3] * 8)
    reward = wide(*(x for y in tokens for x in (0.0, 0.0, score[y])))
    value = wide(*(expected(y[:t]) for y in tokens for t in range(3)))
    found = gae(batch, reward, value, 1.0, trace).advantage.view(8, 3)
    for t in range(3):
        for begin in itertools.product((0, 1), repeat=t + 1):
            rows = [n for n, y in enumerate(tokens) if y[: t + 1] == begin]
            weight = [math.prod(chance[token] for token in tokens[n][t + 1 :]) for n in rows]
            mean = sum(w * float(found[n, t]) for w, n in zip(weight, rows, strict=True))
            assert mean == pytest.approx(expected(begin) - expected(begin[:t]), abs=1e-12)


@pytest.mark.parametrize("shape", [(4,), (5, 1), (2,)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"gae: expected a tensor of shape \[5\]"):
        gae(BATCH, REWARD, torch.zeros(shape), 1.0, 1.0)
    with pytest.raises(ValueError, match="shape"):
        gae(BATCH, torch.zeros(shape), VALUE, 1.0, 1.0)

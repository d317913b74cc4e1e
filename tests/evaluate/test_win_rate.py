from __future__ import annotations

import math

import pytest

from prefopt.evaluate.statistics import wilson
from prefopt.evaluate.win_rate import mean_reward, win_rate


def test_win_rate_by_hand():
    # prompt 1: 3 beats 1 and ties 3: (1 + 0.5) / 2 = 0.75; prompt 2: 2 loses to 5: 0; prompt 3: 4 > 1, 0 < 1: 0.5
    estimate = win_rate([[3.0], [2.0], [4.0, 0.0]], [[1.0, 3.0], [5.0], [1.0]])
    assert estimate.value == pytest.approx((0.75 + 0 + 0.5) / 3)
    assert estimate.n == 3
    assert 0 <= estimate.low < estimate.value < estimate.high <= 0.75


def test_each_prompt_weighs_the_same_however_many_samples_it_has():
    assert win_rate([[1.0] * 9, [0.0]], [[0.0], [1.0]]).value == 0.5


def test_swapping_the_two_mirrors_the_win_rate():
    ours, theirs = [[3.0, 1.0], [2.0], [4.0]], [[1.0, 3.0], [5.0], [1.0]]
    assert win_rate(ours, theirs).value == pytest.approx(1 - win_rate(theirs, ours).value)


def test_winning_everywhere_still_has_an_interval():
    estimate = win_rate([[1.0]] * 10, [[0.0]] * 10)
    assert estimate == wilson(10, 10)
    assert estimate.value == 1.0 and estimate.low == pytest.approx(0.7225, abs=1e-4)


def test_samples_without_a_reward_are_left_out_not_counted_as_lost():
    assert win_rate([[None, 2.0], [math.nan], [1.0]], [[1.0], [0.0], [2.0]]).n == 2
    assert win_rate([[None, 2.0], [math.nan], [1.0]], [[1.0], [0.0], [2.0]]).value == 0.5
    nothing = win_rate([[None]], [[1.0]])
    assert nothing.value is None and "none of 1 prompts" in nothing.why


def test_rewards_for_different_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match="2 prompts of the policy but 1"):
        win_rate([[1.0], [1.0]], [[1.0]])


def test_mean_reward_by_hand():
    # prompt means 2 and 5
    assert mean_reward([[1.0, 3.0], [5.0, None], [None]]).value == 3.5
    assert mean_reward([[None]]).value is None

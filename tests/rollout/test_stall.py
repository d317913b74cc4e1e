"""A stall is said once, with the chance of success that it leaves open, and taken back when learning goes on."""

from __future__ import annotations

import math

import pytest

from prefopt.rollout.stall import Seen, Watch, is_flat, needed, upper_bound


def rollout(step: int, failed: int = 8, successes: int = 0, reward: float = 0.0) -> Seen:
    return Seen(step, 8, failed, 64, successes, reward)


def test_rollouts_without_any_success_are_a_stall_once_the_window_is_full() -> None:
    watch = Watch(5)
    lines = [watch.see(rollout(step)) for step in range(1, 9)]
    assert [line is not None for line in lines] == [False] * 4 + [True] + [False] * 3
    assert "learning has stalled: in 100% of the groups" in str(lines[4]) and "easier_data" in str(lines[4])
    assert watch.found is not None
    assert (watch.found.since, watch.found.step, watch.found.recovered) == (1, 8, None)
    # 5 rollouts of 64 completions without a success: p < 1 - 0.05^(1/320) = 0.0093, and ln 0.5 / ln(1 - p) = 74.05
    assert watch.found.p_upper == pytest.approx(0.0093179, rel=1e-3)
    assert watch.found.num_completions == 75
    assert watch.found.summary()["advice"] in str(lines[4])


def test_solved_groups_are_no_stall() -> None:
    watch = Watch(3)
    assert [watch.see(rollout(step, failed=0, successes=64, reward=1.0)) for step in range(1, 6)] == [None] * 5
    assert watch.found is None


def test_a_reward_that_rises_is_no_stall_even_where_most_groups_fail() -> None:
    watch = Watch(6)
    seen = [watch.see(rollout(step, failed=8, successes=step, reward=0.02 * step)) for step in range(1, 9)]
    assert seen == [None] * 8 and watch.found is None


def test_a_stall_that_is_over_is_kept_with_its_end() -> None:
    watch = Watch(3)
    for step in range(1, 5):
        watch.see(rollout(step))
    lines = [watch.see(rollout(step, failed=2, successes=20, reward=0.3)) for step in range(5, 9)]
    assert [line for line in lines if line] == ["step 5: learning goes on: some completions are rewarded again"]
    assert watch.found is not None and watch.found.recovered == 5 and watch.found.since == 1


def test_the_bound_is_the_rule_of_three_without_a_success_and_wilsons_with_some() -> None:
    assert upper_bound(0, 1000) == pytest.approx(3 / 1000, rel=5e-3)
    assert (1 - upper_bound(0, 40)) ** 40 == pytest.approx(0.05)
    # p = 2/100, z = 1.6449: (0.02 + 0.01353 + 1.6449 sqrt(0.000196 + 0.0000676)) / 1.02706 = 0.0587
    assert upper_bound(2, 100) == pytest.approx(0.0587, abs=1e-4)
    assert upper_bound(0, 0) == 1.0


def test_the_completions_needed_give_a_success_in_half_the_groups() -> None:
    for p in (0.5, 0.1, 0.003):
        assert (1 - p) ** needed(p) <= 0.5 < (1 - p) ** (needed(p) - 1)
    assert needed(1.0) == 1 and math.isfinite(needed(1e-9))


def test_what_is_flat() -> None:
    assert is_flat([0.0] * 5) and is_flat([0.5, 0.4, 0.6, 0.5, 0.5]) and is_flat([5.0, 4.0, 3.0, 2.0])
    assert not is_flat([0.0, 0.1, 0.2, 0.3])

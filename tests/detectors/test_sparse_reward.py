"""A stall is found once, with the chance of success that it leaves open, and is over when learning goes on."""

from __future__ import annotations

import math

import pytest
from streams import found, noisy, updates, watched

from prefopt.detectors import Run
from prefopt.detectors.series import is_flat, needed, upper_bound
from prefopt.detectors.sparse_reward import SparseReward

FAILED = {
    "judged": 64.0,
    "success": 0.0,
    "zero_variance__failed": 1.0,
    "zero_variance__solved": 0.0,
    "task_reward": 0.0,
}


def five(**options: object) -> Run:
    return Run("grpo", {"stall_window": 5, "num_completions": 8, **options})


def test_rollouts_without_any_success_are_a_stall_once_the_window_is_full() -> None:
    assert found(SparseReward(), updates(4, **FAILED), five()) is None
    stall = found(SparseReward(), updates(8, **FAILED), five())
    assert stall is not None and (stall.level, stall.since, stall.step, stall.last) == ("sick", 1, 5, 8)
    assert "learning has stalled: in 100% of the groups" in stall.reason and "easier_data" in stall.remedy
    # 5 rollouts of 64 completions without a success: p < 1 - 0.05^(1/320) = 0.0093, and ln 0.5 / ln(1 - p) = 74.05
    assert stall.evidence["p_upper"] == pytest.approx(0.0093179, rel=1e-3)
    assert stall.evidence["num_completions"] == 75


def test_more_completions_are_the_change_where_they_are_within_reach() -> None:
    rollouts = updates(20, **{**FAILED, "judged": 512.0})
    assert found(SparseReward(), updates(5, **FAILED), five(num_completions=16)).change == {"num_completions": 75}
    assert found(SparseReward(), rollouts, five()).change == {}


def test_solved_groups_are_no_stall() -> None:
    solved = {"zero_variance__failed": 0.0, "zero_variance__solved": 1.0, "success": 1.0, "task_reward": 1.0}
    assert found(SparseReward(), updates(20, judged=64.0, **solved), five()) is None


def test_a_reward_that_rises_is_no_stall_even_where_most_groups_fail() -> None:
    rising = {**FAILED, "zero_variance__failed": 0.95, "task_reward": lambda step: 0.02 * step}
    assert found(SparseReward(), updates(20, **rising), five()) is None


def test_a_bonus_that_rises_does_not_hide_a_stall_of_the_task() -> None:
    stream = updates(20, **FAILED, reward=lambda step: 0.1 * step)
    assert found(SparseReward(), stream, five()) is not None


def test_a_stall_that_is_over_is_kept_with_its_end() -> None:
    goes_on = {**FAILED, "zero_variance__failed": 0.2, "success": 0.3, "task_reward": 0.3}
    stream = [*updates(8, **FAILED), *((step + 8, values) for step, values in updates(8, **goes_on))]
    stall = watched(SparseReward(), stream, five()).find("sparse_reward")
    # of 5 rollouts 1 that goes on leaves (4 + 0.2) / 5 = 84 % failed
    assert stall is not None and stall.recovered == 9 and stall.since == 1


def test_one_completion_of_each_prompt_is_judged_by_rollouts() -> None:
    alone = {"judged": 12.0, "task_reward": 0.0}
    stall = found(SparseReward(), updates(5, **alone, success=0.0), five())
    assert stall is not None and "in 100% of the rollouts" in stall.reason
    rare = updates(20, **alone, success=1 / 12)
    assert found(SparseReward(), rare, five()) is None


def test_a_log_that_does_not_tell_failed_from_solved_is_judged_where_the_reward_is_nothing() -> None:
    run = Run("grpo", {}, source="TRL")
    every_tenth = [(10 * step, values) for step, values in updates(8, zero_variance=1.0, reward=0.0)]
    stall = found(SparseReward(), every_tenth, run)
    assert stall is not None and stall.evidence["p_upper"] is None and "chance" not in stall.reason
    assert found(SparseReward(), updates(40, zero_variance=1.0, reward=1.0), run) is None
    assert found(SparseReward(), updates(40, zero_variance=0.5, reward=noisy(0.1, 0.05)), run) is None


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

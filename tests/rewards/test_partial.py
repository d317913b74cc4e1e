"""Partial credit, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.rewards.partial import prefix_right, share_passed, steps_right


def test_tests_passed_as_a_share_with_a_bonus_for_all() -> None:
    assert share_passed([True, False, None, True]) == 0.5
    # half of the reward is for all tests together: 0.5 * 3/4, and 0.5 + 0.5
    assert share_passed([True, True, True, False], bonus=0.5) == 0.375
    assert share_passed([True, True], bonus=0.5) == 1.0
    assert share_passed([True, False], bonus=1.0) == 0.0
    assert share_passed([]) is None and share_passed([None]) is None
    with pytest.raises(ValueError, match="bonus"):
        share_passed([True], bonus=2)


def test_only_true_is_a_pass() -> None:
    assert share_passed([1, "yes", True]) == pytest.approx(1 / 3)  # type: ignore[list-item]


def test_steps_in_their_order_count_and_padding_does_not_pay() -> None:
    assert steps_right(["a", "c"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert steps_right(["c", "b", "a"], ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert steps_right(["a", "x", "b", "x", "c", "x"], ["a", "b", "c"]) == 0.5
    assert steps_right([], ["a"]) == 0 and steps_right(["a"], []) is None
    assert steps_right(["A"], ["a"], same=lambda left, right: left.lower() == right.lower()) == 1


def test_a_right_prefix_is_a_share_of_the_longer() -> None:
    assert prefix_right("12345", "12999") == 0.4
    assert prefix_right("12", "1234") == 0.5 and prefix_right("12345678", "1234") == 0.5
    assert prefix_right([1, 2], [1, 2]) == 1.0
    assert prefix_right("", "1") == 0 and prefix_right("1", "") is None


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_share_is_one_only_for_the_whole(given_steps: list[int], expected: list[int]) -> None:
    for share in (steps_right(given_steps, expected), prefix_right(given_steps, expected)):
        assert share is not None and 0 <= share <= 1 and (share == 1) == (given_steps == expected)

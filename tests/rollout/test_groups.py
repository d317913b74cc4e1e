"""Groups: what is learnt from, what teaches nothing and why, and the metrics of a rollout."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prefopt.models.sampling import Completion
from prefopt.records import Sample, Score
from prefopt.rollout.groups import (
    Group,
    Kinds,
    Range,
    group_metrics,
    most_useful,
    reward_metrics,
    reward_of,
    shape_metrics,
    task_reward,
)
from prefopt.rollout.prompts import Draw, Prompt


def group(*values: float | None, parts: Any = None, finished: bool = True) -> Group:
    scores = [Score(value, "" if value is not None else "no answer") for value in values]
    if parts is not None:
        scores = [score._replace(parts=own) for score, own in zip(scores, parts, strict=True)]
    completions = [Completion([7] * (at + 1), [-0.5] * (at + 1), finished) for at in range(len(values))]
    rewards = [math.nan if value is None else value for value in values]
    samples = [Sample("p", "c")] * len(values)
    return Group(Draw(Prompt([1], "p"), 0, False, 0), completions, samples, scores, rewards)


def kinds(*groups: Group) -> Kinds:
    seen, facts = Range(), [one.facts() for one in groups]
    seen.see(value for fact in facts for value in fact.known)
    return Kinds.of(facts, seen)


@pytest.mark.fault(18)
def test_groups_of_equal_rewards_are_solved_or_failed() -> None:
    assert kinds(group(1, 1), group(0, 0), group(0, 1), group(0, 0, None)) == Kinds(mixed=1, solved=1, failed=2)


def test_all_zero_before_anything_succeeded_is_failed_and_so_are_penalties() -> None:
    assert kinds(group(0, 0)) == Kinds(0, 0, 1)
    assert kinds(group(-1, -1)) == Kinds(0, 0, 1)
    assert kinds(group(-1, -1), group(1, 1)) == Kinds(0, 1, 1)


def test_a_group_that_could_not_be_scored_is_in_no_class() -> None:
    assert kinds(group(None, None), group(1, None)) == Kinds(0, 1, 0)


def test_a_bonus_for_length_does_not_hide_that_the_task_failed() -> None:
    parts = [{"math": 0.0, "length": 0.1}, {"math": 0.0, "length": 0.4}]
    both = group(0.1, 0.4, parts=parts)
    assert both.useful and kinds(both) == Kinds(0, 0, 1)
    assert task_reward(Score(0.4, parts=parts[1])) == 0.0


def test_nan_is_neither_equal_nor_different() -> None:
    assert not group(1, None).useful and not group(None, None).useful
    assert group(1, None, 0).useful


@pytest.mark.parametrize(
    ("how", "expected"), [("keep", 2.0), ("ignore", math.nan), ("penalty", 1.5)], ids=["keep", "ignore", "penalty"]
)
def test_what_a_cut_completion_is_worth(how: str, expected: float) -> None:
    assert reward_of(Score(2.0), False, how, 0.5) == pytest.approx(expected, nan_ok=True)
    assert reward_of(Score(2.0), True, how, 0.5) == 2.0
    assert math.isnan(reward_of(Score(None, "why"), False, how, 0.5))


def test_useful_groups_are_kept_first_and_in_order() -> None:
    flat, one, two, other = group(0, 0), group(0, 1), group(1, 0), group(1, 1)
    assert most_useful([flat, one, other, two], 2) == [one, two]
    assert most_useful([flat, one, other, two], 3) == [flat, one, two]


def test_metrics_leave_out_what_was_not_scored() -> None:
    facts = [group(1, None, parts=[{"a": 1.0, "b": None}, {"a": None, "b": 3.0}]).facts(), group(0, 0).facts()]
    found = reward_metrics(facts)
    # 1, 0, 0 of four: mean 1/3, deviation sqrt(2)/3
    assert found["reward"] == pytest.approx(1 / 3) and found["reward_std"] == pytest.approx(math.sqrt(2) / 3)
    assert found["unscored"] == 0.25
    assert (found["reward/a"], found["reward/b"]) == (1.0, 3.0)
    assert reward_metrics([group(None).facts()]) == {"unscored": 1.0}


def test_lengths_and_shares() -> None:
    facts = [group(1, 0).facts(), group(0, 0, finished=False).facts()]
    assert shape_metrics(facts) == {"completion_length": 1.5, "finished": 0.5, "repetition": 0.0}
    assert group_metrics(Kinds(1, 0, 3), 1) == {
        "effective_groups": 1.0,
        "zero_variance/solved": 0.0,
        "zero_variance/failed": 0.75,
    }
    assert group_metrics(Kinds(0, 0, 0), 0) == {"effective_groups": 0.0}

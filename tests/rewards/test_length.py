"""Length, overlong and repetition, worked out by hand and against TRL's own."""

from __future__ import annotations

import pytest

from prefopt.records import Sample
from prefopt.rewards.length import length, overlong, repetition


def of(*sizes: int) -> list[Sample]:
    return [Sample("p", "c", tokens=list(range(size))) for size in sizes]


def test_length_is_one_at_its_target_and_zero_from_twice_as_much() -> None:
    assert [score.value for score in length(10)(of(10, 5, 12, 20, 100))] == pytest.approx([1, 0.5, 0.8, 0, 0])


def test_overlong_follows_dapo_equation_13() -> None:
    # L_max 100, L_cache 20: free up to 80, then (80 - n) / 20, -1 beyond 100
    reward = overlong(100, 20)
    assert [score.value for score in reward(of(1, 80, 85, 90, 100, 101, 500))] == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_repetition_is_the_share_of_runs_that_repeat() -> None:
    # 5 5 5 5 5 has four runs of two, one of them distinct: 1/4 - 1
    samples = [Sample("p", "c", tokens=tokens) for tokens in ([1, 2, 3, 4], [5] * 5, [1], [1, 2, 1, 2])]
    assert [score.value for score in repetition(2)(samples)] == pytest.approx([0, -0.75, 0, 2 / 3 - 1])


@pytest.mark.parametrize("reward", [length(4), overlong(4, 2), repetition(2)], ids=lambda reward: reward.name)
def test_unknown_tokens_are_no_score(reward: object) -> None:
    (score,) = reward([Sample("p", "a text")])  # type: ignore[operator]
    assert score.value is None and "tokens" in score.why


def test_trl_gives_the_same_penalties() -> None:
    rewards = pytest.importorskip("trl.rewards", reason="parity needs TRL: pip install trl==1.16.*")
    runs = [[1] * size for size in range(1, 40)] + [[1, 2, 3, 1, 2, 3, 4], [7, 8] * 9]
    samples = [Sample("p", "c", tokens=run) for run in runs]
    for cache in (0, 5, 30):
        ours = [score.value for score in overlong(30, cache)(samples)]
        assert ours == pytest.approx(rewards.get_soft_overlong_punishment(30, cache)(runs))
    for ngram in (1, 3):
        ours = [score.value for score in repetition(ngram)(samples)]
        assert ours == pytest.approx(rewards.get_repetition_penalty_reward(ngram)(runs))

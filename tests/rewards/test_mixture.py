"""Sums of rewards: weights, silence, failures, and the stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from prefopt.records import InputError, Sample, Score
from prefopt.rewards import ABSTAINED, Mixture
from prefopt.rewards.direct import DirectReward


def says(name: str, *values: float | None, why: str = "broken") -> DirectReward:
    """A reward that gives these values by the samples' groups; None fails, or abstains where `why` says so."""

    def score(sample: Sample) -> Score:
        value = values[sample.group % len(values)]
        return Score(value, "" if value is not None else why)

    return DirectReward(name, score)


def samples(size: int) -> list[Sample]:
    return [Sample("p", "c", group=n) for n in range(size)]


class Own:
    """A reward object of a user."""

    name = "own"

    def __init__(self, call: Callable[[Sequence[Sample]], Any]) -> None:
        self.call, self.closed = call, False

    def __call__(self, given: Sequence[Sample]) -> list[Score]:
        return self.call(given)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed = True


def test_the_sum_is_weighted_and_its_parts_are_said() -> None:
    mixture = Mixture([says("a", 1.0, 0.0), says("b", 0.5)], [2.0, -1.0])
    assert [score.value for score in mixture(samples(2))] == [1.5, -0.5]
    assert mixture(samples(1))[0].parts == {"a": 1.0, "b": 0.5}
    assert mixture([]) == []


def test_parts_of_a_part_stand_under_its_name() -> None:
    mixture = Mixture([DirectReward("code", lambda sample: Score(0.5, parts={"passed": 3.0}))])
    assert mixture(samples(1))[0].parts == {"code": 0.5, "code/passed": 3.0}


def test_a_failed_part_leaves_the_sample_without_a_score() -> None:
    mixture = Mixture([says("a", 1.0), says("b", None, 1.0)], most_failures=0.5)
    scores = mixture(samples(2))
    assert [score.value for score in scores] == [None, 2.0] and scores[0].why == "b: broken"
    assert scores[0].parts == {"a": 1.0, "b": None}
    assert mixture.counts == {"a": {"scored": 2}, "b": {"scored": 1, "value": 1}}


def test_a_silent_part_is_left_out_of_the_sum_or_leaves_the_sample_out() -> None:
    parts = [says("a", 1.0), says("b", None, 2.0, why=ABSTAINED)]
    assert [score.value for score in Mixture(parts)(samples(2))] == [1.0, 3.0]
    dropped = Mixture(parts, abstain="drop")(samples(2))
    assert [score.value for score in dropped] == [None, 3.0] and dropped[0].why == ABSTAINED
    silent = Mixture([says("b", None, why=ABSTAINED)])(samples(4))
    assert [score.why for score in silent] == [ABSTAINED] * 4  # on purpose: the run goes on


@pytest.mark.fault(15)
def test_more_failures_than_allowed_stop_the_run_and_show_the_first() -> None:
    mixture = Mixture([says("a", None, None, 1.0)], most_failures=0.6)
    with pytest.raises(InputError, match="2 of 3 samples could not be scored") as error:
        mixture(samples(3))
    assert "2 x a: broken" in str(error.value) and "completion: 'c'" in str(error.value)
    assert Mixture([says("a", None, None, 1.0)], most_failures=2 / 3)(samples(3))[2].value == 1.0
    assert Mixture([says("a", None)], most_failures=1.0)(samples(3))[0].value is None


@pytest.mark.parametrize(
    "call",
    [
        lambda given: [Score(1.0)],
        lambda given: 1 / 0,
        lambda given: None,
        lambda given: [Score(float("nan"))] * len(given),
        lambda given: [Score(float("inf"))] * len(given),
        lambda given: [Score(-1e39)] * len(given),  # becomes an infinity in single precision
        lambda given: [1.0] * len(given),
    ],
    ids=["length", "raises", "none", "nan", "infinity", "too large", "numbers"],
)
@pytest.mark.fault(15, 17)
def test_a_reward_object_that_breaks_its_promise_gives_no_score(call: Callable[..., Any]) -> None:
    scores = Mixture([Own(call), says("a", 1.0)], most_failures=1.0)(samples(2))
    assert [score.value for score in scores] == [None, None] and scores[0].parts["a"] == 1.0


@pytest.mark.parametrize("weights", [[1e300, 0.0], [1e38, 3e38], [1e308, -1e308]])
def test_a_sum_that_single_precision_cannot_hold_is_no_score(weights: list[float]) -> None:
    parts = [says("a", 1.0, 1e10), says("b", 1.0, 1e10)]
    scores = Mixture(parts, weights, most_failures=1.0)(samples(2))
    assert scores[1].value is None and "weighted sum" in scores[1].why
    assert scores[1].parts == {"a": 1e10, "b": 1e10}


def test_the_scores_of_an_object_are_counted() -> None:
    given = [Score(1.0), Score(None, ABSTAINED), Score(None, "broken"), Score(float("nan"))]
    mixture = Mixture([Own(lambda samples: given)])
    mixture(samples(4))
    assert mixture.counts == {"own": {"scored": 1, "abstained": 1, "value": 2}}
    assert "reward own: broken" in mixture.failures["own"].first


def test_rewards_work_at_the_same_time_and_are_closed_together() -> None:
    together = threading.Barrier(2, timeout=10)

    def wait(given: Sequence[Sample]) -> list[Score]:
        together.wait()
        return [Score(1.0)] * len(given)

    first, second = Own(wait), Own(wait)
    second.name = "second"
    mixture = Mixture([first, second])
    assert [score.value for score in mixture(samples(2))] == [2.0, 2.0]
    mixture.close()
    assert first.closed and second.closed


def test_weights_and_names_must_fit() -> None:
    with pytest.raises(ValueError, match="1 for 2 rewards"):
        Mixture([says("a", 1.0), says("b", 1.0)], [1.0])
    with pytest.raises(ValueError, match=r"not all different.*rename a function"):
        Mixture([says("a", 1.0), says("a", 1.0)])

"""Drift is the rise of the start model's own answers' nll over its first value; small betas on few rows are a note."""

from __future__ import annotations

import math
import random

import pytest
from streams import found, merged, updates, watched

from prefopt.detectors import Run
from prefopt.detectors.drift import Drift
from prefopt.detectors.low_beta import LowBeta

DRIFT = Drift(unverified="sick")  # so that its levels are seen
DPO = Run("dpo", {"beta": 0.01, "epochs": 4.0})


def probe(*values: float) -> list:
    return [(10 * at, {"eval/probe_nll": value}) for at, value in enumerate(values)]


def test_a_rise_is_a_warning_and_then_sick() -> None:
    warned = found(DRIFT, probe(2.0, 2.2, 2.6), DPO)
    assert warned is not None and (warned.level, warned.since, warned.step) == ("warn", 20, 20)
    sick = found(DRIFT, probe(2.0, 2.2, 2.6, 3.1), DPO)
    assert sick is not None and (sick.level, sick.since, sick.step) == ("sick", 20, 30)
    assert sick.value == pytest.approx(1.1) and sick.evidence["fine_at"] == 10


def test_the_change_trains_online_where_there_is_a_reward_and_else_raises_beta() -> None:
    assert found(DRIFT, probe(2.0, 3.5), DPO).change == {"beta": 0.1, "epochs": 1.0}
    assert found(DRIFT, probe(2.0, 3.5), Run("dpo", {"beta": 0.1})).change == {"beta": 0.3}
    judged = found(DRIFT, probe(2.0, 3.5), Run("dpo", {"beta": 0.1, "probe_reward": "math"}))
    assert judged.change == {"objective": "online_dpo", "reward": "math"} and "Label more pairs" in judged.remedy
    rate = Run("simpo", {"beta": 2.0, "learning_rate": 3e-7})
    assert found(DRIFT, probe(2.0, 3.5), rate).change["learning_rate"] == pytest.approx(1e-7)


def test_it_is_a_note_as_it_comes_where_no_reward_says_that_it_did_harm() -> None:
    assert found(Drift(), probe(2.0, 3.5), DPO).level == "info"
    assert found(Drift(), with_gain(0.0, 0.0), DPO).level == "sick"


def test_a_little_is_normal_and_a_high_level_is_not_a_rise() -> None:
    assert found(DRIFT, probe(2.0, 2.2, 2.3, 2.4), DPO) is None
    assert found(DRIFT, probe(5.0, 5.1, 4.9), DPO) is None


def compared(trained: float, held_out: float) -> list:
    """Updates that tell so many of their rows apart, and evaluations where the probe's nll rises by 1.5."""
    lines = updates(20, rewards__accuracies=trained, loss=0.3)
    return merged(lines, [(at, {**values, "eval/rewards/accuracies": held_out}) for at, values in probe(2.0, 3.5, 3.5)])


def test_a_rise_is_a_note_where_held_out_rows_are_told_apart_as_well_as_trained_ones() -> None:
    assert found(DRIFT, compared(0.75, 0.72), DPO).level == "info"
    by_heart = found(DRIFT, compared(0.95, 0.72), DPO)
    assert by_heart.level == "sick" and by_heart.evidence["gap"] == pytest.approx(0.23)


def with_gain(*gains: float, rise: float = 1.5, error: float = 0.08) -> list:
    """Evaluations of a reward, where the probe's nll rises at the first update."""
    lines = probe(2.0, *[2.0 + rise] * (len(gains) - 1))
    judged = [{"eval/probe_gain": gain, "eval/probe_gain_error": error} for gain in gains]
    return [(at, {**values, **own}) for (at, values), own in zip(lines, judged, strict=True)]


def test_a_reward_says_whether_going_far_did_harm() -> None:
    assert found(DRIFT, with_gain(0.0, 0.11), DPO).level == "info"
    none = found(DRIFT, with_gain(0.0, 0.09), DPO)
    assert none.level == "sick" and "+0.09 standard deviations" in none.reason and none.evidence["gain"] == 0.09
    # best: the mean of two neighbours, 0.8. Of four evaluations noise is 0.08 (2 ln 4)^0.5 = 0.133: a fall of 0.28
    assert found(DRIFT, with_gain(0.0, 0.8, 0.8, 0.53), DPO).level == "info"
    assert found(DRIFT, with_gain(0.0, 0.8, 0.8, 0.49), DPO).level == "sick"
    assert found(DRIFT, with_gain(0.0, 0.4, 1.0, 0.49), DPO).level == "info"  # its neighbours do not say 1.0
    assert found(DRIFT, with_gain(0.0, 0.8, 0.8, 0.49, error=0.2), DPO).level == "info"
    for rise, level in ((0.7, "info"), (1.5, "sick")):  # near the start held-out rows have to say so too
        lines = merged(updates(9, rewards__accuracies=0.75), with_gain(0.0, 0.0, rise=rise))
        assert found(DRIFT, [(at, {**v, "eval/rewards/accuracies": 0.72}) for at, v in lines], DPO).level == level


def test_noise_alone_is_no_fall() -> None:
    """20 evaluations of an answer to each of 200 prompts, whose quality stays as it is, in 100 runs."""
    chance, error = random.Random(0), 1.1 / math.sqrt(200)
    runs = [[0.0, *(chance.gauss(0.6, error) for _ in range(20))] for _ in range(100)]
    assert sum(found(DRIFT, with_gain(*gains, error=error), DPO).level == "sick" for gains in runs) <= 10


def test_where_the_reward_failed_held_out_rows_are_asked() -> None:
    unknown = with_gain(0.0, math.nan)
    assert found(DRIFT, unknown, DPO).level == "sick" and "gain" not in found(DRIFT, unknown, DPO).reason


def test_an_update_says_nothing_and_what_is_meant_to_leave_the_start_is_not_judged() -> None:
    assert watched(DRIFT, [(1, {"loss": 9.0, "nll": 9.0})], DPO).votes == {}
    assert found(DRIFT, probe(2.0, 4.0), Run("orpo")) is None


def test_it_is_over_when_the_policy_is_back() -> None:
    finding = watched(DRIFT, probe(2.0, 3.5, 2.1), DPO).find("drift")
    assert finding is not None and finding.recovered == 20


def test_a_low_beta_is_a_note_on_few_rows_that_are_seen_more_than_once() -> None:
    line = [(1, {"loss": 0.69, "epoch": 0.1})]
    few = found(LowBeta(), line, Run("dpo", {"beta": 0.01, "epochs": 3.0}, rows=300))
    assert few is not None and few.level == "info" and few.change == {"beta": 0.1}
    assert found(LowBeta(), line, Run("dpo", {"beta": 0.01, "epochs": 3.0}, rows=60_000)) is None
    assert found(LowBeta(), line, Run("dpo", {"beta": 0.01, "epochs": 1.0}, rows=300)) is None
    assert found(LowBeta(), line, Run("dpo", {"beta": 0.1, "epochs": 3.0}, rows=300)) is None
    assert found(LowBeta(), line, Run("simpo", {"beta": 0.01, "epochs": 3.0}, rows=300)) is None

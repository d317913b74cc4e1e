"""Pairs told apart at once are a suspicion; pairs of the start model's own answers confirm it or take it back."""

from __future__ import annotations

import pytest
from streams import between, found, merged, noisy, updates

from prefopt.detectors import Run, Watch
from prefopt.detectors.drift import Drift
from prefopt.detectors.hollow_margin import HollowMargin

DPO = Run("dpo", {"beta": 0.1, "epochs": 1.0})
APART = updates(
    100,
    loss=between(0.69, 0.01, 30),
    rewards__accuracies=lambda step: 0.5 if step < 5 else 1.0,
    rewards__margins=between(0.0, 4.0, 30),
    epoch=lambda step: step / 100,
)


def asked(accuracy: float, pairs: float = 200.0) -> list:
    """Evaluations at the start and after 40 updates."""
    values = {"eval/probe_accuracy": accuracy, "eval/probe_pairs": pairs}
    return [(0, {**values, "eval/probe_accuracy": 0.5}), (40, values)]


def test_pairs_told_apart_at_once_are_unverified_without_a_reward() -> None:
    finding = found(HollowMargin(), APART, DPO)
    assert finding is not None and finding.level == "warn" and "unverified" in finding.reason
    assert finding.evidence["epoch"] <= 0.5 and "probe_reward" in finding.remedy


def test_own_answers_that_are_not_told_apart_make_it_sick() -> None:
    run = Run("dpo", {"probe_reward": "math"})
    finding = found(HollowMargin(), merged(APART, asked(0.50)), run)
    assert finding is not None and finding.level == "sick"
    # Wilson, 95 %: 100 of 200 is at most 0.569
    assert finding.evidence["upper"] == pytest.approx(0.5686, abs=1e-4)
    assert finding.change == {"objective": "online_dpo", "reward": "math"}


def test_margins_that_a_small_beta_keeps_small_are_hollow_too_once_a_reward_says_so() -> None:
    small = updates(60, loss=0.5, rewards__accuracies=1.0, rewards__margins=0.5, epoch=lambda step: step / 100)
    assert found(HollowMargin(), small, DPO) is None
    assert found(HollowMargin(), merged(small, asked(0.50)), DPO).level == "sick"
    assert found(HollowMargin(), merged(small, asked(0.73)), DPO) is None


def test_own_answers_that_are_told_apart_take_the_suspicion_back() -> None:
    assert found(HollowMargin(), merged(APART, asked(0.73)), DPO) is None


def test_too_few_pairs_cannot_make_it_sick() -> None:
    # 7 of 12 may be up to 0.81
    finding = found(HollowMargin(), merged(APART, asked(0.58, pairs=12.0)), DPO)
    assert finding is None or finding.level != "sick"


def test_own_answers_near_chance_are_no_hollow_margin_where_pairs_are_not_told_apart_either() -> None:
    noise = updates(100, loss=noisy(0.68, 0.02), rewards__accuracies=noisy(0.55, 0.1), rewards__margins=0.05, epoch=0.1)
    assert found(HollowMargin(), merged(noise, asked(0.5)), DPO) is None


def test_a_healthy_run_is_none() -> None:
    healthy = updates(
        200,
        loss=noisy(between(0.69, 0.45, 200), 0.05),
        rewards__accuracies=noisy(between(0.5, 0.8, 200), 0.1),
        rewards__margins=between(0.0, 1.0, 200),
        epoch=lambda step: step / 200,
    )
    assert found(HollowMargin(), healthy, DPO) is None


def test_pairs_of_the_last_updates_count_together() -> None:
    """Small updates tell all of their pairs apart in some and not in others."""
    for wrong, level in ((3, "sick"), (5, None)):  # of 32, in every second update: 0.953 and 0.922 in all
        small = updates(60, loss=0.1, rewards__accuracies=lambda step, n=wrong: 1 - n / 32 * (step % 2), epoch=0.1)
        finding = found(HollowMargin(), merged(small, asked(0.5)), DPO)
        assert (finding and finding.level) == level
        alone = found(HollowMargin(), small, DPO)
        assert (alone and alone.level) == (level and "warn")


def test_rows_that_are_known_by_heart_after_epochs_are_no_hollow_margin() -> None:
    late = updates(
        300,
        loss=lambda step: 0.6 if step < 100 else 0.05,
        rewards__accuracies=lambda step: 0.7 if step < 100 else 1.0,
        rewards__margins=lambda step: 0.3 if step < 100 else 3.0,
        epoch=lambda step: step / 100,
    )
    assert found(HollowMargin(), late, DPO) is None


def test_the_loss_alone_says_nothing() -> None:
    assert found(HollowMargin(), updates(100, loss=0.01, epoch=0.1), DPO) is None
    assert found(HollowMargin(), updates(100, loss=0.01, rewards__accuracies=0.9, epoch=0.1), DPO) is None


LEARNT = updates(
    160,
    loss=between(0.69, 0.01, 60),
    rewards__accuracies=lambda step: 1.0 if step > 30 else 0.6,
    rewards__margins=between(0.0, 4.0, 60),
    epoch=lambda step: step / 2,
)


def evaluated(held_out: float | None, gain: float = -0.3) -> list:
    """Evaluations at the start and after 80 and 160 updates: own answers not told apart, far from the start."""
    known = {} if held_out is None else {"eval/rewards/accuracies": held_out}
    values = {"eval/probe_accuracy": 0.5, "eval/probe_pairs": 200.0, "eval/probe_nll": 4.0, "eval/probe_gain": gain}
    start = {"eval/probe_accuracy": 0.5, "eval/probe_pairs": 200.0, "eval/probe_nll": 2.0, "eval/probe_gain": 0.0}
    error = {"eval/probe_gain_error": 0.08}
    return [(0, {**start, **known, **error}), *((step, {**values, **known, **error}) for step in (80, 160))]


def both(stream: list) -> dict[str, str]:
    """Levels that last, of hollow_margin and drift in one watch."""
    watch = Watch(Run("dpo", {"probe_reward": "math"}), [HollowMargin(), Drift()])
    for step, values in stream:
        watch.listen(step, values)
    return {finding.name: finding.level for finding in watch.findings if finding.lasts}


@pytest.mark.parametrize(
    ("share", "held_out", "level"),
    [(0.85, 0.82, "sick"), (0.85, 0.60, None), (0.75, 0.74, None), (0.85, None, None), (1.0, None, "sick")],
)
def test_most_pairs_are_enough_where_held_out_ones_are_told_apart_like_them(
    share: float, held_out: float | None, level: str | None
) -> None:
    """A mark that is learnt as a taste, and not to the last pair."""
    most = updates(80, loss=0.4, rewards__accuracies=share, rewards__margins=1.0, epoch=lambda step: step / 100)
    known = {} if held_out is None else {"eval/rewards/accuracies": held_out}
    finding = found(HollowMargin(), merged(most, [(step, {**own, **known}) for step, own in asked(0.42)]), DPO)
    assert (finding and finding.level) == level


def test_held_out_rows_count_when_they_are_measured_in_a_line_of_their_own() -> None:
    apart = [(39, {"eval/rewards/accuracies": 0.85})]
    most = updates(80, loss=0.4, rewards__accuracies=0.85, rewards__margins=1.0, epoch=lambda step: step / 100)
    assert found(HollowMargin(), merged(merged(most, asked(0.42)), apart), DPO).level == "sick"


def test_pairs_told_apart_before_they_were_seen_twice_are_not_known_by_heart() -> None:
    held_out = [(step, {**own, "eval/rewards/accuracies": 0.6}) for step, own in asked(0.5)]
    assert found(HollowMargin(), merged(APART, held_out), DPO).level == "sick"


def test_a_mark_that_held_out_rows_have_too_is_a_hollow_margin_and_drift_its_consequence() -> None:
    assert both(merged(LEARNT, evaluated(0.97))) == {"hollow_margin": "sick", "drift": "info"}


def test_pairs_learnt_by_heart_are_no_hollow_margin_and_drift_says_it() -> None:
    assert both(merged(LEARNT, evaluated(0.55))) == {"drift": "sick"}
    # trained 1.0: told apart like held-out rows up to a difference of 0.2
    assert "hollow_margin" in both(merged(LEARNT, evaluated(0.81)))
    assert "hollow_margin" not in both(merged(LEARNT, evaluated(0.79)))


def test_where_held_out_rows_are_not_known_pairs_told_apart_after_epochs_are_learnt_by_heart() -> None:
    assert both(merged(LEARNT, evaluated(None))) == {"drift": "sick"}  # first at update 38, epoch 19
    for epochs, level in ((3.0, "sick"), (5.0, None)):  # all 8 updates tell them apart at update 38
        stream = [(s, {**v, "epoch": s / 38 * epochs} if "epoch" in v else v) for s, v in LEARNT]
        assert both(merged(stream, evaluated(None))).get("hollow_margin") == level
    unknown = [(step, {n: v for n, v in values.items() if n != "epoch"}) for step, values in LEARNT]
    assert both(merged(unknown, evaluated(None)))["hollow_margin"] == "sick"

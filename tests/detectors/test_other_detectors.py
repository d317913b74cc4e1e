"""Every other detector on a stream that is sick, one that is healthy, and one that only looks like it."""

from __future__ import annotations

from typing import Any

import pytest
from streams import between, found, merged, noisy, updates

from prefopt.detectors import EVERY, Run

GRPO = Run("grpo", {"learning_rate": 1e-6, "beta": 0.04, "max_tokens": 64, "dynamic_sampling": False}, steps=400)
DPO = Run("dpo", {"beta": 0.1, "epochs": 3.0}, steps=400)


def evaluations(steps: int, **metrics: Any) -> list:
    """An evaluation at the start and after every 10 updates; `eval__x` is `eval/x`."""
    return [
        (step, {name.replace("__", "/"): value(step) for name, value in metrics.items()})
        for step in range(0, steps + 1, 10)
    ]


def reward(start: float, end: float, steps: int = 100) -> Any:
    return noisy(between(start, end, steps), 0.02)


# name -> run, sick stream, level, healthy stream, misleading stream
CASES: dict[str, tuple[Run, Any, str, Any, Any]] = {
    "memorising": (
        DPO,
        merged(
            updates(100, rewards__accuracies=between(0.5, 1.0, 50)),
            evaluations(100, eval__rewards__accuracies=lambda step: 0.55, eval__loss=lambda step: 0.7),
        ),
        "info",
        merged(
            updates(100, rewards__accuracies=between(0.5, 0.8, 100)),
            evaluations(100, eval__rewards__accuracies=lambda step: 0.5 + 0.002 * step, eval__loss=lambda step: 0.6),
        ),
        # before the first update every margin is 0, and so is the accuracy: there is no trained row to compare with
        merged(
            updates(100, rewards__accuracies=0.75),
            [(0, {"eval/rewards/accuracies": 0.0}), (0, {"eval/rewards/accuracies": 0.0})],
        ),
    ),
    "over_optimisation": (
        GRPO,
        merged(
            updates(100, reward=reward(0.2, 0.9), reward_std=0.3),
            evaluations(100, eval__reward=lambda step: 0.2 + 0.01 * min(step, 100 - step)),
        ),
        "info",
        merged(
            updates(100, reward=reward(0.2, 0.9), reward_std=0.3),
            evaluations(100, eval__reward=lambda step: 0.2 + 0.006 * step),
        ),
        # both fall: the run gets worse, which is not this
        merged(
            updates(100, reward=lambda step: 0.2 + 0.01 * min(step, 100 - step), reward_std=0.3),
            evaluations(100, eval__reward=lambda step: 0.2 + 0.01 * min(step, 100 - step)),
        ),
    ),
    "no_preference": (
        DPO,
        updates(120, rewards__accuracies=noisy(0.5, 0.1)),
        "info",
        updates(120, rewards__accuracies=noisy(between(0.5, 0.75, 120), 0.1)),
        updates(45, rewards__accuracies=0.5),  # too few updates to say
    ),
    "zero_variance": (
        GRPO,
        updates(50, zero_variance__failed=0.85, zero_variance__solved=0.0),
        "info",
        updates(50, zero_variance__failed=0.2, zero_variance__solved=0.3),
        updates(5, zero_variance__failed=0.9, zero_variance__solved=0.0),  # a slow start
    ),
    "entropy": (
        GRPO,
        updates(100, entropy=between(2.0, 0.1, 60), reward=noisy(0.2, 0.05)),
        "warn",
        updates(100, entropy=between(2.0, 1.0, 100), reward=reward(0.2, 0.6)),
        # entropy falls because the reward rises: how such runs learn
        updates(100, entropy=between(2.0, 0.1, 100), reward=reward(0.1, 0.9)),
    ),
    "length": (
        GRPO,
        updates(60, completion_length=between(40.0, 100.0, 40)),
        "info",
        updates(60, completion_length=noisy(50.0, 10.0)),
        updates(60, completion_length=lambda step: 200.0 if step == 30 else 50.0),  # one long rollout
    ),
    "truncation": (
        GRPO,
        updates(40, finished=between(1.0, 0.5, 40)),
        "warn",
        updates(40, finished=noisy(0.97, 0.02)),
        updates(40, finished=lambda step: 0.5 if step % 10 == 0 else 0.98),  # now and then
    ),
    "repetition": (
        GRPO,
        updates(40, repetition=between(0.02, 0.6, 30)),
        "info",
        updates(40, repetition=noisy(0.05, 0.03)),
        updates(40, repetition=noisy(0.4, 0.05)),  # tables, code: as much at the start
    ),
    "distance": (
        GRPO,
        updates(40, kl_reference=between(0.0, 30.0, 40), completion_length=20.0),
        "info",
        updates(40, kl_reference=noisy(between(0.0, 4.0, 40), 0.02), completion_length=20.0),
        updates(40, kl_reference=noisy(12.0, 1.0), completion_length=400.0),  # 0.03 nats a token
    ),
    "clipping": (
        GRPO,
        updates(20, clip_fraction__low=0.2, clip_fraction__high=0.25),
        "warn",
        updates(20, clip_fraction__low=0.02, clip_fraction__high=0.03),
        updates(20, clip_fraction__low=0.0, clip_fraction__high=0.0),  # one update per rollout
    ),
    "critic": (
        Run("ppo"),
        updates(150, value__explained_variance=-0.4),
        "warn",
        updates(150, value__explained_variance=between(-0.5, 0.6, 100)),
        updates(100, value__explained_variance=-0.9),  # not trained yet
    ),
    "sampler_mismatch": (
        GRPO,
        updates(10, sampler_gap=0.3),
        "warn",
        updates(10, sampler_gap=1e-5),
        updates(10, sampler_gap=0.02),  # rounding of 16 bits
    ),
    "gradients": (
        GRPO,
        updates(60, grad_norm=lambda step: 100.0 if step > 50 and step % 2 else 1.0),
        "info",
        updates(60, grad_norm=noisy(1.0, 0.5)),
        updates(60, grad_norm=lambda step: 50.0 if step == 55 else 1.0),  # a single jump
    ),
    "unscored": (
        GRPO,
        updates(10, unscored=0.4),
        "warn",
        updates(10, unscored=0.0),
        updates(10, unscored=lambda step: 0.5 if step == 5 else 0.0),  # a slow server, once
    ),
}
ELSEWHERE = {"hollow_margin", "sparse_reward", "drift", "orpo_start", "low_beta"}


def test_every_detector_has_its_streams() -> None:
    assert CASES.keys() | ELSEWHERE == EVERY.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_sick_stream_is_found(name: str) -> None:
    run, sick, level, _, _ = CASES[name]
    finding = found(EVERY[name](), sick, run)
    assert finding is not None and finding.level == level
    assert finding.reason and finding.remedy and finding.value is not None and finding.threshold is not None


@pytest.mark.parametrize("name", CASES)
def test_a_healthy_stream_is_not(name: str) -> None:
    run, _, _, healthy, _ = CASES[name]
    assert found(EVERY[name](), healthy, run) is None


@pytest.mark.parametrize("name", CASES)
def test_a_stream_that_looks_like_it_is_not(name: str) -> None:
    run, _, _, _, misleading = CASES[name]
    assert found(EVERY[name](), misleading, run) is None


@pytest.mark.parametrize(("beta", "level"), [(0.01, None), (0.1, "info"), (1.0, None), (None, "info")])
def test_a_held_out_loss_that_turns_up_counts_near_beta_0_1_alone(beta: float | None, level: str | None) -> None:
    stream = evaluations(100, eval__loss=lambda step: 0.6 - 0.003 * min(step, 50) + 0.004 * max(step - 50, 0))
    finding = found(EVERY["memorising"](), stream, Run("dpo", {"beta": beta} if beta else {}))
    assert (finding.level if finding else None) == level


def test_a_fall_of_the_chosen_answers_is_no_finding_of_any_detector() -> None:
    healthy = updates(
        100,
        loss=noisy(between(0.69, 0.5, 100), 0.05),
        logps__chosen=between(-20.0, -40.0, 100),
        logps__rejected=between(-20.0, -60.0, 100),
        rewards__chosen=between(0.0, -2.0, 100),
        rewards__margins=between(0.0, 1.0, 100),
        rewards__accuracies=noisy(between(0.5, 0.75, 100), 0.1),
        epoch=lambda step: step / 100,
        grad_norm=noisy(1.0, 0.3),
    )
    assert [name for name, cls in EVERY.items() if found(cls(), healthy, DPO)] == []


def test_a_distance_below_nothing_is_a_warning() -> None:
    finding = found(EVERY["distance"](), updates(20, kl_reference=noisy(-1.0, 0.2), completion_length=20.0), GRPO)
    assert finding is not None and finding.level == "warn" and "below 0" in finding.reason
    assert found(EVERY["distance"](), updates(20, kl_reference=noisy(0.0, 0.04)), GRPO) is None


def test_updates_that_were_skipped_are_a_warning() -> None:
    stream = [(step, {"skipped": float(step)}) for step in range(1, 6)]
    assert found(EVERY["gradients"](), stream, GRPO).level == "warn"


def test_completions_that_were_always_cut_are_a_note() -> None:
    finding = found(EVERY["truncation"](), updates(20, finished=0.4), GRPO)
    assert finding is not None and finding.level == "info" and finding.change == {"max_tokens": 128}


def test_most_groups_solved_is_said_as_such() -> None:
    finding = found(EVERY["zero_variance"](), updates(20, zero_variance__solved=0.9, zero_variance__failed=0.0), GRPO)
    assert finding is not None and finding.level == "info" and "solved" in finding.reason


def test_a_solved_task_may_lose_its_entropy() -> None:
    stream = updates(100, entropy=between(2.0, 0.05, 40), reward=noisy(0.98, 0.01))
    assert found(EVERY["entropy"](), stream, GRPO) is None


def test_gspo_clips_by_whole_completions_and_is_not_judged() -> None:
    stream = updates(20, clip_fraction__low=0.4, clip_fraction__high=0.4)
    assert found(EVERY["clipping"](), stream, Run("gspo")) is None

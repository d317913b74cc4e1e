"""A function gives the same numbers as when TRL 1.16's own trainer calls it."""

from __future__ import annotations

import contextlib
import math
import types
from collections import defaultdict
from typing import Any

import pytest
from trl_functions import FUNCTIONS, IDS, every_argument

from prefopt.records import Sample
from prefopt.rewards import FunctionReward

trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.*")


def trl_values(function: Any, samples: list[Sample]) -> tuple[list[float], dict[str, list[Any]]]:
    """What GRPOTrainer computes from the function, by its own method."""
    import torch
    from trl.trainer import grpo_trainer

    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["it"],
        state=types.SimpleNamespace(global_step=3),
        environments=None,
        _log_metric=lambda name, value: None,
        _pending_extra_logs=defaultdict(list),
    )
    trainer._log_completion_extra = types.MethodType(grpo_trainer.GRPOTrainer._log_completion_extra, trainer)
    thread, trainer.async_loop, ready = grpo_trainer.start_event_loop_in_daemon(name="parity")
    ready.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer, "gather", lambda x: x)
        patch.setattr(grpo_trainer, "logger", types.SimpleNamespace(warning=lambda text: None))
        patch.setattr(grpo_trainer, "profiling_context", lambda trainer, name: contextlib.nullcontext())
        rows = [{"prompt": sample.prompt, **sample.columns} for sample in samples]
        found = grpo_trainer.GRPOTrainer._calculate_rewards.__wrapped__(  # less its timing
            trainer,
            rows,
            [sample.prompt for sample in samples],
            [sample.completion for sample in samples],
            [list(sample.tokens) for sample in samples],
        )
    grpo_trainer.shutdown_event_loop_in_daemon(thread, trainer.async_loop)
    return found[:, 0].tolist(), dict(trainer._pending_extra_logs)


def batch(conversational: bool) -> list[Sample]:
    said: list[Any] = ["one", "two two", "", "4"]
    if conversational:
        said = [[{"role": "assistant", "content": text}] for text in said]
    prompt: Any = [{"role": "user", "content": "count"}] if conversational else "count"
    rows = [{"answer": str(n), "level": n} for n in range(1, 5)]
    ids = [[1, 2], [3], [], [4, 4, 4]]
    return [Sample(prompt, c, i, columns=row) for c, i, row in zip(said, ids, rows, strict=True)]


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS)
def test_the_same_function_gives_the_same_numbers(function: Any, conversational: bool) -> None:
    samples = batch(conversational)
    expected, logged = trl_values(function, samples)
    reward = FunctionReward(function)
    reward.state = {"global_step": 3}
    try:
        scores = reward(samples)
    finally:
        reward.close()
    assert [math.nan if score.value is None else score.value for score in scores] == pytest.approx(
        expected, nan_ok=True
    )
    assert reward.extra == logged
    assert reward.metrics == ({"right": 0.5} if function is every_argument else {})


def test_trl_own_rewards_run_unchanged() -> None:
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

    said = ["<think>x</think>y", "x", "<think>a</think>", "b"]
    samples = [
        Sample([{"role": "user", "content": "p"}], [{"role": "assistant", "content": text}], [1, 2] * (n + 1))
        for n, text in enumerate(said)
    ]
    for function in (think_format_reward, get_repetition_penalty_reward(2), get_soft_overlong_punishment(6, 3)):
        expected, _ = trl_values(function, samples)
        reward = FunctionReward(function)
        try:
            assert [score.value for score in reward(samples)] == pytest.approx(expected)
        finally:
            reward.close()

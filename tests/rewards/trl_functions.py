"""Reward functions as people write them for TRL; a module of its own, because every process imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def lengths(completions: list[Any], **others: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def tokens(completion_ids: list[list[int]], **others: Any) -> list[float]:
    return [sum(ids) / 7 for ids in completion_ids]


def every_argument(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    answer: list[str],
    trainer_state: Any,
    log_extra: Callable[..., None],
    log_metric: Callable[..., None],
    **others: Any,
) -> list[float]:
    log_extra("answer", answer)
    log_metric("right", 0.5)
    assert sorted(others) == ["level"], sorted(others)
    said = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(right in text) + trainer_state.global_step for right, text in zip(answer, said, strict=True)]


def sometimes_silent(completions: list[Any], level: list[int], **others: Any) -> list[float | None]:
    return [None if each == 2 else each / 3 for each in level]


def bools(completions: list[Any], level: list[int], **others: Any) -> list[bool]:
    return [each > 1 for each in level]


def scalars(completions: list[Any], level: list[int], **others: Any) -> Any:
    import numpy

    return numpy.array(level, numpy.float32) / 3


async def asynchronous(completions: list[Any], level: list[int], **others: Any) -> list[float]:
    return [each * 1.5 for each in level]


class Stateful:
    async def __call__(self, completions: list[Any], level: list[int], **others: Any) -> list[float]:
        return [each * 2.5 for each in level]


FUNCTIONS = [lengths, tokens, every_argument, sometimes_silent, bools, scalars, asynchronous, Stateful()]
IDS = [getattr(function, "__name__", "Stateful") for function in FUNCTIONS]

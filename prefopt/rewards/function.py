"""A function as a reward: TRL's signature, run where it can be killed."""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cloudpickle

from prefopt.records import InputError, Message, Sample, Score
from prefopt.rewards.channel import ABSTAINED, DEADLINE, DIED, VALUE, Given, Refused, short
from prefopt.rewards.pool import Job, Pool

log = logging.getLogger("prefopt")

# `prompt` and its like stand in the row under names of their own; TRL leaves them out, too
NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})


@dataclass(frozen=True)
class Limits:
    """seconds: for a call with a whole batch. sample_seconds: for one sample, None for as long as the call.
    workers: processes that share a batch. memory: bytes of data for each, None for no limit.
    unit: the smallest part of a batch that the function may be given alone: a sample, or all samples of a prompt.
    """

    seconds: float = 60.0
    sample_seconds: float | None = None
    workers: int = 1
    memory: int | None = None
    unit: Literal["sample", "group"] = "sample"


@dataclass
class Failures:
    """What became of a reward's samples. counts: by kind, `scored` and `abstained` among them. first: the first
    failure, with its sample and, where the function raised, its traceback.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def note(self, name: str, kind: str, sample: Sample, why: str, traceback: str = "") -> None:
        self.counts[kind] += 1
        if not self.first:
            self.first = f"reward {name}: {why}\nprompt: {short(sample.prompt, 400)}\n"
            self.first += f"completion: {short(sample.completion, 400)}" + f"\n{traceback.rstrip()}" * bool(traceback)
            log.warning("%s\nSuch samples are left out and counted; this is said once.", self.first)

    def count(self, name: str, samples: Sequence[Sample], scores: Sequence[Score]) -> None:
        """Note each sample by its score alone."""
        for sample, score in zip(samples, scores, strict=True):
            if score.value is not None or score.why == ABSTAINED:
                self.counts["scored" if score.value is not None else ABSTAINED] += 1
            else:
                self.note(name, VALUE, sample, score.why)


class FunctionReward:
    """A function with TRL's signature, `f(prompts, completions, **columns) -> list[float | None]`, sync or async.

    It runs in processes of its own with a deadline. None abstains. What raises, hangs, dies, or returns what is no
    number leaves its samples without a score: a batch that raised, died or came back with the wrong length is tried
    again unit by unit, so that only the guilty sample is lost. One that took half of the deadline is tried again in
    halves, and they in halves, for as long as there is time. A sample alone whose process died is tried once more.
    function: the function, or `file.py:function`, which is imported in those processes only.
    InputError if it cannot be loaded.
    """

    def __init__(self, function: Callable[..., Any] | str, limits: Limits | None = None, name: str = "") -> None:
        self.limits = limits or Limits()
        self.name = name or name_of(function)
        self.failures = Failures()
        # columns given to `log_extra` and means of what was given to `log_metric`, by the last call
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, float] = {}
        # what the function sees as trainer_state
        self.state: dict[str, Any] = {"global_step": 0, "max_steps": 0, "epoch": 0.0}
        self._pool = Pool(packed(function), self.limits.workers, self.limits.memory)
        if error := self._pool.start():
            self._pool.close()
            raise InputError(f"reward {self.name}: {error.why}" + f"\n{error.traceback}" * bool(error.traceback))

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        until = time.monotonic() + self.limits.seconds
        scores: list[Score | None] = [None] * len(samples)
        self.extra = {}
        metrics: dict[str, list[float]] = {}
        queue = deque(self._jobs(samples))
        for job, outcome in self._pool.run(queue, until):
            if isinstance(outcome, Given):
                self._take(job, outcome, samples, scores)
                for name, values in outcome.metrics.items():
                    metrics.setdefault(name, []).extend(values)
            elif _worth_another(job, outcome) and time.monotonic() < until:
                size = math.ceil(len(job.units) / 2) if outcome.kind == DEADLINE else 1
                queue.extend(self._job(samples, units, _share(len(units)), True) for units in _cut(job.units, size))
            else:
                self._lose(job, outcome, samples, scores)
        self.metrics = {name: math.fsum(values) / len(values) for name, values in metrics.items()}
        return [score or Score(None, "not answered") for score in scores]

    def close(self) -> None:
        self._pool.close()

    @property
    def counts(self) -> Counter[str]:
        return self.failures.counts

    def _take(self, job: Job, given: Given, samples: Sequence[Sample], scores: list[Score | None]) -> None:
        for position, (value, why) in zip(job.positions, given.scores, strict=True):
            scores[position] = score = Score(value, why)
            self.failures.count(self.name, [samples[position]], [score])
        for column, values in given.extra.items():
            # a column that is not one value for each sample belongs to none of them
            if len(values) == len(job.positions):
                row = self.extra.setdefault(column, [None] * len(samples))
                for position, value in zip(job.positions, values, strict=True):
                    row[position] = value

    def _lose(self, job: Job, refused: Refused, samples: Sequence[Sample], scores: list[Score | None]) -> None:
        for position in job.positions:
            scores[position] = Score(None, refused.why)
            self.failures.note(self.name, refused.kind, samples[position], refused.why, refused.traceback)

    def _jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """The batch for each process: every sample alone where it has seconds of its own, else one part each."""
        units = self._units(samples)
        size = 1 if self.limits.sample_seconds is not None else math.ceil(len(units) / self.limits.workers)
        return [self._job(samples, part, 0.5 if len(part) > 1 else 1.0) for part in _cut(units, max(size, 1))]

    def _units(self, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        if self.limits.unit == "sample":
            return [(position,) for position in range(len(samples))]
        groups: dict[int, list[int]] = {}
        for position, sample in enumerate(samples):
            groups.setdefault(sample.group, []).append(position)
        return [tuple(group) for group in groups.values()]

    def _job(
        self, samples: Sequence[Sample], units: Sequence[tuple[int, ...]], share: float, again: bool = False
    ) -> Job:
        chosen = [samples[position] for unit in units for position in unit]
        content: bytes | str
        try:
            content = pickle.dumps({**as_trl(chosen), "state": self.state})
        except Exception as error:
            content = f"cannot be sent to a process: {type(error).__name__}: {error}"
        return Job(tuple(units), content, self.limits.sample_seconds, share, again)


def _worth_another(job: Job, refused: Refused) -> bool:
    """Whether another try may score samples of a job: fewer of them, or the same one whose process may have been killed
    for nothing it did, as the system does where memory runs out.
    """
    return len(job.units) > 1 or (refused.kind == DIED and not job.again)


def _cut(units: Sequence[tuple[int, ...]], size: int) -> list[Sequence[tuple[int, ...]]]:
    return [units[start : start + size] for start in range(0, len(units), size)]


def _share(units: int) -> float:
    """Of the time left, what a part that is tried again may take: as much for each halving to come, and one more."""
    return 1 / ((units - 1).bit_length() + 2)


def as_trl(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as TRL passes them: a completion is messages where its prompt is, and every column a list."""
    names = [name for sample in samples for name in sample.columns if name not in NOT_COLUMNS]
    return {
        "prompts": [_said(sample.prompt) for sample in samples],
        "completions": [
            [{"role": "assistant", "content": sample.completion}]
            if isinstance(sample.completion, str) and not isinstance(sample.prompt, str)
            else _said(sample.completion)
            for sample in samples
        ],
        "completion_ids": [list(sample.tokens) for sample in samples],
        "columns": {name: [sample.columns.get(name) for sample in samples] for name in dict.fromkeys(names)},
    }


def _said(text: str | Sequence[Message]) -> str | list[dict[str, Any]]:
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def name_of(function: Callable[..., Any] | str) -> str:
    """The name that a function's numbers are logged under."""
    if isinstance(function, str):
        return function.rpartition(":")[2]
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def packed(function: Callable[..., Any] | str) -> bytes | tuple[str, ...]:
    """What a process needs to load the function. InputError on a file that is not there and what cannot be sent."""
    if isinstance(function, str):
        file, _, name = function.rpartition(":")
        path = Path(os.path.expanduser(file))
        if not path.is_file():
            raise InputError(f"reward {function!r}: there is no file {path}; write it as path/to/file.py:function")
        return ("file", str(path.resolve()), name)
    try:
        sent: bytes = cloudpickle.dumps(function)
    except Exception as error:
        raise InputError(
            f"reward {name_of(function)}: it cannot be sent to a process of its own ({type(error).__name__}: {error}); "
            "write it in a file and name it as file.py:function, or give an object with name, __call__(samples) and "
            "close(), which runs in the trainer"
        ) from None
    return sent

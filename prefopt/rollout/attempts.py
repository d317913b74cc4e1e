"""Attempts at prompts: completions from the sampler, as text to the reward, with its scores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefopt import ranks
from prefopt.models.sampling import Completion, Sampler, Sampling
from prefopt.records import InputError, Reward, Sample, Score
from prefopt.rollout.groups import Group, reward_of
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Draw
from prefopt.rollout.text import Text

T = TypeVar("T")


class Attempts:
    """Samples and scores this process's share of prompts.

    seconds: spent on "sampling" and "scoring" since the last `begin`.
    """

    def __init__(self, sampler: Sampler, reward: Reward, tokenizer: Any, options: RolloutOptions) -> None:
        self.sampler, self.reward, self.text, self.options = sampler, reward, Text(tokenizer), options
        self.seconds: dict[str, float] = {}

    def begin(self, step: int, steps: int) -> None:
        """A rollout begins, after `step` of `steps` updates: rewards that ask are told."""
        self.seconds = {}
        if hasattr(self.reward, "at"):
            self.reward.at(step, steps)

    def logged(self) -> dict[str, float]:
        """What functions logged of the last batch themselves, by name, the mean over processes."""
        shares = ranks.gather(dict(getattr(self.reward, "metrics", {})))
        names = sorted({name for share in shares for name in share})
        return {name: statistics.fmean(share[name] for share in shares if name in share) for name in names}

    def at(self, draws: Sequence[Draw], n: int, sampling: Sampling) -> list[Group]:
        """n scored completions of each draw.

        InputError, on all processes, where the sampler or the reward of any of them gives up.
        """
        drawn = self._timed("sampling", lambda: self._sampled(draws, n, sampling))
        samples = [
            self.text.samples(draw.prompt, completions, group)
            for group, (draw, completions) in enumerate(zip(draws, drawn, strict=True))
        ]
        scores = self._timed("scoring", lambda: self._scored([sample for own in samples for sample in own]))
        return [
            self._group(draw, completions, own, scores[place * n : (place + 1) * n])
            for place, (draw, completions, own) in enumerate(zip(draws, drawn, samples, strict=True))
        ]

    def _sampled(self, draws: Sequence[Draw], n: int, sampling: Sampling) -> list[list[Completion]]:
        prompts = [draw.prompt.tokens for draw in draws]
        drawn = self.sampler.sample(prompts, n, sampling, [draw.seed for draw in draws])
        if len(drawn) != len(draws) or any(len(own) != n for own in drawn):
            raise InputError(f"the sampler gave {[len(own) for own in drawn]} completions for {len(draws)} x {n}")
        return drawn

    def _scored(self, samples: Sequence[Sample]) -> list[Score]:
        scores = self.reward(samples) if samples else []
        if len(scores) != len(samples):
            raise InputError(f"{self.reward.name}: {len(scores)} scores for {len(samples)} completions; give one each")
        return scores

    def _group(
        self, draw: Draw, completions: Sequence[Completion], samples: Sequence[Sample], scores: Sequence[Score]
    ) -> Group:
        how, penalty = self.options.unfinished, self.options.unfinished_penalty
        rewards = [reward_of(s, c.finished, how, penalty) for s, c in zip(scores, completions, strict=True)]
        return Group(draw, completions, samples, scores, rewards)

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        done = together(work)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return done


def together(work: Callable[[], T]) -> T:
    """`work()` of every process; where one raises all do, or the others would wait for it without end.

    The others raise InputError with its words where it raised one, else PeerError.
    """
    found: list[T] = []
    own: Exception | None = None
    try:
        found.append(work())
    except Exception as error:
        own = error
    expected = isinstance(own, InputError)
    problems = ranks.gather(
        None if own is None else (expected, str(own) if expected else f"{type(own).__name__}: {own}")
    )
    if own is not None:
        raise own
    for number, problem in enumerate(problems):
        if problem is not None:
            expected, words = problem
            raise InputError(words) if expected else ranks.stopped_by(f"process {number}: {words}")
    return found[0]

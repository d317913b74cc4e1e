"""Rewards that cannot hang: their work is linear in the completion, so they run in the trainer's process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from prefopt.records import Sample, Score
from prefopt.rewards.channel import RAISED
from prefopt.rewards.function import Failures


class DirectReward:
    """A score for each sample by itself. An error loses its sample only."""

    def __init__(self, name: str, score: Callable[[Sample], Score]) -> None:
        self.name, self.score, self.failures = name, score, Failures()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._one(sample) for sample in samples]

    def close(self) -> None:
        pass

    @property
    def counts(self) -> Counter[str]:
        return self.failures.counts

    def _one(self, sample: Sample) -> Score:
        try:
            score = self.score(sample)
        except Exception as error:
            score = Score(None, f"raised {type(error).__name__}: {error}"[:300])
            self.failures.note(self.name, RAISED, sample, score.why)
            return score
        self.failures.count(self.name, [sample], [score])
        return score

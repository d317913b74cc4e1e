"""Several rewards as one: a weighted sum, and the stop where too much could not be scored."""

from __future__ import annotations

import math
import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from prefopt.records import InputError, Reward, Sample, Score
from prefopt.rewards.channel import ABSTAINED, LARGEST, RAISED
from prefopt.rewards.function import Failures


class Mixture:
    """The weighted sum of rewards, each a part of the score under its own name.

    A part that could not be scored leaves the sample without a score. A part that abstained is left out of the sum
    (`abstain="skip"`, as in TRL) or leaves the sample without a score (`"drop"`); where all abstain, so does the sum.
    The rewards work at the same time.
    InputError from a call in which more than `most_failures` of the samples could not be scored; abstentions are no
    failures. ValueError on weights that are not one for each reward.
    """

    name = "reward"

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        abstain: Literal["skip", "drop"] = "skip",
        most_failures: float = 0.5,
    ) -> None:
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(rewards):
            raise ValueError(f"reward_weights: {len(self.weights)} for {len(rewards)} rewards; give one for each")
        if len({reward.name for reward in rewards}) != len(rewards):
            raise ValueError(
                f"reward: {', '.join(reward.name for reward in rewards)} are not all different names, and numbers are "
                "logged by them; rename a function or an object, and in place of a reward twice raise its weight"
            )
        self.rewards, self.abstain, self.most_failures = list(rewards), abstain, most_failures
        self.failures = {reward.name: getattr(reward, "failures", None) or Failures() for reward in rewards}
        self._threads: ThreadPoolExecutor | None = None
        self._owner = 0

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        if len(self.rewards) == 1:
            columns = [self._scores(reward, samples) for reward in self.rewards]
        else:
            columns = list(self._at_once().map(self._scores, self.rewards, [samples] * len(self.rewards)))
        scores = [self._sum(row) for row in zip(*columns, strict=True)]
        self._check(scores, samples)
        return scores

    def close(self) -> None:
        for reward in self.rewards:
            reward.close()
        if self._threads is not None and self._owner == os.getpid():
            self._threads.shutdown()

    @property
    def counts(self) -> dict[str, Counter[str]]:
        """What became of the samples so far: name -> kind -> number."""
        return {name: failures.counts for name, failures in self.failures.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(counts) for name, counts in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Count on; what was counted of a reward that is no longer asked is left out."""
        for name in state.keys() & self.counts.keys():
            self.counts[name].clear()
            self.counts[name].update(state[name])

    @property
    def metrics(self) -> dict[str, float]:
        """What functions gave to `log_metric` in the last call, the mean, under `REWARD/NAME`."""
        found: dict[str, float] = {}
        for reward in self.rewards:
            own: Mapping[str, float] = getattr(reward, "metrics", {})
            found.update({f"{reward.name}/{name}": value for name, value in own.items()})
        return found

    @property
    def extra(self) -> dict[str, list[Any]]:
        """What functions gave to `log_extra` in the last call, a value for each sample, under `REWARD/COLUMN`."""
        found: dict[str, list[Any]] = {}
        for reward in self.rewards:
            own: Mapping[str, list[Any]] = getattr(reward, "extra", {})
            found.update({f"{reward.name}/{column}": values for column, values in own.items()})
        return found

    def at(self, step: int, max_steps: int) -> None:
        """Say where the run is: functions see it as `trainer_state`."""
        for reward in self.rewards:
            if hasattr(reward, "state"):
                reward.state = {"global_step": step, "max_steps": max_steps, "epoch": step / max(max_steps, 1)}

    def _at_once(self) -> ThreadPoolExecutor:
        """Threads that stay: what a reward starts may live only as long as the thread that started it. A fork has none
        of its parent's.
        """
        if self._threads is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._threads = ThreadPoolExecutor(len(self.rewards), "prefopt-reward")
        return self._threads

    def _scores(self, reward: Reward, samples: Sequence[Sample]) -> list[Score]:
        """A reward's scores; None for all of them where it raises or gives back what is no list of that length."""
        failures = self.failures[reward.name]
        try:
            scores = list(reward(samples))
            if len(scores) != len(samples):
                raise TypeError(f"returned {len(scores)} scores for {len(samples)} samples")
            checked = [_checked(score) for score in scores]
        except InputError:
            raise
        except Exception as error:
            why = f"raised {type(error).__name__}: {error}"[:300]
            for sample in samples:
                failures.note(reward.name, RAISED, sample, why, traceback.format_exc())
            return [Score(None, why)] * len(samples)
        if not hasattr(reward, "failures"):  # an object of the user's, which counts nothing itself
            failures.count(reward.name, samples, checked)
        return checked

    def _sum(self, row: Sequence[Score]) -> Score:
        parts: dict[str, float | None] = {}
        for reward, score in zip(self.rewards, row, strict=True):
            parts[reward.name] = score.value
            parts.update({f"{reward.name}/{name}": value for name, value in score.parts.items()})
        named = list(zip(self.rewards, row, strict=True))
        failed = [f"{reward.name}: {score.why}" for reward, score in named if failure(score)]
        if failed:
            return Score(None, "; ".join(failed), parts)
        silent = [score.value is None for score in row]
        if all(silent) or (any(silent) and self.abstain == "drop"):
            return Score(None, ABSTAINED, parts)
        total = _total(self.weights, [score.value for score in row])
        if not abs(total) <= LARGEST:
            return Score(None, f"a weighted sum of {total:g}, more than {LARGEST:g}: lower reward_weights", parts)
        said = "; ".join(
            f"{reward.name}: {score.why}" for reward, score in named if score.why and score.value is not None
        )
        return Score(total, said, parts)

    def _check(self, scores: Sequence[Score], samples: Sequence[Sample]) -> None:
        failed = [score.why for score in scores if failure(score)]
        if len(failed) <= self.most_failures * len(samples):
            return
        reasons = Counter(failed).most_common(3)
        listed = "\n".join(f"  {number} x {why}" for why, number in reasons)
        first = "\n\n".join(failures.first for failures in self.failures.values() if failures.first)
        raise InputError(
            f"reward: {len(failed)} of {len(samples)} samples could not be scored, more than reward_failures="
            f"{self.most_failures:g} allows; mend the reward or its columns, or raise that share:\n{listed}\n\n{first}"
        )


def failure(score: Score) -> bool:
    """Whether a sample was left without a score, other than on purpose."""
    return score.value is None and score.why != ABSTAINED


def _checked(score: Score) -> Score:
    """`score`, without a value that is no reward, whoever made it."""
    if score.value is not None and not abs(score.value) <= LARGEST:
        return Score(None, f"scored {score.value}, which is no reward: one is a number up to {LARGEST:g}", score.parts)
    return score


def _total(weights: Sequence[float], values: Sequence[float | None]) -> float:
    """The weighted sum of what there is; infinity where its terms are too large to be added up."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return math.inf

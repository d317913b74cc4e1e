"""How good the policy's own completions of held-out prompts are, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from prefopt import ranks
from prefopt.evaluate.statistics import Estimate, mean, wilson
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.groups import GroupFacts, reward_metrics, shape_metrics
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Draw, Prompt


class HeldOut:
    """Samples every held-out prompt `eval_completions` times, with the same seeds at every evaluation, and scores it.

    rewards, accuracies: of each evaluation, the mean of every prompt's completions; a prompt without a score is None.
    accuracies only where every task reward is 0 or 1.
    """

    def __init__(self, prompts: Sequence[Prompt], attempts: Attempts, options: RolloutOptions, seed: int) -> None:
        self.draws = [Draw(prompt, at, False, seed * 1_000_003 + at) for at, prompt in enumerate(prompts)]
        self.attempts, self.options = attempts, options
        self.rewards: list[list[float | None]] = []
        self.accuracies: list[list[float | None]] = []

    def __call__(self, policy: Any) -> dict[str, float]:
        """Metrics of this evaluation, named eval/...."""
        self.attempts.sampler.update(policy)
        share = self.draws[ranks.rank() :: ranks.world()]
        groups = self.attempts.at(share, self.options.eval_completions, self.options.sampling)
        facts = [fact for own in ranks.gather([group.facts() for group in groups]) for fact in own]
        self.rewards.append([_mean(fact.values) for fact in facts])
        self.accuracies.append([_mean(fact.task) for fact in facts] if _right_or_wrong(facts) else [])
        found = {**reward_metrics(facts), **shape_metrics(facts)}
        if known := [value for value in self.accuracies[-1] if value is not None]:
            found["accuracy"] = statistics.fmean(known)
        return {f"eval/{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": list(self.rewards), "accuracies": list(self.accuracies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards, self.accuracies = state["rewards"], state["accuracies"]

    def summary(self) -> dict[str, Any]:
        """Reward and accuracy at the start and the end, and the change of each prompt's, with 95 % intervals.

        Completions of one prompt are not independent, so an item is a prompt, with the mean of its completions.
        """
        found = {"reward": _change(self.rewards, mean)}
        if any(self.accuracies):
            found["accuracy"] = _change(self.accuracies, _proportion)
        return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _right_or_wrong(facts: Sequence[GroupFacts]) -> bool:
    known = [value for fact in facts for value in fact.known]
    return bool(known) and all(value in (0.0, 1.0) for value in known)


def _proportion(values: Sequence[float]) -> Estimate:
    return wilson(sum(values), len(values))


def _change(history: Sequence[Sequence[float | None]], estimate: Any) -> dict[str, Any]:
    if not history:
        return {}
    first, last = history[0], history[-1]
    gains = [b - a for a, b in zip(first, last, strict=False) if a is not None and b is not None]
    return {
        "start": estimate([value for value in first if value is not None]).summary(),
        "end": estimate([value for value in last if value is not None]).summary(),
        "gain": mean(gains).summary(),
    }

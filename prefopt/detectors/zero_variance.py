"""Whether most groups teach nothing, for either reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class ZeroVariance:
    """In most groups all completions are worth the same: what they cost teaches nothing.

    All failed is what `sparse_reward` judges; all solved says that the prompts have become too easy.
    """

    # share of groups whose rewards do not differ
    share: float = 0.7
    # most of it solved: nothing is wrong, but time is spent in vain
    solved: Level = "info"
    # most of it failed, or the log does not say which
    level: Level = "info"
    needed: int = 8
    among: int = 10

    name: ClassVar[str] = "zero_variance"
    title: ClassVar[str] = "most groups teach nothing"

    def see(self, state: State, line: Line) -> Check | None:
        solved, failed = line.get("zero_variance/solved"), line.get("zero_variance/failed")
        share = line.get("zero_variance") if solved is None and failed is None else (solved or 0.0) + (failed or 0.0)
        if share is None:
            return None
        if share <= self.share:
            return FINE
        easy = solved is not None and solved >= (failed or 0.0)
        which = "most of them solved throughout" if easy else "most of them failed throughout"
        if solved is None:
            reward = line.get("reward")
            which = "failed or solved throughout" + (f", at a reward of {reward:.3g}" if reward is not None else "")
        return Check(
            self.solved if easy else self.level,
            share,
            self.share,
            f"in {share:.0%} of the groups all completions are worth the same ({which}): nothing is learnt from them",
            "Harder prompts, or stop" if easy else "Easier prompts, more completions of each, or dynamic_sampling",
            {"dynamic_sampling": True} if easy and "dynamic_sampling" in line.run.options else {},
            evidence={"solved": solved, "failed": failed},
        )

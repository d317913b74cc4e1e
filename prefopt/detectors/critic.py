"""Whether the critic foresees anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class Critic:
    """After its first hundred updates the critic is still worse than a constant: explained variance below 0."""

    # updates before it is judged
    warmup: int = 100
    # explained variance below which a critic does harm
    variance: float = 0.0
    level: Level = "warn"
    needed: int = 8
    among: int = 10

    name: ClassVar[str] = "critic"
    title: ClassVar[str] = "the critic foresees nothing"

    def see(self, state: State, line: Line) -> Check | None:
        explained = line.get("value/explained_variance")
        if explained is None or line.step <= self.warmup:
            return None
        if explained >= self.variance:
            return FINE
        return Check(
            self.level,
            explained,
            self.variance,
            f"the critic is worse than a constant after {line.step} updates: explained variance {explained:.2f}",
            "Start it from the reward model (critic_model), lower learning_rate, or take rloo or grpo, which need none",
            {"objective": "rloo"},
        )

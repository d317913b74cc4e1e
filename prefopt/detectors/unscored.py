"""Whether the reward fails to score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class Unscored:
    """More than a tenth of the completions get no score, again and again: they teach nothing."""

    # share without a score
    share: float = 0.1
    level: Level = "warn"
    needed: int = 3
    among: int = 5

    name: ClassVar[str] = "unscored"
    title: ClassVar[str] = "completions get no score"

    def see(self, state: State, line: Line) -> Check | None:
        unscored = line.get("unscored")
        if unscored is None:
            return None
        if unscored <= self.share:
            return FINE
        return Check(
            self.level,
            unscored,
            self.share,
            f"{unscored:.0%} of the completions got no score, so nothing is learnt from them",
            "Their reasons are under `why` in completions.jsonl; raise reward_deadline if it is time",
        )

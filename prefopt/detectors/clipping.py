"""Whether clipping stops most of the gradient, because the policy has gone too far from what drew the completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State

# clips by whole completions, at a ratio so near to 1 that far more is clipped
BY_COMPLETION = ("gspo",)


@dataclass(frozen=True)
class Clipping:
    """More than three tokens in ten are clipped. 0 is expected with one update per rollout, and is no finding."""

    # share of tokens clipped, on either side
    share: float = 0.3
    level: Level = "warn"
    needed: int = 4
    among: int = 5

    name: ClassVar[str] = "clipping"
    title: ClassVar[str] = "most of the gradient is clipped"

    def see(self, state: State, line: Line) -> Check | None:
        low, high = line.get("clip_fraction/low"), line.get("clip_fraction/high")
        clipped = line.get("clip_fraction") if low is None and high is None else (low or 0.0) + (high or 0.0)
        if clipped is None or line.run.objective in BY_COMPLETION:
            return None
        if clipped <= self.share:
            return FINE
        rate = line.run.number("learning_rate")
        return Check(
            self.level,
            clipped,
            self.share,
            f"{clipped:.0%} of the tokens are clipped, so most of the gradient is gone",
            "Lower learning_rate, or take fewer updates from a rollout (rollout_passes, rollout_batches)",
            {"learning_rate": rate / 3} if rate else {},
            evidence={"low": low, "high": high},
        )

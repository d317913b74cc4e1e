"""Whether gradients jump, or are not finite."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class Gradients:
    """Gradient norms far above the usual, several within a few updates, or updates skipped as they were not finite."""

    # times the median of the updates before
    times: float = 10.0
    # updates before
    lines: int = 50
    # least of them before anything is said
    warmup: int = 20
    # of a norm that jumps: it is clipped, and most runs recover
    note: Level = "info"
    level: Level = "warn"
    needed: int = 3
    among: int = 10

    name: ClassVar[str] = "gradients"
    title: ClassVar[str] = "gradients jump"

    def see(self, state: State, line: Line) -> Check | None:
        skipped = line.get("skipped")
        rate = line.run.number("learning_rate")
        change = {"learning_rate": rate / 3} if rate else {}
        if skipped:
            reason = f"{skipped:.0f} updates were skipped, as their gradient was not finite"
            return Check(self.level, skipped, 0.0, reason, "Lower learning_rate or raise warmup", change)
        norm = line.get("grad_norm")
        if norm is None:
            return None
        before = list(state.get("before", []))
        keep(state.setdefault("before", []), norm, self.lines)
        usual = statistics.median(before) if len(before) >= self.warmup else 0.0
        if not usual or norm <= self.times * usual:
            return FINE if usual else None
        return Check(
            self.note,
            norm,
            self.times * usual,
            f"the gradient's norm jumps: {norm:.3g}, {norm / usual:.0f} times the usual",
            "Single jumps are clipped and harmless; if they come often, lower learning_rate or raise warmup",
            change,
            evidence={"usual": usual},
        )

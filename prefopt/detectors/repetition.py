"""Whether completions repeat themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class Repetition:
    """Many runs of four tokens stand in a completion that has them already, and far more than at the start."""

    # share of such runs, mean over completions
    share: float = 0.2
    # times the share at the start
    times: float = 3.0
    # rollouts that are averaged at the start
    lines: int = 5
    level: Level = "info"
    needed: int = 3
    among: int = 4

    name: ClassVar[str] = "repetition"
    title: ClassVar[str] = "completions repeat themselves"

    def see(self, state: State, line: Line) -> Check | None:
        repeated = line.get("repetition")
        if repeated is None:
            return None
        start = state.setdefault("start", [])
        if len(start) < self.lines:
            start.append(repeated)
            return None
        first = sum(start) / len(start)
        if repeated <= max(self.share, self.times * first):
            return FINE
        return Check(
            self.level,
            repeated,
            max(self.share, self.times * first),
            f"{repeated:.0%} of the runs of four tokens in a completion are repeated ({first:.0%} at the start)",
            "Read samples; a penalty (reward repetition), a lower learning_rate or a larger beta",
            evidence={"at_start": first},
        )

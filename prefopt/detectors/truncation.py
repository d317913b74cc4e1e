"""Whether completions are cut at their longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class Truncation:
    """More than a tenth of the completions are cut at max_tokens; worse where that share grows."""

    # share that is cut
    cut: float = 0.1
    # growth of that share since the start which is worth a warning
    growth: float = 0.05
    # rollouts that are averaged at the start
    lines: int = 5
    note: Level = "info"
    level: Level = "warn"
    needed: int = 4
    among: int = 5

    name: ClassVar[str] = "truncation"
    title: ClassVar[str] = "completions are cut"

    def see(self, state: State, line: Line) -> Check | None:
        finished = line.get("finished")
        if finished is None:
            return None
        start = state.setdefault("start", [])
        if len(start) < self.lines:
            start.append(1 - finished)
        first, cut = sum(start) / len(start), 1 - finished
        if cut <= self.cut:
            return FINE
        grows = cut - first > self.growth
        longest = line.run.number("max_tokens")
        return Check(
            self.level if grows else self.note,
            cut,
            self.cut,
            f"{cut:.0%} of the completions are cut at {'max_tokens' if longest is None else f'{longest:.0f} tokens'} "
            f"({first:.0%} at the start)",
            "Raise max_tokens, or leave cut completions out (unfinished=ignore)",
            {"max_tokens": int(2 * longest)} if longest else {},
            evidence={"at_start": first},
        )

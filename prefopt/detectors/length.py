"""Whether completions grow longer than the task asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class Length:
    """The policy's completions are half as long again as at the start.

    Length may be what is rewarded, or what the task needs; the metrics cannot say which, so this is a note.
    """

    # mean length over that of the start
    ratio: float = 1.5
    # rollouts that are averaged, at the start and now
    lines: int = 5
    # tokens below which a length says nothing
    least: float = 8.0
    level: Level = "info"
    needed: int = 3
    among: int = 4

    name: ClassVar[str] = "length"
    title: ClassVar[str] = "completions grow long"

    def see(self, state: State, line: Line) -> Check | None:
        length = line.get("completion_length")
        if length is None:
            return None
        start, recent = state.setdefault("start", []), keep(state.setdefault("recent", []), length, self.lines)
        if len(start) < self.lines:
            start.append(length)
            return None
        before, now = sum(start) / len(start), sum(recent) / len(recent)
        ratio = now / max(before, 1e-9)
        if ratio <= self.ratio or now < self.least:
            return FINE
        return Check(
            self.level,
            ratio,
            self.ratio,
            f"completions have grown {ratio:.2f} times as long ({before:.0f} to {now:.0f} tokens)",
            "Read samples: if they only pad, take dr_grpo (no division by each completion's own length), add a penalty "
            "for length (reward overlong), or compare answers of like length",
            {"objective": "dr_grpo"} if line.run.objective == "grpo" else {},
            evidence={"at_start": before, "now": now},
        )

"""Whether what draws completions and what scores them are one distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State


@dataclass(frozen=True)
class SamplerMismatch:
    """The sampler's log-probs and the trainer's differ by more than rounding.

    The mean distance d of log-probs makes a divergence of about d^2 / 2 a token; 0.01 of that is where training on
    another engine's samples begins to break.
    """

    # mean distance, nats per token, above which rounding of 16 bits does not explain it
    note: float = 0.03
    # above which learning suffers: sqrt(2 x 0.01)
    gap: float = 0.14
    level: Level = "warn"
    needed: int = 3
    among: int = 4

    name: ClassVar[str] = "sampler_mismatch"
    title: ClassVar[str] = "sampler and trainer disagree"

    def see(self, state: State, line: Line) -> Check | None:
        gap = line.get("sampler_gap")
        if gap is None:
            return None
        if gap <= self.note:
            return FINE
        bad = gap > self.gap
        return Check(
            self.level if bad else "info",
            gap,
            self.gap if bad else self.note,
            f"sampler and trainer differ by {gap:.2g} nats a token, more than rounding",
            "Check temperature, template and that new weights reach the sampler; correction=token weighs completions "
            "by the difference",
            {"correction": "token"} if "correction" in line.run.options else {},
        )

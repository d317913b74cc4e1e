"""How far the policy's own completions are from the reference, and whether that distance can be true."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class Distance:
    """The distance from the reference is large, jumps, or is clearly below 0, which no distance can be.

    A mean of log-ratios of the policy's own completions below 0, again and again, says that they were not drawn from
    the distribution that scores them.
    """

    # nats of a whole completion, mean
    nats: float = 10.0
    # nats per token that it must exceed too, or long completions would always be far
    per_token: float = 0.5
    # times the median of the lines before
    jump: float = 3.0
    # nats below 0
    below: float = 0.05
    # lines before, for the jump
    lines: int = 10
    level: Level = "info"
    impossible: Level = "warn"
    needed: int = 3
    among: int = 4

    name: ClassVar[str] = "distance"
    title: ClassVar[str] = "far from the reference"

    def see(self, state: State, line: Line) -> Check | None:
        kl = line.get("kl_reference")
        if kl is None:
            return None
        before = list(state.get("before", []))
        keep(state.setdefault("before", []), kl, self.lines)
        # over many lines, as one rollout's mean scatters about 0 at the start
        if len(before) == self.lines and statistics.fmean(before) < -self.below and kl < -self.below:
            return Check(
                self.impossible,
                kl,
                -self.below,
                f"the distance from the reference is {kl:.3g} nats, below 0 for {self.lines} lines: completions do not "
                "come from the distribution that scores them",
                "Check that sampling and training use one temperature, and set correction=token with top_k, top_p or "
                "min_p",
                evidence={"mean": statistics.fmean(before)},
            )
        usual = statistics.median(before) if len(before) == self.lines else None
        return self._far(kl, usual, line)

    def _far(self, kl: float, usual: float | None, line: Line) -> Check:
        length = line.get("completion_length")
        far = kl > self.nats and (length is None or kl / max(length, 1.0) > self.per_token)
        jumps = usual is not None and usual > self.below and kl > self.jump * usual
        if not far and not jumps:
            return FINE
        what = f"{kl:.3g} nats a completion" + (f", {kl / usual:.1f} times what was usual" if jumps and usual else "")
        beta = line.run.number("beta")
        return Check(
            self.level,
            kl,
            self.nats if far else self.jump * (usual or 0.0),
            f"the policy is far from the reference: {what}",
            "Raise beta or lower learning_rate if samples get worse",
            {"beta": 2 * beta} if beta else {},
            evidence={"usual": usual, "completion_length": length},
        )

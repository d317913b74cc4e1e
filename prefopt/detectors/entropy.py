"""Whether the policy has lost its variety without anything gained by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import is_flat, keep


@dataclass(frozen=True)
class Entropy:
    """Entropy is a fifth of what it was and the reward does not rise.

    Falling entropy with a rising reward is how such runs learn: 73 % of the entropy was gone where 76 % of the gain was
    made (Cui et al. 2025, arXiv:2505.22617), so that is no finding.
    """

    # share of the entropy at the start that is left
    share: float = 0.2
    # lines that are averaged at the start, and over which the reward must be flat
    lines: int = 10
    # reward, as a share of the highest seen, at which a task counts as solved and nothing is left to explore for
    solved: float = 0.95
    # what is said of a log without rewards
    offline: Level = "info"
    level: Level = "warn"
    needed: int = 4
    among: int = 5

    name: ClassVar[str] = "entropy"
    title: ClassVar[str] = "variety is lost"

    def see(self, state: State, line: Line) -> Check | None:
        entropy = line.get("entropy")
        if entropy is None:
            return None
        reward = line.get("reward")
        if reward is not None:
            keep(state.setdefault("rewards", []), reward, self.lines)
        start = state.setdefault("start", [])
        if len(start) < self.lines:
            start.append(entropy)
            return None
        first = sum(start) / len(start)
        if first <= 0:
            return None
        left, rewards = entropy / first, state.get("rewards", [])
        if left >= self.share or (rewards and not self._useless(rewards)):
            return FINE
        return Check(
            self.level if rewards else self.offline,
            left,
            self.share,
            f"entropy is {left:.0%} of what it was at the start ({first:.2f} to {entropy:.2f} nats a token)"
            + (" and the reward does not rise" if rewards else ""),
            "Lower learning_rate, raise the upper clip (clip_high), set beta, or a higher temperature",
            _slower(line),
            evidence={"at_start": first, "now": entropy},
        )

    def _useless(self, rewards: list[float]) -> bool:
        """Whether the rewards are flat, and not because the task is solved (rewards are 0 to 1 in most tasks)."""
        return len(rewards) >= self.lines and is_flat(rewards) and sum(rewards) / len(rewards) < self.solved


def _slower(line: Line) -> dict[str, float]:
    rate = line.run.number("learning_rate")
    return {"learning_rate": rate / 3} if rate else {}

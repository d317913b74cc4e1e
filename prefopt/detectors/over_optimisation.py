"""Whether the reward of training rises while that of held-out prompts falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class OverOptimisation:
    """On held-out prompts the reward has lost half of what it had gained, while in training it has not fallen.

    Both are the reward that is maximised. What it cannot see, a reward that is fooled on all prompts, these metrics
    cannot see either: read samples, or evaluate with another reward.
    """

    # share of the held-out gain that is lost again
    lost: float = 0.5
    # least gain, in standard deviations of the reward, that there is to lose
    gain: float = 0.2
    # rollouts whose reward is averaged
    lines: int = 10
    level: Level = "info"  # on unseen tasks one warning of two was right (experiments/detectors)
    needed: int = 2
    among: int = 2

    name: ClassVar[str] = "over_optimisation"
    title: ClassVar[str] = "the reward no longer carries over"

    def see(self, state: State, line: Line) -> Check | None:
        reward, held_out = line.get("reward"), line.get("eval/reward")
        if reward is not None:
            keep(state.setdefault("train", []), reward, self.lines)
        spread = line.get("reward_std")
        if spread is not None:
            state["spread"] = max(spread, state.get("spread", 0.0))
        if held_out is None:
            return None
        start = state.setdefault("start", held_out)
        best = state.setdefault("best", [held_out, line.step, 0.0])
        train = sum(state.get("train", [])) / max(len(state.get("train", [])), 1)
        if held_out > best[0]:
            state["best"] = [held_out, line.step, train]
            return FINE
        gain = best[0] - start
        if gain <= self.gain * state.get("spread", 0.0) or gain <= 0 or train < best[2]:
            return FINE
        lost = (best[0] - held_out) / gain
        if lost <= self.lost:
            return FINE
        return Check(
            self.level,
            lost,
            self.lost,
            f"held-out reward has fallen from {best[0]:.3g} (step {best[1]}) to {held_out:.3g} while that of training "
            f"has not (from {best[2]:.3g} to {train:.3g})",
            "Keep the best weights (keep=best with eval_every), raise beta, or give more prompts",
            {"keep": "best"},
            evidence={"start": start, "best": best[0], "best_step": best[1]},
        )

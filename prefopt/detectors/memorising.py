"""Whether the rows are learnt by heart: trained ones go on getting better, held-out ones do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class Memorising:
    """Accuracy on trained rows is far above that on held-out ones, or the held-out loss has turned up.

    The held-out loss counts with a beta near 0.1 alone, or with an objective that has none: at 0.01 it never rose while
    quality fell, and at 1.0 it rose from the start while quality nearly doubled (synthetic, one seed).
    """

    # accuracy of the updates less that of the held-out rows
    gap: float = 0.3
    # share of its lowest value that the held-out loss lies above it
    rise: float = 0.05
    # the betas at which the held-out loss counts
    least_beta: float = 0.03
    most_beta: float = 0.3
    # updates whose accuracy is averaged
    lines: int = 10
    # a note: of runs with it 18 in 30 were sick by their true reward (experiments/detectors)
    level: Level = "info"
    needed: int = 2
    among: int = 2

    name: ClassVar[str] = "memorising"
    title: ClassVar[str] = "rows are learnt by heart"

    def see(self, state: State, line: Line) -> Check | None:
        for name in ("rewards/accuracies", "accuracy"):
            value = line.get(name)
            if value is not None and not any(other.startswith("eval/") for other in line.values):
                keep(state.setdefault("train", []), value, self.lines)
        held_out, loss = line.get("eval/rewards/accuracies", "eval/accuracy"), line.get("eval/loss")
        if held_out is None and loss is None:
            return None
        return self._by_accuracy(state, line, held_out) or self._by_loss(state, line, loss) or FINE

    def _by_accuracy(self, state: State, line: Line, held_out: float | None) -> Check | None:
        train = state.get("train", [])
        if held_out is None or not train:
            return None
        gap = sum(train) / len(train) - held_out
        if gap <= self.gap:
            return None
        reason = f"accuracy is {sum(train) / len(train):.2f} on trained rows and {held_out:.2f} on held-out ones"
        return self._check(gap, self.gap, reason, line, {"train": sum(train) / len(train), "held_out": held_out})

    def _by_loss(self, state: State, line: Line, loss: float | None) -> Check | None:
        beta = line.run.number("beta")
        if loss is None or loss <= 0 or (beta is not None and not self.least_beta <= beta <= self.most_beta):
            return None
        lowest = state["lowest"] = min(loss, state.get("lowest", loss))
        if loss == lowest:
            state["best"] = line.step
        if loss <= lowest * (1 + self.rise):
            return None
        reason = f"the held-out loss is {loss:.3g} and was {lowest:.3g} at step {state['best']}"
        return self._check(loss / lowest - 1, self.rise, reason, line, {"lowest": lowest, "best_step": state["best"]})

    def _check(self, value: float, threshold: float, reason: str, line: Line, evidence: dict[str, float]) -> Check:
        return Check(
            self.level,
            value,
            threshold,
            f"rows are learnt by heart: {reason}",
            "Keep the best weights (keep=best with eval_every), take fewer epochs or more rows",
            _best(line),
            evidence=evidence,
        )


def _best(line: Line) -> dict[str, str | int]:
    steps = line.run.steps
    every = {} if line.run.options.get("eval_every") or not steps else {"eval_every": max(steps // 20, 1)}
    return {"keep": "best", **every}

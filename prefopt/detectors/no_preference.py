"""Whether pairs are not told apart at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class NoPreference:
    """Accuracy stays near one half: labels near chance, answers of almost equal quality, or a rate that is too low."""

    # mean accuracy of the updates below which pairs count as not told apart
    accuracy: float = 0.55
    # updates that are averaged
    lines: int = 30
    # updates before anything is said: before the first one accuracy is 0 where rewards compare with a reference
    warmup: int = 50
    level: Level = "info"
    needed: int = 3
    among: int = 4

    name: ClassVar[str] = "no_preference"
    title: ClassVar[str] = "pairs are not told apart"

    def see(self, state: State, line: Line) -> Check | None:
        accuracy = line.get("rewards/accuracies", "accuracy")
        if accuracy is None:
            return None
        values = keep(state.setdefault("values", []), accuracy, self.lines)
        if line.step < self.warmup or len(values) < self.lines:
            return None
        mean = sum(values) / len(values)
        if mean >= self.accuracy:
            return FINE
        return Check(
            self.level,
            mean,
            self.accuracy,
            f"pairs are hardly told apart: accuracy {mean:.2f} over {self.lines} updates",
            "Labels may be near chance (read some pairs), or learning_rate is too low",
        )

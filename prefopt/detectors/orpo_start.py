"""Whether ORPO began from a model that had yet to learn to answer, with too few rows to teach it that too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep


@dataclass(frozen=True)
class OrpoStart:
    """ORPO from a model that was not fine-tuned on answers like the chosen ones.

    The gap is how far the chosen answers' `nll` has fallen in the run itself: what SFT would have done before. Answers
    of the start model that do not end (`eval/probe_finished`) say the same. With many rows ORPO teaches both at once:
    on small models accuracy was 0.74 after ORPO from a base model on 300 rows, 0.98 from an SFT model, and 1.00 from
    either on 20,000 rows for five epochs (synthetic, one seed).
    """

    # fall of the chosen answers' nll, nats per token, from which on the start was no SFT model
    gap: float = 0.5
    # the same, with which and a log-odds accuracy above `accuracy` the run is sick
    large_gap: float = 1.0
    # share of the start model's answers that end below which it cannot answer yet
    finished: float = 0.8
    # log-odds accuracy above which the preference is learnt, and only the answers are not
    accuracy: float = 0.95
    # rows times epochs from which on it is worth no more than a note
    many: int = 20_000
    # updates that are averaged
    lines: int = 5
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "orpo_start"
    title: ClassVar[str] = "ORPO from a model that cannot answer yet"

    def see(self, state: State, line: Line) -> Check | None:
        if line.run.objective != "orpo":
            return None
        ends = line.get("eval/probe_finished")
        if ends is not None:
            state.setdefault("finished", ends)
        gap, accuracies = self._gap(state, line), state.setdefault("accuracies", [])
        if line.get("rewards/accuracies") is not None:
            keep(accuracies, line.get("rewards/accuracies"), self.lines)
        if gap is None:
            return None
        accuracy = sum(accuracies) / max(len(accuracies), 1)
        level = self._level(gap, state.get("finished"), accuracy, line)
        return self._check(level, gap, state, line) if level else FINE

    def _gap(self, state: State, line: Line) -> float | None:
        """The fall of nll so far, of held-out rows or of those of the first epoch: later ones are known by heart."""
        held_out, nll = line.get("eval/nll"), line.get("nll")
        if held_out is not None:
            start = state.setdefault("held_out", held_out)
            state["gap"] = max(start - held_out, state.get("gap", 0.0))
        elif nll is not None and (line.get("epoch") or 0.0) <= 1:
            first, recent = state.setdefault("first", []), keep(state.setdefault("recent", []), nll, self.lines)
            if len(first) < self.lines:
                first.append(nll)
            start = state.get("held_out", max(first[0], sum(first) / len(first)))
            if len(recent) == self.lines:
                state["gap"] = max(start - sum(recent) / len(recent), state.get("gap", 0.0))
        elif nll is None:
            return None
        gap: float | None = state.get("gap")
        return gap

    def _level(self, gap: float, finished: float | None, accuracy: float, line: Line) -> Level | None:
        cannot_end = finished is not None and finished < self.finished
        if gap < self.gap and not cannot_end:
            return None
        epochs, rows = line.run.number("epochs") or 1.0, line.run.rows
        if rows is not None and rows * epochs >= self.many:
            return "info"
        return "sick" if gap >= self.large_gap and accuracy > self.accuracy else "warn"

    def _check(self, level: Level, gap: float, state: State, line: Line) -> Check:
        finished = state.get("finished")
        ends = f"; {finished:.0%} of the start model's answers ended by themselves" if finished is not None else ""
        rows = f" on {line.run.rows:,} rows" if line.run.rows is not None else ""
        return Check(
            level,
            gap,
            self.gap,
            f"ORPO from a model that was not fine-tuned on such answers: their nll fell by {gap:.2f} nats a token in "
            f"this run{rows}{ends}",
            "Fine-tune on the chosen answers first and begin ORPO from that, or give many more rows",
            before=_fine_tuning(line),
            since=1,
            evidence={"nll": line.get("eval/nll", "nll"), "finished_at_start": finished},
        )


def _fine_tuning(line: Line) -> dict[str, Any]:
    """SFT on the chosen answers, for as many epochs and at a rate for it."""
    return {"objective": "sft", "epochs": max(line.run.number("epochs") or 1.0, 1.0)}

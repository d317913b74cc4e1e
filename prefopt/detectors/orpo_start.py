"""Whether ORPO began from a model that had yet to learn to answer, with too few rows to teach it that too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State, rank
from prefopt.detectors.series import keep, wilson_upper


@dataclass(frozen=True)
class OrpoStart:
    """ORPO from a model that was not fine-tuned on answers like the chosen ones.

    With a reward this is known before the first update: the start model's own answers to held-out prompts are worse
    than those of the rows (`eval/probe_wins`, one half for a model that wrote them). It says so too of a good model
    whose rows are by a better one, so that it is a warning and no more.

    Without one the gap counts: how far the chosen answers' `nll` falls in the run itself, or how much less likely they
    are at the start than the model's own answers. Answers that do not end (`eval/probe_finished`) say the same. A model
    that writes fluently and answers something else shows none of this. With many rows ORPO teaches both at once: on
    small models accuracy was 0.74 after ORPO from a base model on 300 rows, 0.98 from an SFT model, and 1.00 from
    either on 20,000 rows for five epochs (synthetic, one seed).
    """

    # share of the rows' answers that the start model's are better than: with the upper end of its 95 % interval below
    # this it is a warning
    wins: float = 0.5
    # without wins: fall of the chosen answers' nll, or their nll above that of the model's own answers, nats per token,
    # from which on the start was no SFT model
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
    # the highest level that is said without wins: on an unseen task 17 of 37 warnings were right
    unverified: Level = "info"
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "orpo_start"
    title: ClassVar[str] = "ORPO from a model that cannot answer yet"

    def see(self, state: State, line: Line) -> Check | None:
        if line.run.objective != "orpo":
            return None
        for name in ("finished", "wins", "compared"):
            value = line.get(f"eval/probe_{name}")
            if value is not None and (name == "finished" or line.step == 0):  # a later one is not the start's
                state.setdefault(name, value)
        if "wins" in state:
            return self._by_wins(state, line) if line.get("eval/probe_wins") is not None else None
        gap, accuracies = self._gap(state, line), state.setdefault("accuracies", [])
        if line.get("rewards/accuracies") is not None:
            keep(accuracies, line.get("rewards/accuracies"), self.lines)
        if gap is None:
            return None
        accuracy = sum(accuracies) / max(len(accuracies), 1)
        level = self._level(gap, state.get("finished"), accuracy, line)
        return self._check(level, gap, state, line) if level else FINE

    def _by_wins(self, state: State, line: Line) -> Check | None:
        """What the start model's own answers say, beside those of the rows."""
        wins, compared = state["wins"], state.get("compared")
        if not compared or compared < 0 or not 0 <= wins <= 1:
            return None
        upper = wilson_upper(wins, compared)
        if upper >= self.wins:
            return FINE
        return Check(
            self._at_most("warn", line),
            wins,
            self.wins,
            f"ORPO from a model that cannot answer like the rows yet: its own answers to {compared:.0f} held-out "
            f"prompts are better than those of the rows {wins:.0%} of the time (at most {upper:.0%} at 95 %; a model "
            f"that wrote them: 50 %){_rows(line)}",
            _REMEDY,
            before=_fine_tuning(line),
            evidence={"upper": upper, "compared": compared, "now": line.get("eval/probe_wins")},
        )

    def _gap(self, state: State, line: Line) -> float | None:
        """The fall of nll so far, of held-out rows or of those of the first epoch: later ones are known by heart."""
        held_out, nll = line.get("eval/nll"), line.get("nll")
        if held_out is not None:
            own = line.get("eval/probe_nll")
            if "held_out" not in state and own is not None:
                state["gap"] = max(held_out - own, 0.0)
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
        level: Level = "sick" if gap >= self.large_gap and accuracy > self.accuracy else "warn"
        return self._at_most(min(level, self.unverified, key=rank), line)

    def _at_most(self, level: Level, line: Line) -> Level:
        """The level, or that of a note where there are many rows."""
        epochs, rows = line.run.number("epochs") or 1.0, line.run.rows
        return "info" if rows is not None and rows * epochs >= self.many else level

    def _check(self, level: Level, gap: float, state: State, line: Line) -> Check:
        finished = state.get("finished")
        ends = f"; {finished:.0%} of the start model's answers ended by themselves" if finished is not None else ""
        return Check(
            level,
            gap,
            self.gap,
            f"ORPO from a model that was not fine-tuned on such answers: their nll fell in this run, or was at its "
            f"start above that of the model's own answers, by {gap:.2f} nats a token{_rows(line)}{ends}",
            _REMEDY,
            before=_fine_tuning(line),
            since=1,
            evidence={"nll": line.get("eval/nll", "nll"), "finished_at_start": finished},
        )


_REMEDY = (
    "Fine-tune on thousands of such answers first, not on these rows alone where they are few, and begin ORPO from "
    "that, or give many more rows"
)


def _rows(line: Line) -> str:
    return f"; there are {line.run.rows:,} rows" if line.run.rows is not None else ""


def _fine_tuning(line: Line) -> dict[str, Any]:
    """SFT on the chosen answers, for as many epochs and at a rate for it."""
    return {"objective": "sft", "epochs": max(line.run.number("epochs") or 1.0, 1.0)}

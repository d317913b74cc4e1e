"""How far the policy has gone from what it could say before: measured without regard to beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, Run, State
from prefopt.detectors.series import keep

# these are meant to leave what the start model says
LEAVING = ("sft", "orpo", "reward", "prm")


@dataclass(frozen=True)
class Drift:
    """The start model's own answers to held-out prompts become unlikely: the policy leaves what it could say.

    The signal is `eval/probe_nll` and its rise over the first value, which does not depend on beta. Alone it says how
    far, not whether it did harm: good runs on many rows rise by 1 to 2 too. Harm shows where held-out rows are told
    apart less often than trained ones, so that with both known and alike it is a note (experiments/detectors).
    """

    # rise over the start, nats per token, from which on it is worth a warning
    warn: float = 0.5
    # and from which on more updates are a waste. Both grow with how much a task needs to change the model
    sick: float = 1.0
    # accuracy of the updates less that of the held-out rows, from which on the way there was learnt by heart; a
    # smaller gap makes it a note
    gap: float = 0.1
    # held-out accuracy above which all pairs are told apart, so that a gap could not show
    all_apart: float = 0.99
    # updates whose accuracy is averaged
    lines: int = 10
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "the policy leaves what it could say before"

    def see(self, state: State, line: Line) -> Check | None:
        nll = line.get("eval/probe_nll")
        trained = line.get("rewards/accuracies") if nll is None else None
        if trained is not None:
            keep(state.setdefault("trained", []), trained, self.lines)
        if nll is None or line.run.objective in LEAVING:
            return None
        start = state.setdefault("start", nll)
        rise = nll - start
        if rise < self.warn:
            state["good"] = line.step
            return FINE
        gap = self._gap(state, line)
        level: Level = "sick" if rise >= self.sick else "warn"
        if gap is not None and gap < self.gap:
            level = "info"
        return self._check(level, rise, gap, state, line)

    def _gap(self, state: State, line: Line) -> float | None:
        """How much more often trained rows are told apart than held-out ones, where that is known and can differ."""
        trained, held_out = state.get("trained"), line.get("eval/rewards/accuracies")
        if not trained or held_out is None or held_out > self.all_apart:
            return None
        return sum(trained) / len(trained) - held_out

    def _check(self, level: Level, rise: float, gap: float | None, state: State, line: Line) -> Check:
        start, good = state["start"], state.get("good", 0)
        judged = "quality usually peaks before that, whatever the loss says"
        if gap is not None:
            judged = (
                f"trained rows are told apart more often than held-out ones, by {gap:.2f}: they are learnt by heart"
            )
        if level == "info":
            judged = "held-out rows are told apart as well as trained ones, so it may have done no harm"
        return Check(
            level,
            rise,
            self.sick if level == "sick" else self.warn,
            f"drift: the start model's own answers to held-out prompts have become {rise:.2f} nats a token less likely "
            f"(from {start:.2f} to {start + rise:.2f}); {judged}",
            f"Stop earlier (on_sick=stop; it was fine at step {good}), take fewer epochs, or raise beta",
            restrained(line.run),
            evidence={"start": start, "eval/probe_nll": start + rise, "fine_at": good, "gap": gap},
        )


def restrained(run: Run) -> dict[str, Any]:
    """Options that keep a policy nearer to its reference: a larger beta, an end at the next such finding."""
    beta, rate = run.number("beta"), run.number("learning_rate")
    change: dict[str, Any] = {"on_sick": "stop"}
    if beta is not None and beta < 1:
        change["beta"] = 0.1 if beta < 0.03 else round(min(3 * beta, 1.0), 6)
    elif rate is not None:
        change["learning_rate"] = rate / 3
    if (run.number("epochs") or 0) > 1 and not run.options.get("max_steps"):
        change["epochs"] = 1.0
    return change

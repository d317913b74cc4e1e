"""How far the policy has gone from what it could say before: measured without regard to beta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, Run, State, rank
from prefopt.detectors.hollow_margin import on_policy
from prefopt.detectors.series import keep

# these are meant to leave what the start model says
LEAVING = ("sft", "orpo", "reward", "prm")


@dataclass(frozen=True)
class Drift:
    """The start model's own answers to held-out prompts become unlikely: the policy leaves what it could say.

    The signal is `eval/probe_nll` and its rise over the first value, which does not depend on beta. Alone it says how
    far, not whether it did harm: good runs on many rows rise by 1 to 2 too. Whether it did is asked of a reward, where
    there is one: the policy's own answers are no better than at the start, or worse than they were (`eval/probe_gain`).
    Without one, held-out rows that are told apart as often as trained ones make it a note.
    """

    # rise over the start, nats per token, from which on it is worth a warning
    warn: float = 0.5
    # and from which on more updates are a waste. Both grow with how much a task needs to change the model
    sick: float = 1.0
    # standard deviations of the start model's rewards: a gain over the start below this is none
    gained: float = 0.1
    # and a fall of so much since the best is one: the best mean of two neighbouring evaluations, as the largest of many
    # noisy values is too large
    lost: float = 0.2
    # standard errors that it must be larger by, times how many the largest of so many evaluations is above their mean
    sure: float = 0.6
    # without a reward, accuracy of the updates less that of held-out rows, from which on the way there was learnt by
    # heart; a smaller gap makes it a note
    gap: float = 0.1
    # held-out accuracy above which all pairs are told apart, so that a gap could not show
    all_apart: float = 0.99
    # updates whose accuracy is averaged
    lines: int = 10
    # the highest level that is said where a reward says that it did harm: on an unseen task 41 of 43 warnings held
    most: Level = "sick"
    # and without one: 12 of 24 were on one, 41 of 44 on another (experiments/detectors)
    unverified: Level = "info"
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
        rise, harm = nll - start, self._harm(state, line)
        if rise < self.warn:
            state["good"] = line.step
            return FINE
        level: Level = "sick" if rise >= self.sick else "warn"
        gap = self._gap(state, line)
        by_heart = gap is None or gap >= self.gap
        known = _by_heart(gap, by_heart) if harm is None else _by_reward(state, harm)
        most = self.unverified if harm is None else self.most
        if harm is None or level == "warn":  # near the start, where a gain is small too, both have to say so
            harm = by_heart and harm is not False
        said = min(level, most, key=rank) if harm else "info"
        return self._check(said, harm, rise, gap, known, state, line)

    def _harm(self, state: State, line: Line) -> bool | None:
        """Whether the policy's answers are no better than the start model's, or worse than they were; None: unknown."""
        gain, error = line.get("eval/probe_gain"), line.get("eval/probe_gain_error")
        if gain is None or error is None or error < 0:
            return None
        before, best = state.get("gain", 0.0), state.get("best", 0.0)  # at the start it is 0 by definition
        state["gain"], state["best"] = gain, max(best, (before + gain) / 2)
        state["evaluations"] = state.get("evaluations", 0) + 1
        noise = error * math.sqrt(2 * math.log(state["evaluations"]))
        return gain < self.gained or state["best"] - gain >= self.lost + self.sure * noise

    def _gap(self, state: State, line: Line) -> float | None:
        """How much more often trained rows are told apart than held-out ones, where that is known and can differ."""
        trained, held_out = state.get("trained"), line.get("eval/rewards/accuracies")
        if not trained or held_out is None or held_out > self.all_apart:
            return None
        return sum(trained) / len(trained) - held_out

    def _check(
        self, level: Level, harm: bool, rise: float, gap: float | None, known: str, state: State, line: Line
    ) -> Check:
        start, good = state["start"], state.get("good", 0)
        return Check(
            level,
            rise,
            self.sick if harm and rise >= self.sick else self.warn,
            f"drift: the start model's own answers to held-out prompts have become {rise:.2f} nats a token less likely "
            f"(from {start:.2f} to {start + rise:.2f}); {known}",
            f"{_REMEDY} (it was fine at step {good})",
            on_policy(line.run.options) or restrained(line.run),
            evidence={
                "start": start,
                "eval/probe_nll": start + rise,
                "fine_at": good,
                "gap": gap,
                "gain": state.get("gain"),
                "best": state.get("best"),
            },
        )


_REMEDY = (
    "Label more pairs of the start model's own answers (prefopt sample --as pairs), or train online with what labels "
    "them; a larger beta and fewer epochs limit the harm and do not make up for too few pairs"
)


def _by_heart(gap: float | None, harm: bool) -> str:
    if gap is None:
        return "quality usually peaks before that, whatever the loss says"
    if not harm:
        return "held-out rows are told apart as well as trained ones, so it may have done no harm"
    return f"trained rows are told apart more often than held-out ones, by {gap:.2f}: they are learnt by heart"


def _by_reward(state: State, harm: bool) -> str:
    words = (
        f"the reward of the policy's answers is {state['gain']:+.2f} standard deviations from the start model's, at "
        f"best it was {state['best']:+.2f}"
    )
    return words if harm else f"it has done no harm so far, as {words}"


def restrained(run: Run) -> dict[str, Any]:
    """Options that keep a policy nearer to its reference: a larger beta, one epoch."""
    beta, rate = run.number("beta"), run.number("learning_rate")
    change: dict[str, Any] = {}
    if beta is not None and beta < 1:
        change["beta"] = 0.1 if beta < 0.03 else round(min(3 * beta, 1.0), 6)
    elif rate is not None:
        change["learning_rate"] = rate / 3
    if (run.number("epochs") or 0) > 1 and not run.options.get("max_steps"):
        change["epochs"] = 1.0
    return change

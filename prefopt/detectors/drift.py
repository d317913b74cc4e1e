"""How far the policy has gone from what it could say before: measured without regard to beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Line, Run, State

# these are meant to leave what the start model says
LEAVING = ("sft", "orpo", "reward", "prm")


@dataclass(frozen=True)
class Drift:
    """The start model's own answers to held-out prompts become unlikely: the policy leaves what it could say.

    The signal is `eval/probe_nll` and its rise over the first value, which does not depend on beta. On small models
    with a known reward the quality peaked at nearly the same rise for beta from 0.01 to 1.0 and fell beyond it, while
    the loss on held-out pairs said so for beta near 0.1 alone (synthetic, one seed).
    """

    # rise over the start, nats per token, from which on it is worth a warning
    warn: float = 0.5
    # and from which on more updates are a waste. Both grow with how much a task needs to change the model
    sick: float = 1.0
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "the policy leaves what it could say before"

    def see(self, state: State, line: Line) -> Check | None:
        nll = line.get("eval/probe_nll")
        if nll is None or line.run.objective in LEAVING:
            return None
        start = state.setdefault("start", nll)
        rise = nll - start
        if rise < self.warn:
            state["good"] = line.step
            return FINE
        sick = rise >= self.sick
        good = state.get("good", 0)
        return Check(
            "sick" if sick else "warn",
            rise,
            self.sick if sick else self.warn,
            f"drift: the start model's own answers to held-out prompts have become {rise:.2f} nats a token less likely "
            f"(from {start:.2f} to {nll:.2f}); quality usually peaks before that, whatever the loss says",
            f"Stop earlier (on_sick=stop; it was fine at step {good}), take fewer epochs, or raise beta",
            restrained(line.run),
            evidence={"start": start, "eval/probe_nll": nll, "fine_at": good},
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

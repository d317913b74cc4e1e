"""Every number prefopt logs: what it is, its unit, and what healthy looks like. A name that is not here cannot be
logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """definition in words, unit, and the shape a healthy run shows.

    sign: the direction that is better; "neither" where none is by itself. more: the long answer of `prefopt explain`.
    """

    definition: str
    unit: str
    healthy: str
    sign: Literal["higher", "lower", "neither"] = "neither"
    more: str = ""


METRICS: dict[str, Metric] = {
    "loss": Metric("the objective, averaged over its items in the step", "nats", "falls, then flattens"),
    "nll": Metric("negative log-likelihood of trained completion tokens, mean over tokens", "nats/token", "falls"),
    "rewards/chosen": Metric("beta x (logp - reference logp) of the chosen completion", "nats", "near 0; may fall"),
    "rewards/rejected": Metric("beta x (logp - reference logp) of the rejected completion", "nats", "falls"),
    "rewards/margins": Metric("rewards/chosen - rewards/rejected", "nats", "rises from exactly 0"),
    "rewards/accuracies": Metric("share of pairs with a positive margin", "share", "rises; 0.6-0.8 on held-out pairs"),
    "logps/chosen": Metric("log-probability of the chosen completion", "nats", "often falls in a healthy run"),
    "logps/rejected": Metric("log-probability of the rejected completion", "nats", "falls faster than chosen"),
    "grad_norm": Metric("norm of the gradient before clipping", "", "steady, no jumps"),
    "learning_rate": Metric("step size of this update", "", "follows the schedule"),
    "tokens": Metric("tokens in this step, a shared prompt counted once", "tokens", "steady"),
    "tokens_per_second": Metric("tokens trained per second, a shared prompt counted once", "tokens/s", "steady"),
    "epoch": Metric("passes over the training data", "epochs", "rises"),
}


def known(name: str) -> str:
    """`name`, or an error if it (less an `eval/` in front) is not in the registry."""
    if name.removeprefix("eval/") not in METRICS:
        raise KeyError(f"metric {name!r} is not registered in prefopt/metrics.py; add its definition there first")
    return name

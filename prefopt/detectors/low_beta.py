"""Whether the options alone make it likely that the policy leaves the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.detectors.finding import FINE, Check, Line, State

# whose beta holds the policy to a reference
OBJECTIVES = ("dpo", "ipo", "kto", "bco", "aot")


@dataclass(frozen=True)
class LowBeta:
    """A small beta on few rows, seen more than once. A note: with many rows a small beta is fine, 0.01 was the best
    found for DPO in all six settings of Meng et al. 2024 (arXiv:2405.14734) on 60,000 pairs.
    """

    # beta up to which the pull to the reference is weak
    beta: float = 0.02
    # rows below which that matters
    rows: int = 5_000
    # passes above which rows are learnt by heart
    epochs: float = 1.0
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "low_beta"
    title: ClassVar[str] = "little holds the policy to the reference"

    def see(self, state: State, line: Line) -> Check | None:
        beta, rows = line.run.number("beta"), line.run.rows
        # what is planned, or, in a log that does not say, what was reached
        epochs = max(line.run.number("epochs") or 0.0, line.get("epoch") or 0.0)
        if beta is None or rows is None or line.run.objective not in OBJECTIVES:
            return None
        if beta > self.beta or rows >= self.rows or epochs <= self.epochs:
            return FINE
        return Check(
            "info",
            beta,
            self.beta,
            f"beta is {beta:g} with {rows:,} rows and {epochs:g} epochs: little holds the policy to the reference",
            "Evaluate often (eval_every) and watch eval/probe_nll; beta 0.1 is the usual start",
            {"beta": 0.1},
        )

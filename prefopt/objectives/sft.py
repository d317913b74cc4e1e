"""Supervised fine-tuning: cross-entropy on completion tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Nothing


@dataclass(frozen=True)
class SFT:
    """-sum log p over trained completion tokens; the mean is over tokens, all of the step's, on all ranks."""

    facts: ClassVar[Facts] = Facts(
        name="sft",
        title="Supervised fine-tuning",
        data="demonstrations",
        source="cross-entropy (maximum likelihood)",
        learning_rate=2e-5,
        healthy="`nll` falls fast at first, then slowly, on held-out rows (`eval/nll`) too. The mean is over tokens, "
        "so a long answer weighs more than a short one.",
        failures="`eval/nll` turns up while `nll` still falls: the run memorises its rows; take fewer epochs, or "
        "`keep=best` with `eval_every`. "
        "`nll` of a pretrained model starts far above 3: the text does not fit the model, often a wrong chat template; "
        "look at the rows that a dry run shows. "
        "The model no longer does what it could before: the rate is too high or the rows too alike; a lower "
        "`learning_rate`, an adapter (`lora_rank=16`), or other kinds of rows mixed in. "
        "Answers do not end: the answers were cut before their end token; raise `max_length`, or drop long rows.",
    )

    def count(self, batch: Batch) -> Tensor:
        return batch.trained.sum()

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        nll = -out.logp[batch.trained]  # [trained tokens]
        return nll.sum(), {"nll": nll}

    def at_start(self) -> dict[str, float]:
        return {}

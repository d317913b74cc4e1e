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

"""Supervised fine-tuning: cross-entropy on completion tokens, plain or weighted by the tokens' own probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Nothing


@dataclass(frozen=True)
class SFT:
    """-log p of every trained completion token; its mean over tokens, all of the update's, on all processes.

        loss  =  -w log p(t | x, tokens before t)     for each trained token t of an answer to x, mean over tokens
        w     =  1, or with `weighting` probability p(t | x, tokens before t) as a constant

    Weighted by its own probability (dynamic fine-tuning) a token's gradient is that of p and not of log p, so that
    tokens the model finds impossible no longer dominate.
    Maximum likelihood; the weight: Wu et al. 2025, arXiv:2508.05629.
    """

    # none: every token counts alike; probability: by how likely the model already finds it (DFT), which changes less of
    # what the model can do and learns what is new to it more slowly
    weighting: Literal["none", "probability"] = "none"

    facts: ClassVar[Facts] = Facts(
        name="sft",
        title="Supervised fine-tuning",
        data="demonstrations",
        source="cross-entropy (maximum likelihood)",
        learning_rate=2e-5,
        healthy="`nll` falls fast at first, then slowly, on held-out rows (`eval/nll`) too. The mean is over tokens, "
        "so a long answer weighs more than a short one. With `weighting` probability `loss` may rise while `nll` "
        "falls: -p log p is small for impossible tokens as for sure ones.",
        failures="`eval/nll` turns up while `nll` still falls: the run memorises its rows; take fewer epochs, or "
        "`keep=best` with `eval_every`. "
        "`nll` of a pretrained model starts far above 3: the text does not fit the model, often a wrong chat template; "
        "look at the rows that a dry run shows. "
        "The model no longer does what it could before: the rate is too high or the rows too alike; a lower "
        "`learning_rate`, an adapter (`lora_rank=16`), or other kinds of rows mixed in. "
        "`nll` stands still with `weighting` probability: the rows are too far from what the model writes; `weighting` "
        "none. "
        "Answers do not end: the answers were cut before their end token; raise `max_length`, or drop long rows.",
    )

    def __post_init__(self) -> None:
        if self.weighting not in ("none", "probability"):
            raise ValueError(f"weighting must be none or probability, got {self.weighting!r}")

    def count(self, batch: Batch) -> Tensor:
        return batch.trained.sum()

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        nll = -out.logp[batch.trained]  # [trained tokens]
        loss = nll if self.weighting == "none" else nll * torch.exp(-nll.detach())
        return loss.sum(), {"nll": nll}

    def at_start(self) -> dict[str, float]:
        return {}

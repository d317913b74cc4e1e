"""Direct preference optimisation: a classifier on pairs whose logit is the policy's own log-ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Models


class Reference(NamedTuple):
    """Sum of each completion's reference log-probs, [N] nats."""

    logp: Tensor


@dataclass(frozen=True)
class DPO:
    """-log s(beta (log-ratio of chosen - log-ratio of rejected)), log-ratio = sum over tokens of logp - reference logp.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further (useful range 0.01 to 0.5)
    beta: float = 0.1

    facts: ClassVar[Facts] = Facts(
        name="dpo",
        title="Direct preference optimisation",
        data="pairs",
        source="arXiv:2305.18290 eq. 7",
        learning_rate=1e-6,
        reference=True,
        healthy="Before the first update the loss is ln 2 = 0.6931 and every reward is 0; a run where they are not is "
        "stopped. `rewards/margins` rises from 0, and `eval/loss` stays below its start and falls. "
        "`eval/rewards/accuracies` settles at 0.6 to 0.8 on human preferences; it is near 1 only where the answers are "
        "easy to tell apart. `logps/chosen` often falls, more slowly than `logps/rejected`: "
        "`prefopt explain logps/chosen` says when that is fine.",
        failures="`eval/loss` turns up while `loss` still falls: the run memorises its pairs; stop at the turn "
        "(`keep=best` with `eval_every`), take fewer epochs or a larger `beta`. "
        "`logps/chosen` and `logps/rejected` fall fast and samples get worse: the policy has left the reference; a "
        "larger `beta`, a lower `learning_rate` or fewer epochs. "
        "`loss` near 0 and `rewards/accuracies` near 1 within a few hundred updates: the two answers can be told apart "
        "by their surface (a phrase, the length, who wrote them), so little else is learned; look at the pairs, and "
        "prefer pairs sampled from the model that is trained. "
        "`loss` stays at 0.69: the learning rate is too low, or the labels are near chance; raise `learning_rate`, or "
        "keep only pairs whose difference is clear. "
        "Answers grow longer: the chosen answers are longer, and the loss cannot tell length from quality; balance the "
        "lengths in the data. "
        "Samples are not in the form of the data from the start: the model was never taught it; run `sft` on the "
        "chosen answers first.",
    )

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}; 0.1 is the usual start")

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Reference:
        return Reference(batch.sum_tokens(models.reference(batch)))

    def loss(self, batch: Batch, out: Outputs, targets: Reference) -> tuple[Tensor, dict[str, Tensor]]:
        logp = batch.sum_tokens(out.logp)  # [N]
        chosen, rejected = batch.pairs(self.beta * (logp - targets.logp))  # [G], [G]
        loss = -F.logsigmoid(chosen - rejected)  # [G]
        chosen_logp, rejected_logp = batch.pairs(logp)
        return loss.sum(), {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(loss.dtype),
            "logps/chosen": chosen_logp,
            "logps/rejected": rejected_logp,
        }

    def at_start(self) -> dict[str, float]:
        return {"loss": math.log(2), "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}

"""Contrastive preference optimisation: DPO's loss without its reference, held in place by the chosen completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Nothing, check_ranges
from prefopt.objectives.pairwise import pair_metrics


@dataclass(frozen=True)
class CPO:
    """DPO with a uniform reference, plus the chosen completion's negative log-likelihood; no reference model.

        loss = -(1 - label_smoothing) log s(beta (L_w - L_l)) - label_smoothing log s(beta (L_l - L_w))
               + sft_weight (-m_w)

    L_w, L_l: log-prob of the chosen and the rejected completion, summed over trained tokens, nats; m_w: L_w per token;
    s: sigmoid. The loss is the mean over pairs.
    Xu et al. 2024, arXiv:2401.08417.
    """

    # scale of the log-probs' difference: larger makes a pair count as settled sooner, smaller pushes it further apart
    # (useful range 0.01 to 0.5)
    beta: float = 0.1
    # weight of the chosen completion's negative log-likelihood per token (cpo_alpha in TRL): larger holds on to the
    # chosen answers, smaller lets their log-probs fall with the rejected ones' (useful range 0.1 to 2)
    sft_weight: float = 1.0
    # share of pairs whose labels are thought to be the wrong way round: larger stops pushing a pair sooner, 0 trusts
    # all (at least 0, below 0.5)
    label_smoothing: float = 0.0

    facts: ClassVar[Facts] = Facts(
        name="cpo",
        title="Contrastive preference optimisation",
        data="pairs",
        source="arXiv:2401.08417",
        learning_rate=1e-6,
        healthy=(
            "`nll` falls or stays, `rewards/margins` and `rewards/accuracies` rise. `rewards/accuracies` may start far "
            "from 0.5, because log-probs are compared as they are: longer answers start behind."
        ),
        failures=(
            "Answers get shorter: log-probs are sums, so a shorter answer is likelier before anything is learnt; use "
            "SimPO, which takes means, or DPO, which subtracts a reference. "
            "`nll` rises: the preference term outweighs the likelihood; raise sft_weight or lower the learning rate. "
            "`rewards/accuracies` stuck where it started: beta is so large that pairs of unequal length count as "
            "settled or hopeless; lower beta."
        ),
    )

    def __post_init__(self) -> None:
        check_ranges(self, "sft_weight", above_zero=("beta",))
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.pairs(self.beta * batch.sum_tokens(out.logp))  # [G], [G]
        nll = -batch.pairs(batch.mean_tokens(out.logp))[0]  # [G]
        margin, flipped = chosen - rejected, self.label_smoothing
        loss = -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin) + self.sft_weight * nll
        return loss.sum(), {**pair_metrics(batch, out.logp, chosen, rejected), "nll": nll}

    def at_start(self) -> dict[str, float]:
        return {}

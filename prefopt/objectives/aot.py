"""Alignment via optimal transport: not every pair, but the whole distribution of chosen rewards must lie above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.pairwise import pair_metrics
from prefopt.objectives.update import everyone, policy_logp


class Partners(NamedTuple):
    """Constants of an update: what each pair's two values, u and v, are compared with.

    logp [N]: sum of each completion's reference log-probs, nats. below [G]: the v of the rank that the pair's u has,
    above [G]: the u of the rank that its v has, nats.
    """

    logp: Tensor
    below: Tensor
    above: Tensor


@dataclass(frozen=True)
class AOT:
    """-log s(beta (u_k - v_k)) over ranks k: sorted values u must exceed sorted values v, quantile by quantile.

        h(y)      =  log p(y | x) - log p_reference(y | x)           log p summed over the trained tokens of y
        unpaired  :  u = h(chosen),  v = h(rejected)
        paired    :  u = log p(chosen) - log p(rejected),  v = the same of the reference
        loss      =  -log s(beta * (u_k - v_k))                      u_k, v_k the k-th smallest, mean over k

    Both sides are sorted over the whole update, over all forward passes and processes: a small update sorts little, and
    with one pair this is DPO. Each side is a constant for the other's gradient.
    Melnyk et al. 2024, arXiv:2406.05882.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further (useful range 0.01 to 0.5)
    beta: float = 0.1
    # unpaired: chosen completions against rejected ones, whoever answers whom; paired: each pair's difference against
    # the reference's differences
    pairing: Literal["unpaired", "paired"] = "unpaired"

    facts: ClassVar[Facts] = Facts(
        name="aot",
        title="Alignment via optimal transport",
        data="pairs",
        source="arXiv:2406.05882",
        learning_rate=1e-6,
        reference=True,
        forwards=1,
        healthy="Before the first update the loss is ln 2 = 0.6931 and every reward is 0. `rewards/margins` rises; "
        "`rewards/accuracies` rises more slowly than DPO's, because a chosen completion has to beat the rejected one "
        "of its own rank, not its own pair's. `logps/chosen` often falls, more slowly than `logps/rejected`.",
        failures="`loss` falls and `rewards/accuracies` stays near 0.5: completions differ more between prompts than "
        "within a pair, so ranks say little about pairs; `pairing` paired, or DPO. "
        "The result is DPO's: the update is too small to sort; a larger `batch_size`, 32 or more. "
        "Slower than DPO: every update scores its rows once more without gradient, to sort them; `dpo` does not.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, above_zero=("beta",))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Partners:
        reference = batch.sum_tokens(models.reference(batch))  # [N]
        upper, lower = self.sides(batch, batch.sum_tokens(policy_logp(batch, models)), reference)  # [G], [G]
        values, own = everyone(batch, torch.stack([upper, lower], 1))  # [E, 2]
        return Partners(reference, partners(values[:, 0], values[:, 1])[own], partners(values[:, 1], values[:, 0])[own])

    def loss(self, batch: Batch, out: Outputs, targets: Partners) -> tuple[Tensor, dict[str, Tensor]]:
        logp = batch.sum_tokens(out.logp)  # [N]
        upper, lower = self.sides(batch, logp, targets.logp)  # [G], [G]
        loss = -F.logsigmoid(self.beta * (upper - targets.below))  # [G]
        # the same rank's term seen from its lower side, perhaps in another forward pass: its gradient, not its value
        seen_from_below = -F.logsigmoid(self.beta * (targets.above - lower))  # [G]
        loss = loss + seen_from_below - seen_from_below.detach()
        chosen, rejected = batch.pairs(self.beta * (logp - targets.logp))
        return loss.sum(), pair_metrics(batch, out.logp, chosen, rejected)

    def sides(self, batch: Batch, logp: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """u and v of each pair, [G], [G] nats, from sums over completions [N], [N]."""
        if self.pairing == "unpaired":
            return batch.pairs(logp - reference)
        (chosen, rejected), (reference_chosen, reference_rejected) = batch.pairs(logp), batch.pairs(reference)
        return chosen - rejected, reference_chosen - reference_rejected

    def at_start(self) -> dict[str, float]:
        return {"loss": math.log(2), "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [E] the one of `others` [E] that has its rank: optimal transport in one dimension."""
    rank = values.argsort(stable=True).argsort()  # [E]
    return others.sort().values[rank]

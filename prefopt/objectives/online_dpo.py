"""Online DPO: the policy's own best and worst completion of each prompt, as a pair for DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives import pairwise
from prefopt.objectives.advantages import group_sum, scored
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.pairwise import Settings


class Picked(NamedTuple):
    """Constants of a rollout. sign [N]: 1 for the best completion of a prompt, -1 for the worst, 0 for the others;
    logp [N]: log-prob under the reference, nats.
    """

    sign: Tensor
    logp: Tensor


@dataclass(frozen=True)
class OnlineDPO:
    """-log s(r(best) - r(worst)): DPO on two completions of each prompt that the policy wrote itself.

        r(y)  =  beta * (log p(y | x) - log p_reference(y | x))      log p summed over the trained tokens of y
        loss  =  -log s(r(best) - r(worst))                          s(z) = 1 / (1 + exp(-z)), mean over prompts

    Best and worst are those with the highest and the lowest reward; of equal ones, the first. The others only widen
    the choice. A prompt whose completions all have one reward, or of which only one has any, adds 0 to the mean.
    Guo et al. 2024, arXiv:2402.04792 (two completions, which one is preferred); best and worst of n as in Dong et al.
    2024, arXiv:2405.07863.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further
    beta: float = 0.1
    # what is made of the two rewards. sigmoid: DPO's, which never has enough; ipo: (log-ratio(best) - log-ratio(worst)
    # - 1 / (2 beta))^2, which stops at that distance
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"

    facts: ClassVar[Facts] = Facts(
        name="online_dpo",
        title="Online direct preference optimisation",
        data="prompts",
        source="arXiv:2402.04792",
        learning_rate=5e-7,
        reference=True,
        live=True,
        least_completions=2,
        healthy="Before the first update `rewards/margins` is 0. `reward` rises over tens of updates; "
        "`rewards/accuracies` settles above 0.5, well below 1, as each pair is new. `ties` stays low.",
        failures="`ties` near 1: best and worst are equally good, so nothing is learnt; more completions of each "
        "prompt, easier or harder prompts, a reward with more steps than right and wrong. "
        "`reward` rises and samples get worse: the reward is fooled; read samples, a larger `beta`. "
        "`logps/chosen` falls fast and answers grow long: the policy has left the reference; a larger `beta` or a "
        "lower `learning_rate`.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, above_zero=("beta",))

    def count(self, batch: Batch) -> Tensor:
        return (group_sum(batch, scored(batch.score).float()) > 0).sum()  # prompts with a reward, tied ones too

    def targets(self, batch: Batch, models: Models) -> Picked:
        return Picked(picked(batch), batch.sum_tokens(models.reference(batch)))

    def loss(self, batch: Batch, out: Outputs, targets: Picked) -> tuple[Tensor, dict[str, Tensor]]:
        logp = batch.sum_tokens(out.logp)  # [N]
        rewards = self.beta * (logp - targets.logp)  # [N]
        chosen, rejected = _both(batch, rewards, targets.sign)  # [P], [P], P prompts with a best and a worst
        kl = (logp - targets.logp)[scored(batch.score)]
        tied = group_sum(batch, targets.sign.abs()) == 0  # [G]
        known = group_sum(batch, scored(batch.score).float()) > 0  # [G]
        chosen_logp, rejected_logp = _both(batch, logp, targets.sign)
        return self.compare(chosen, rejected).sum(), {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": chosen_logp,
            "logps/rejected": rejected_logp,
            "ties": tied[known].to(chosen.dtype),
            "kl_reference": kl,
        }

    def compare(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The losses of the two rewards of each prompt: [P], [P] -> [P]."""
        if self.loss_type == "ipo":
            return ((chosen - rejected) / self.beta - 1 / (2 * self.beta)).square()
        return pairwise.sigmoid(chosen, rejected, Settings(self.beta))

    def at_start(self) -> dict[str, float]:
        return {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}


def picked(batch: Batch) -> Tensor:
    """1 for the best completion of each prompt by score, -1 for the worst, 0 for all others, [N]; the first of equals.

    Completions without a score are not considered; where best and worst are equally good neither is taken.
    """
    # both are the first completion, and 1 - 1 is 0, where all are equally good
    return _first_highest(batch, batch.score).float() - _first_highest(batch, -batch.score).float()


def _first_highest(batch: Batch, x: Tensor) -> Tensor:
    """The first completion of each prompt that has the highest x [N], [N] bool; none where no x is a number."""
    known = scored(x)
    top = x.new_full((batch.num_prompts,), -torch.inf).scatter_reduce(0, batch.group[known], x[known], "amax")  # [G]
    at = (known & (x == top[batch.group])).nonzero()[:, 0]  # completions, in order
    group = batch.group[at]
    is_first = torch.ones_like(group, dtype=torch.bool)
    is_first[1:] = group[1:] != group[:-1]
    return torch.zeros_like(known).index_fill(0, at[is_first], True)


def _both(batch: Batch, x: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """x [N] of the best and of the worst completion, of the prompts that have both: [P], [P]."""
    return x[sign > 0], x[sign < 0]

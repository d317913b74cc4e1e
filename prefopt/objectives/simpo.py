"""Simple preference optimisation: the mean log-prob of a completion is its reward, and no reference is needed."""

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
class SimPO:
    """The chosen completion's mean log-prob per token must exceed the rejected one's by a margin; no reference.

        loss = -log s(beta (m_w - m_l - gamma_beta_ratio)) + sft_weight (-m_w)

    m_w, m_l: mean log-prob per trained token of the chosen and the rejected completion, nats; s: sigmoid.
    beta gamma_beta_ratio is the paper's margin gamma. The loss is the mean over pairs.
    Meng et al. 2024, arXiv:2405.14734; the sft term as in CPO-SimPO, Xu et al. 2024, github.com/fe1ixxu/CPO_SIMPO.
    """

    # scale of the reward: larger separates the pair harder and stops sooner on pairs that are already apart, smaller
    # pushes all pairs alike (useful range 2 to 10; means differ less than sums do, so it is far above DPO's)
    beta: float = 2.0
    # nats per token by which the chosen completion should be ahead, gamma / beta in the paper: larger moves the policy
    # further, smaller leaves it nearer to where it started (useful range 0 to 1)
    gamma_beta_ratio: float = 0.5
    # weight of the chosen completion's negative log-likelihood per token: larger holds on to fluent answers and learns
    # less from the rejected ones, 0 leaves it out (useful range 0 to 1)
    sft_weight: float = 0.0

    facts: ClassVar[Facts] = Facts(
        name="simpo",
        title="Simple preference optimisation",
        data="pairs",
        source="arXiv:2405.14734",
        learning_rate=5e-7,
        healthy=(
            "`rewards/accuracies` rises and `rewards/margins` passes beta x gamma_beta_ratio for the pairs that are "
            "learnt. `rewards/chosen` may fall a little; it is a mean per token, so a fall by more than 0.5 x beta is "
            "much. `loss` does not start at ln 2: its start depends on the model."
        ),
        failures=(
            "Repetitive or incoherent answers: the learning rate is too high, and no reference holds the policy back; "
            "stay between 3e-7 and 1e-6, or set sft_weight. "
            "`rewards/chosen` and `rewards/rejected` both fall steadily: the margin is out of reach; lower "
            "gamma_beta_ratio or set sft_weight. "
            "Answers grow shorter or longer than the data's: the mean per token does not price length; compare with "
            "DPO."
        ),
    )

    def __post_init__(self) -> None:
        check_ranges(self, "gamma_beta_ratio", "sft_weight", above_zero=("beta",))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.pairs(batch.mean_tokens(out.logp))  # [G], [G]
        loss = -F.logsigmoid(self.beta * (chosen - rejected - self.gamma_beta_ratio))  # [G]
        if self.sft_weight:
            loss = loss - self.sft_weight * chosen
        return loss.sum(), {**pair_metrics(batch, out.logp, self.beta * chosen, self.beta * rejected), "nll": -chosen}

    def at_start(self) -> dict[str, float]:
        return {}

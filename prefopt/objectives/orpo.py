"""Odds ratio preference optimisation: supervised fine-tuning and preference in one pass, without a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Nothing, check_ranges
from prefopt.objectives.pairwise import pair_metrics

SURE = -1e-9  # nats: a mean log-prob above it counts as this, so that its odds and their gradient stay finite


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x below 0, exact near 0 and far from it; x [...] -> [...].

    Maechler 2012, "Accurately computing log(1 - exp(-|a|))": expm1 down to -ln 2, log1p below.
    """
    near = x > -math.log(2)
    # each branch gets an argument it can take: the gradient of the one not chosen would be NaN, not 0
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def log_odds(mean: Tensor) -> Tensor:
    """Log-odds of a completion whose mean log-prob per token is `mean` [N] nats, at most 0 -> [N]."""
    mean = mean.clamp(max=SURE)
    return mean - log1mexp(mean)


@dataclass(frozen=True)
class ORPO:
    """Negative log-likelihood of the chosen completion, plus the odds by which it is likelier than the rejected one.

        loss = -m_w + odds_weight (-log s(o(m_w) - o(m_l))),  o(m) = m - log(1 - exp m)

    m_w, m_l: mean log-prob per trained token of the chosen and the rejected completion, nats; o: the log-odds of a
    completion whose probability is exp m; s: sigmoid. The loss is the mean over pairs.
    Hong et al. 2024, arXiv:2403.07691.
    """

    # weight of the odds ratio, lambda in the paper (a reserved word here) and beta in TRL: larger weighs the preference
    # more against the likelihood of the chosen answers, smaller approaches plain fine-tuning on them (useful range
    # 0.05 to 1)
    odds_weight: float = 0.1

    facts: ClassVar[Facts] = Facts(
        name="orpo",
        title="Odds ratio preference optimisation",
        data="pairs",
        source="arXiv:2403.07691",
        learning_rate=5e-6,
        healthy=(
            "`nll` falls as in fine-tuning, and makes up most of the loss. `log_odds_chosen` and `rewards/accuracies` "
            "rise slowly behind it; `logps/rejected` often rises too at first, because both answers grow likelier."
        ),
        failures=(
            "Accuracies near 1 while answers stay poor: the model was not fine-tuned before and the data are few; "
            "fine-tune first, or train for more epochs. "
            "Nothing changes but `nll`: the odds weigh too little; raise odds_weight towards 1. "
            "`nll` stays high: the learning rate is that of DPO; ORPO also has to learn the answers, so raise it."
        ),
    )

    def __post_init__(self) -> None:
        check_ranges(self, "odds_weight")

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.pairs(batch.mean_tokens(out.logp))  # [G], [G]
        odds = log_odds(chosen) - log_odds(rejected)  # [G]
        loss = -chosen - self.odds_weight * F.logsigmoid(odds)  # [G]
        rewards = pair_metrics(batch, out.logp, self.odds_weight * chosen, self.odds_weight * rejected)
        return loss.sum(), {**rewards, "nll": -chosen, "log_odds_chosen": odds}

    def at_start(self) -> dict[str, float]:
        return {}

"""Binary classifier optimisation: the reward is the logit of a classifier of good and bad answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.labelled import both_classes, desirable, label_metrics, sign
from prefopt.objectives.pairwise import Reference
from prefopt.objectives.update import everyone, policy_logp
from prefopt.records import Example


@dataclass(frozen=True)
class BCO:
    """-log s(r - d) for a good completion, -log s(d - r) for a bad one: a classifier whose logit is the reward less d.

        r     =  beta (log p(y | x) - log p_reference(y | x))     log p summed over the trained tokens of y
        d     =  (mean of r over good completions + mean of r over bad ones) / 2, a constant
        s(u)  =  1 / (1 + exp(-u)); the loss is the mean over completions

    d is that of the update itself, over all forward passes and processes: a running mean over past updates would lag
    behind the policy and make an update depend on the ones before it. Where an update has one class, d is its mean.
    The paper's weighting of bad completions by a prompt classifier is left out.
    Jung et al. 2024, arXiv:2404.04656.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further (useful range 0.01 to 0.5)
    beta: float = 0.1

    facts: ClassVar[Facts] = Facts(
        name="bco",
        title="Binary classifier optimisation",
        data="labels",
        source="arXiv:2404.04656",
        learning_rate=1e-6,
        reference=True,
        forwards=1,
        least=2,
        healthy="Before the first update `loss` is ln 2 = 0.6931, and `delta` and every reward are 0. `rewards/chosen` "
        "and `rewards/rejected` part on both sides of `delta`, which itself often falls; `rewards/accuracies` rises.",
        failures="`delta` jumps from update to update: it is a mean over the update's rows; a larger `batch_size`, 16 "
        "or more, above all where one class is rare. "
        "`delta` falls without end and samples get worse: the policy leaves the reference; a larger `beta` or a lower "
        "`learning_rate`. "
        "`loss` falls and samples do not improve: good and bad rows have different prompts, and the classifier learns "
        "those; balance the prompts of both classes.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, above_zero=("beta",))

    def settled(self, examples: Sequence[Example]) -> BCO:
        """The objective as it is. InputError where the rows are of one class."""
        both_classes(self.facts.name, examples)
        return self

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_completions, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Reference:
        reference = batch.sum_tokens(models.reference(batch))  # [N]
        rewards = self.beta * (batch.sum_tokens(policy_logp(batch, models)) - reference)  # [N]
        every = everyone(batch, torch.stack([rewards, desirable(batch).to(rewards.dtype)], 1)).values  # [everyone's, 2]
        return Reference(reference, middle(every[:, 0], every[:, 1] == 1))

    def loss(self, batch: Batch, out: Outputs, targets: Reference) -> tuple[Tensor, dict[str, Tensor]]:
        good, logp = desirable(batch), batch.sum_tokens(out.logp)  # [N], [N]
        rewards, delta = self.beta * (logp - targets.logp), targets.drift
        if delta is None:
            raise ValueError("bco reads the middle of the update's rewards; give Reference.drift")
        loss = -F.logsigmoid(sign(good, rewards) * (rewards - delta))  # [N]
        return loss.sum(), {**label_metrics(good, logp, rewards, delta), "delta": delta.expand(len(good))}

    def at_start(self) -> dict[str, float]:
        return {"loss": math.log(2), "delta": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}


def middle(rewards: Tensor, good: Tensor) -> Tensor:
    """Half-way between the mean rewards of both classes: rewards [E], good [E] bool -> []; of one class, its mean."""
    return torch.stack([rewards[side].mean() for side in (good, ~good) if side.any()]).mean()

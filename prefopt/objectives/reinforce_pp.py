"""REINFORCE++: rewards compared over the whole rollout, and the reference's pull at each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefopt.batch import Batch
from prefopt.objectives.advantages import SPREAD_EPS, batch_moments, centred
from prefopt.objectives.facts import Facts
from prefopt.objectives.gae import to_come
from prefopt.objectives.policy_gradient import TOKEN_MEAN, Clipped, Method, clipped, scored_tokens


@dataclass(frozen=True)
class ReinforcePP(Clipped):
    """-1/K sum over all tokens of the update min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A    =  (A_t - mean of A_t) / standard deviation of A_t, both over the K tokens of the rollout
        A_t  =  R - beta x sum over the tokens from t on of log p / p_reference
        r    =  p(token) / p_old(token), p_old the policy that drew the completion
        K    =  trained tokens of completions that have a reward R
    With baseline: group (REINFORCE++ with baseline), R is the reward less the mean of its group; the paper then takes
    kl: k2. One completion per prompt is enough without.
    Hu et al. 2025, arXiv:2501.03262.
    """

    # strength of the pull towards the reference, reward units per nat: larger stays closer, 0 needs no reference
    beta: float = 0.01
    # what is taken off a reward before the rollout's mean. none; group: the mean of the prompt's completions
    baseline: Literal["none", "group"] = "none"

    facts: ClassVar[Facts] = Facts(
        name="reinforce_pp",
        title="REINFORCE with normalisation over the rollout (REINFORCE++)",
        data="prompts",
        source="arXiv:2501.03262",
        learning_rate=1e-6,
        reference=True,
        live=True,
        forwards=1,
        healthy="`reward` rises over tens of updates; `kl_reference` rises from 0 and flattens.",
        failures="`reward` follows the prompts that happen to be drawn: easy prompts look like good answers; "
        "`baseline` group with several completions per prompt, more prompts per rollout. "
        "`kl_reference` grows without end: after normalisation beta counts for less where rewards are far apart; a "
        "larger `beta`.",
    )

    def fitted(self, max_tokens: int, num_completions: int) -> ReinforcePP:
        if self.baseline == "group" and num_completions < 2:
            raise ValueError("baseline: group needs two completions of a prompt; set num_completions or baseline: none")
        return self

    def credit(self, batch: Batch, penalty: Tensor | None) -> Tensor:
        reward = batch.score if self.baseline == "none" else centred(batch, batch.score)
        credit = batch.spread(reward).double()  # [K]
        if penalty is not None:
            credit = credit - to_come(batch, penalty.double(), 1.0)
        at = scored_tokens(batch)
        mean, std = batch_moments(batch, credit[at])
        dtype = batch.score.dtype if penalty is None else penalty.dtype
        return torch.where(at, (credit - mean) / (std + SPREAD_EPS), 0.0).to(dtype)

    @property
    def method(self) -> Method:
        # centred is what `credit` starts from with baseline: group; it goes on to tokens, which no Advantage knows of
        return Method(centred, clipped(*self.edges), TOKEN_MEAN)

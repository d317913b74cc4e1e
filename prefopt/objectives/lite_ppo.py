"""Lite PPO: the mean of the group, the spread of the rollout, and every token weighing the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import batch_scaled, in_batch_spreads
from prefopt.objectives.facts import Facts
from prefopt.objectives.policy_gradient import TOKEN_MEAN, Clipped, Method, clipped


@dataclass(frozen=True)
class LitePPO(Clipped):
    """-1/K sum over all tokens of the update min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - mean of the group's R) / standard deviation of all R of the rollout
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        K  =  trained tokens of completions that have a reward R
    Liu et al. 2025, arXiv:2508.08221.
    """

    facts: ClassVar[Facts] = Facts(
        name="lite_ppo",
        title="Group mean and rollout spread (Lite PPO)",
        data="prompts",
        source="arXiv:2508.08221",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates. A group that differs by a hair has a small step, where `grpo` "
        "would blow it up.",
        failures="One kind of prompt is learnt, another is not: rewards of different size share one spread; rewards of "
        "one scale, `grpo`.",
    )

    @property
    def method(self) -> Method:
        return Method(batch_scaled, clipped(*self.edges), TOKEN_MEAN, in_batch_spreads)

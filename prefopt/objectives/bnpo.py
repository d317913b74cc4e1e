"""BNPO: rewards scaled by how usual their prompt's success is, a Beta distribution fitted to each rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import beta_normalised, in_beta_densities
from prefopt.objectives.facts import Facts
from prefopt.objectives.policy_gradient import SEQUENCE_SUM, Clipped, Method, clipped


@dataclass(frozen=True)
class BNPO(Clipped):
    """-1/N sum over completions sum over tokens min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - p) / density of Beta(1 + a/3, 1 + b/3) at p, neither parameter below 1
        p  =  mean of the group's R, R the reward as a share of the way from lowest to highest
        a, b  =  of the Beta distribution with the mean and variance of p over the prompts of the rollout
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        N  =  completions that have a reward
    Beta(1, 1) is REINFORCE with a baseline; Beta(3/2, 3/2) has GRPO's advantage, but for a constant. Sums and clipping
    are those of the authors' code. TRL calls a token mean `bnpo`, with GRPO's advantage: that is `dapo` with
    clip_high: 0.2, and counted over the whole update.
    Xiao et al. 2025, arXiv:2506.02864.
    """

    # how far a probability may rise, as a share, before its gradient stops: larger keeps more variety, smaller is safer
    clip_high: float = 0.28
    # the reward of a failure, and none may be below: larger makes each reward a smaller share of success, smaller a
    # larger share
    lowest: float = 0.0
    # the reward of a success, and none may be above: larger makes each reward a smaller share of success, smaller a
    # larger share
    highest: float = 1.0

    facts: ClassVar[Facts] = Facts(
        name="bnpo",
        title="Beta normalisation of rewards (BNPO)",
        data="prompts",
        source="arXiv:2506.02864",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates; `grad_norm` is steadier than with `grpo` while prompts are of "
        "mixed difficulty.",
        failures="`grad_norm` jumps: few prompts per rollout, whose success varies by chance, give a poor fit; more "
        "prompts per rollout, `grpo`. An error about a reward's range: the method is made for shares of success; set "
        "`lowest` and `highest`, or take `grpo`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lowest < self.highest:
            raise ValueError(f"lowest must be below highest, got {self.lowest:g} and {self.highest:g}")

    @property
    def least_reward(self) -> float:
        """None may be below."""
        return self.lowest

    @property
    def method(self) -> Method:
        ends = (self.lowest, self.highest)
        return Method(beta_normalised(*ends), clipped(*self.edges), SEQUENCE_SUM, in_beta_densities(*ends))

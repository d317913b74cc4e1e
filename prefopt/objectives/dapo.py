"""DAPO's loss: GRPO with every token weighing the same, and more room for probabilities to rise than to fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_spreads, normalised
from prefopt.objectives.facts import Facts
from prefopt.objectives.policy_gradient import TOKEN_MEAN, Clipped, Method, clipped


@dataclass(frozen=True)
class DAPO(Clipped):
    """-1/K sum over all tokens of the update min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        K  =  trained tokens of completions that have a reward R
    The paper's other three parts are no part of the loss: dynamic sampling (prompts without a difference in reward are
    drawn again) is an option of rollouts, and so is leaving out completions that were cut off; its soft penalty on
    answers that run long is a reward.
    Yu et al. 2025, arXiv:2503.14476.
    """

    # how far a probability may rise, as a share, before its gradient stops: larger keeps more variety, smaller is safer
    clip_high: float = 0.28

    facts: ClassVar[Facts] = Facts(
        name="dapo",
        title="Decoupled clip and token mean (DAPO)",
        data="prompts",
        source="arXiv:2503.14476",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates, and completions of a prompt stay different. `clip_fraction/high` "
        "is 0 with one update per rollout.",
        failures="`zero_variance/solved` and `zero_variance/failed` take most prompts: they teach nothing; dynamic "
        "sampling, prompts of middling difficulty. "
        "Answers grow until they are cut off: with a token mean long answers weigh more; the penalty on long "
        "completions among the rewards, a larger `max_tokens`.",
    )

    @property
    def method(self) -> Method:
        return Method(normalised, clipped(*self.edges), TOKEN_MEAN, in_group_spreads)

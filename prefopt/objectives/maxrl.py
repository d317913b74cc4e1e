"""MaxRL (experimental): towards the likelihood of success rather than its chance, so that hard prompts weigh more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_means, over_mean
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import SEQUENCE_SUM, Method, PolicyGradient, whole


@dataclass(frozen=True)
class MaxRL(PolicyGradient):
    """-1/N sum over completions r A: of rewards 0 and 1 the gradient of a truncated log of the chance p of success.

        A  =  (R - mean of the group's R) / mean of the group's R, 0 where that is 0
        r  =  p(y | x) / p_old(y | x), 1 with one update per rollout
        N  =  completions that have a reward R
    Its expectation over a group of G is (1 - (1 - p)^(G - 1)) / p times the gradient of p, which nears that of log p.
    Tajwar et al. 2026, arXiv:2602.02710.
    """

    # how far a completion's ratio may move, as a share, before its gradient stops: larger moves faster, smaller more
    # safely (0.2 is usual with several updates per rollout); null: without end, as in the paper
    clip: float | None = None

    least_reward: ClassVar[float] = 0.0  # none may be below

    facts: ClassVar[Facts] = Facts(
        name="maxrl",
        title="Maximum likelihood reinforcement learning (experimental)",
        data="prompts",
        source="arXiv:2602.02710",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates, on hard prompts first; `zero_variance/failed` falls.",
        failures="`grad_norm` jumps: a single success among many failures weighs as much as all of them; a larger "
        "`num_completions` together with a lower `learning_rate`, `dr_grpo`. "
        "An error about a reward below 0: the advantage is divided by the mean reward; rewards of 0 and 1, `grpo`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "clip")

    @property
    def method(self) -> Method:
        clip = math.inf if self.clip is None else self.clip
        return Method(over_mean, whole(clip, clip), SEQUENCE_SUM, in_group_means)

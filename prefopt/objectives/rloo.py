"""REINFORCE leave-one-out: the reward of a whole completion against the mean of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import leave_one_out
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import SEQUENCE_SUM, Method, PolicyGradient, whole


@dataclass(frozen=True)
class RLOO(PolicyGradient):
    """-1/N sum over completions r A: the gradient of the expected reward less beta x KL(p || p_reference), unbiased.

        A  =  R - mean of R over the other completions of the prompt
        r  =  p(y | x) / p_old(y | x), 1 with one update per rollout
        R  =  reward - beta x log p(y | x) / p_reference(y | x)
        N  =  completions that have a reward
    Ahmadian et al. 2024, arXiv:2402.14740.
    """

    # strength of the pull towards the reference, reward units per nat: larger stays closer, 0 needs no reference
    beta: float = 0.05
    # how far a completion's ratio may move, as a share, before its gradient stops: larger moves faster, smaller more
    # safely (0.2 is usual with several updates per rollout); null: without end, as in the paper, which is unbiased
    clip: float | None = None

    facts: ClassVar[Facts] = Facts(
        name="rloo",
        title="REINFORCE leave-one-out",
        data="prompts",
        source="arXiv:2402.14740",
        learning_rate=1e-6,
        reference=True,
        live=True,
        forwards=1,
        least_completions=2,
        healthy="`reward` rises, `kl_reference` rises from 0 and flattens where beta holds it.",
        failures="`kl_reference` grows without end: a reward that always has more to give; a larger `beta` or a lower "
        "`learning_rate`. "
        "`grad_norm` jumps with several updates per rollout: ratios of whole completions grow fast; `clip`, fewer "
        "updates per rollout.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "clip")

    @property
    def method(self) -> Method:
        clip = math.inf if self.clip is None else self.clip
        return Method(leave_one_out, whole(clip, clip), SEQUENCE_SUM, leave_one_out)

"""Group sequence policy optimisation: GRPO with one ratio, and one decision to clip, for a whole completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_spreads, normalised
from prefopt.objectives.facts import Facts
from prefopt.objectives.policy_gradient import SEQUENCE_MEAN, Clipped, Method, clipped_by_completion


@dataclass(frozen=True)
class GSPO(Clipped):
    """-1/N sum over completions min(s A, clip(s, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        s  =  (p(y | x) / p_old(y | x))^(1/|y|), the geometric mean of the token ratios
        N  =  completions that have a reward R, |y| = trained tokens of completion y
    While the ratio is 1 the gradient is GRPO's: it differs with several updates per rollout only.
    Zheng et al. 2025, arXiv:2507.18071.
    """

    # how far a completion's ratio may fall, as a share, before its gradient stops; a mean over tokens moves far less
    # than a token: larger moves faster, smaller more safely
    clip_low: float = 3e-4
    # how far it may rise: larger moves faster, smaller is safer
    clip_high: float = 4e-4

    facts: ClassVar[Facts] = Facts(
        name="gspo",
        title="Group sequence policy optimisation",
        data="prompts",
        source="arXiv:2507.18071",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates. With several updates per rollout the clip fractions are far "
        "above GRPO's, 0.1 and more, and that is no fault.",
        failures="`reward` stands still with several updates per rollout, clip fractions near 1: the policy moves "
        "further in an update than the clipping allows; a lower `learning_rate`, a larger `clip_low` and "
        "`clip_high`. Nothing differs from `grpo`: one update per rollout keeps the ratio at 1; several updates per "
        "rollout, or `grpo`.",
    )

    @property
    def method(self) -> Method:
        return Method(normalised, clipped_by_completion(*self.edges), SEQUENCE_MEAN, in_group_spreads)

"""Group relative policy optimisation: rewards compared within the completions of one prompt, no critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import normalised
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import SEQUENCE_MEAN, Method, PolicyGradient, clipped


@dataclass(frozen=True)
class GRPO(PolicyGradient):
    """-1/N sum over completions 1/|y| sum over tokens min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        R  =  reward, less beta x log p(y | x) / p_reference(y | x) with kl: reward
        N  =  completions that have a reward, |y| = trained tokens of completion y
    With kl: k3 it is the paper's: beta x (e^-d - 1 + d), d = log p / p_reference of each token, is added instead.
    Shao et al. 2024, arXiv:2402.03300.
    """

    # how far a token's probability may fall, as a share, before its gradient stops: larger moves faster, less safely
    clip_low: float = 0.2
    # how far it may rise
    clip_high: float = 0.2

    facts: ClassVar[Facts] = Facts(
        name="grpo",
        title="Group relative policy optimisation",
        data="prompts",
        source="arXiv:2402.03300",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates, unevenly. `ratio` is 1 and the clip fractions 0 with one update "
        "per rollout, and that is no fault. `zero_variance/solved` rises as prompts are learnt. `sampler_gap` stays "
        "below 1e-4 in float32.",
        failures="`zero_variance/failed` above 0.9 and a flat `reward`: no completion is ever rewarded, so nothing is "
        "learnt; easier prompts mixed in, a larger `num_completions`, partial credit. "
        "`reward` rises and samples get worse: the reward is fooled; read samples, set `beta`. "
        "Long wrong answers: each completion's loss is divided by its own length; `dr_grpo`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "clip_low", "clip_high")

    @property
    def method(self) -> Method:
        return Method(normalised, clipped(self.clip_low, self.clip_high), SEQUENCE_MEAN)

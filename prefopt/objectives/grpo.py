"""Group relative policy optimisation: rewards compared within the completions of one prompt, no critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_spreads, normalised
from prefopt.objectives.facts import Facts
from prefopt.objectives.policy_gradient import SEQUENCE_MEAN, Clipped, Method, clipped


@dataclass(frozen=True)
class GRPO(Clipped):
    """-1/N sum over completions 1/|y| sum over tokens min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        N  =  completions that have a reward R, |y| = trained tokens of completion y
    With a beta, beta x log p(y | x) / p_reference(y | x), less its mean in the group, is taken off A; with kl: k3 the
    paper's term is added instead, beta x (e^-d - 1 + d), d = log p / p_reference of each token.
    Shao et al. 2024, arXiv:2402.03300.
    """

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

    @property
    def method(self) -> Method:
        return Method(normalised, clipped(*self.edges), SEQUENCE_MEAN, in_group_spreads)

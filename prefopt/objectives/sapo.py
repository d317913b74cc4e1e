"""Soft adaptive policy optimisation (experimental): a gradient that fades as a token moves, where GRPO's stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_spreads, normalised
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import SEQUENCE_MEAN, Method, PolicyGradient, gated


@dataclass(frozen=True)
class SAPO(PolicyGradient):
    """-1/N sum over completions 1/|y| sum over tokens 4/t sigmoid(t (r - 1)) A.

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        t  =  temperature_rising where A is above 0, else temperature_falling
        N  =  completions that have a reward R, |y| = trained tokens of completion y
    While the ratio is 1 the gradient is GRPO's: it differs with several updates per rollout only.
    Gao et al. 2025, arXiv:2511.20347.
    """

    # how fast the gradient of tokens fades that are to rise: larger holds the policy closer, smaller lets it go further
    temperature_rising: float = 1.0
    # the same for tokens that are to fall, which upset training more: larger fades faster, smaller more slowly
    temperature_falling: float = 1.05

    facts: ClassVar[Facts] = Facts(
        name="sapo",
        title="Soft adaptive policy optimisation (experimental)",
        data="prompts",
        source="arXiv:2511.20347",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates; `ratio` stays near 1. `loss` starts near 0, "
        "and its size says little.",
        failures="`ratio` drifts from 1: a gradient that fades never stops; larger temperatures, fewer updates per "
        "rollout. Nothing differs from `grpo`: one update per rollout keeps the ratio at 1; several updates per "
        "rollout, or `grpo`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, above_zero=("temperature_rising", "temperature_falling"))

    @property
    def method(self) -> Method:
        return Method(
            normalised, gated(self.temperature_rising, self.temperature_falling), SEQUENCE_MEAN, in_group_spreads
        )

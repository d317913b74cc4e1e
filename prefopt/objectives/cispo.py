"""CISPO: every token keeps its gradient, weighted by a ratio that is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.advantages import in_group_spreads, normalised
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import TOKEN_MEAN, Method, PolicyGradient, weighted


@dataclass(frozen=True)
class CISPO(PolicyGradient):
    """-1/K sum over all tokens of the update w A log p(token), w without gradient.

        A  =  (R - mean of the group's R) / standard deviation of the group's R
        w  =  p(token) / p_old(token), at least lowest and at most highest; p_old the policy that drew the completion
        K  =  trained tokens of completions that have a reward R
    The paper writes both sides and uses the upper one alone, as the defaults here; some programs cut below as well.
    MiniMax 2025, arXiv:2506.13585; the upper side: Khatri et al. 2025, arXiv:2510.13786.
    """

    # largest weight of a token: larger follows the old policy's samples more exactly and is noisier, smaller is
    # steadier (4 to 8 made no difference in a large study)
    highest: float = 5.0
    # smallest weight of a token: larger keeps tokens that have become unlikely, smaller lets go of them; 0 cuts nothing
    lowest: float = 0.0

    facts: ClassVar[Facts] = Facts(
        name="cispo",
        title="Clipped importance weights (CISPO)",
        data="prompts",
        source="arXiv:2506.13585",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates; `ratio` stays near 1. `clip_fraction/high`, the share of tokens "
        "whose weight is cut, is near 0. `loss` means nothing by itself: log-probs are part of it.",
        failures="`ratio` drifts from 1 and `reward` falls: nothing stops a token that has moved far, only its weight "
        "is cut; fewer updates per rollout, a lower `learning_rate`, `grpo`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "lowest", above_zero=("highest",))
        if not self.lowest <= 1 <= self.highest:
            raise ValueError(
                f"lowest {self.lowest:g} and highest {self.highest:g} must have 1 between them: at a ratio "
                "of 1 nothing is to be cut"
            )

    @property
    def method(self) -> Method:
        return Method(normalised, weighted(self.lowest, self.highest), TOKEN_MEAN, in_group_spreads)

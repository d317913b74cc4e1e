"""Dr. GRPO: GRPO without its two divisions, by a completion's length and by the spread of a group's rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from prefopt.objectives.advantages import centred
from prefopt.objectives.facts import Facts, check_ranges
from prefopt.objectives.policy_gradient import Clipped, Method, clipped, constant_mean


@dataclass(frozen=True)
class DrGRPO(Clipped):
    """-1/N sum over completions 1/length sum over tokens min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

        A  =  R - mean of the group's R
        r  =  p(token) / p_old(token), p_old the policy that drew the completion
        N  =  completions that have a reward R; length is the same for all of them
    With a beta, beta x log p(y | x) / p_reference(y | x), less its mean in the group, is taken off A: at a ratio of 1
    the gradient of the expected reward less beta x KL(p || p_reference), times (G - 1) / (G length).
    Liu et al. 2025, arXiv:2503.20783.
    """

    # tokens that a completion's sum is divided by, the same for all: larger makes smaller steps where gradients are
    # not clipped, smaller larger ones; null: the longest completion that may be drawn
    length: float | None = None

    facts: ClassVar[Facts] = Facts(
        name="dr_grpo",
        title="GRPO without its biases of length and difficulty",
        data="prompts",
        source="arXiv:2503.20783",
        learning_rate=1e-6,
        reference=True,
        live=True,
        least_completions=2,
        healthy="`reward` rises over tens of updates; wrong answers do not grow longer. `ratio` is 1 and the clip "
        "fractions 0 with one update per rollout.",
        failures="`grad_norm` is tiny and `reward` flat: rewards are small and not scaled by their spread; a larger "
        "`learning_rate`, rewards around 1. "
        "Hard prompts are never learnt: each prompt weighs by how much it can still gain, not by its difficulty; "
        "easier prompts mixed in, a larger `num_completions`, `maxrl`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, above_zero=("length",))

    def fitted(self, max_tokens: int, num_completions: int) -> DrGRPO:
        return self if self.length is not None else replace(self, length=float(max_tokens))

    @property
    def method(self) -> Method:
        if self.length is None:
            raise ValueError("dr_grpo: length is not known; give the longest completion that may be drawn, in tokens")
        return Method(centred, clipped(*self.edges), constant_mean(self.length))

"""How often the policy's samples beat the reference's, under a reward that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefopt.evaluate.statistics import Estimate, mean, wilson

Rewards = Sequence[Sequence[float | None]]  # [prompt][sample]; None or NaN: could not be scored


def win_rate(policy: Rewards, reference: Rewards, *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Probability that a policy's sample earns more than a reference's on the same prompt, a tie counted half.

    Per prompt, every sample of one is compared with every sample of the other; the prompts' shares are averaged, and
    the prompts are what is independent (n). Interval: bootstrap over prompts; Wilson's where all prompts agree.
    Samples without a reward are left out, and so is a prompt that has none left on one side.
    ValueError if the two do not have the same prompts.
    """
    if len(policy) != len(reference):
        raise ValueError(f"rewards for {len(policy)} prompts of the policy but {len(reference)} of the reference")
    shares = [_share(_scored(ours), _scored(theirs)) for ours, theirs in zip(policy, reference, strict=True)]
    known = [share for share in shares if share is not None]
    if not known:
        return Estimate(None, None, None, 0, f"none of {len(shares)} prompts has a scored sample on both sides")
    estimate = mean(known, seed=seed, confidence=confidence)
    return estimate if estimate.low is not None else wilson(math.fsum(known), len(known), confidence)


def mean_reward(rewards: Rewards, *, seed: int = 0) -> Estimate:
    """Mean over prompts of each prompt's mean reward; n prompts. Samples without a reward are left out."""
    kept = [scored for samples in rewards if (scored := _scored(samples))]
    if not kept:
        return Estimate(None, None, None, 0, f"none of {len(rewards)} prompts has a scored sample")
    return mean([math.fsum(scored) / len(scored) for scored in kept], seed=seed)


def _scored(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None and not math.isnan(reward)]


def _share(ours: list[float], theirs: list[float]) -> float | None:
    """Of all comparisons, those won plus half of those tied."""
    if not ours or not theirs:
        return None
    points = sum((a > b) + (a == b) / 2 for a in ours for b in theirs)
    return points / (len(ours) * len(theirs))

"""Rewards: what scores completions. Nothing here imports torch, and what may hang runs in a process of its own."""

from __future__ import annotations

from prefopt.rewards.channel import ABSTAINED
from prefopt.rewards.function import FunctionReward, Limits
from prefopt.rewards.mixture import Mixture
from prefopt.rewards.options import RewardOptions, build

__all__ = ["ABSTAINED", "FunctionReward", "Limits", "Mixture", "RewardOptions", "build"]

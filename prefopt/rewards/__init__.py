"""Rewards: what scores completions. Nothing here imports torch, and whatever may hang runs in a process of its own."""

from __future__ import annotations

from prefopt.rewards.function import FunctionReward, Limits

__all__ = ["FunctionReward", "Limits"]
